"""A run asked to stop at start or in validation saves at the next step boundary and ends like an uninterrupted one."""

import signal

import pytest
from support.fault_log import record_fault
from support.interruptions import (
    MAX_STEPS,
    assert_same_checkpoint,
    assert_same_export,
    assert_same_tensorboard,
    messages,
    output,
    resumed_step,
    run_settings,
    start_and_wait,
)
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Fault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamdance.runs.layout import checkpoint_folder, complete_steps, export_folder, was_warned

pytestmark = pytest.mark.distributed

VALIDATED_STEP = 3
WARNING = signal.SIGUSR2


def validated_steps(run) -> list[int]:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("val/loss")] if "val/loss" in board.Tags()["scalars"] else []


def test_a_stop_before_the_first_step_and_one_in_validation_cost_nothing(shards, tmp_path):
    recipe = tiny_stage1_recipe("temporal", run_settings(shards, **{"checkpoint.every_steps": 5}))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_and_wait(recipe, whole) == [0, 0], output(whole)

    starting = Fault(1, WARNING, operation="open", path_contains=("validation", "index.json"))
    assert start_and_wait(recipe, broken, starting) == [0, 0], output(broken)
    assert "SIGUSR2" in output(broken, 1)
    assert complete_steps(broken) == [1]
    assert was_warned(broken), "the decision about another start reads it"

    assert start_and_wait(recipe, broken, Fault(1, WARNING, forward=1, in_validation=True)) == [0, 0], output(broken)
    assert complete_steps(broken) == [1, VALIDATED_STEP]
    assert validated_steps(broken) == [], "the interrupted validation records nothing"

    codes = start_and_wait(recipe, broken, Fault(1, signal.SIGKILL, forward=1))
    assert codes[1] == -signal.SIGKILL
    assert validated_steps(broken) == [VALIDATED_STEP], "the validation is repeated before the next step"
    assert start_and_wait(recipe, broken) == [0, 0], output(broken)
    assert resumed_step(broken) == VALIDATED_STEP
    assert sum("from step 3 " in text for text in messages(broken)) == 2

    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(broken, MAX_STEPS))
    assert_same_export(export_folder(whole, MAX_STEPS), export_folder(broken, MAX_STEPS))
    assert_same_tensorboard(whole, broken)
    record_fault(
        "asked to stop before the first step, and in validation",
        how="SIGUSR2 to rank 1 of 2 as it opens the held-out clips, and in its first forward pass on them",
        promised="saved at the next step boundary; the validation is repeated once; bit-identical in the end",
        happened="saved at steps 1 and 3; losses, TensorBoard, weights and export as those of an uninterrupted run",
        steps_lost=0,
    )
