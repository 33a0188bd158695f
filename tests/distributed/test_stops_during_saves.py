"""A run that ends while a checkpoint is written completes it first: nothing hangs, is lost, or occurs twice."""

import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fault_log import record_fault
from support.interruptions import (
    assert_same_checkpoint,
    messages,
    output,
    run_settings,
    samples_in_order,
    start_and_wait,
)
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Fault, Recipe, ScaledSamples
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dreamdance.runs.layout import checkpoint_folder, export_folder, step_folders, step_name, step_of
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

pytestmark = pytest.mark.distributed

MAX_STEPS = 6
MICRO_BATCHES = 2


@dataclass(frozen=True)
class HeldSave:
    """A rank that completes its file of a checkpoint only some time after a later forward pass.

    Attributes:
        rank: the rank whose save is held.
        step: the step of the checkpoint.
        forward: number of the training forward pass, which waits until the save is held; 0 for none.
        signals: signals that the rank gets meanwhile.
    """

    rank: int
    step: int
    forward: int
    signals: tuple[signal.Signals, ...] = ()
    HEARD_SECONDS = 0.5
    HELD_SECONDS = 1.5

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        count, begun, reached = 0, threading.Event(), threading.Event()

        def meet_in_forward(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            if isinstance(module, GeometryObjective) and module.training:
                count += 1
                if count == self.forward:
                    begun.set()
                    assert reached.wait(60), "the save has not begun"
                    time.sleep(self.HEARD_SECONDS)

        def hold_at_open(event: str, arguments: tuple[Any, ...]) -> None:
            wanted = (step_name(self.step), f"rank_{self.rank:05d}")
            if event == "open" and arguments[1] == "w" and all(part in str(arguments[0]) for part in wanted):
                for number in self.signals:
                    os.kill(os.getpid(), number)
                reached.set()
                assert self.forward == 0 or begun.wait(60), "training waits for the disk"
                time.sleep(self.HELD_SECONDS)

        register_module_forward_pre_hook(meet_in_forward)
        sys.addaudithook(hold_at_open)


def make_recipe(shards: Path, **changes: object) -> Recipe:
    return tiny_stage1_recipe("domains", run_settings(shards, max_steps=MAX_STEPS, **changes))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert start_and_wait(make_recipe(shards), run) == [0, 0], output(run)
    return run


def saved(run: Path) -> list[str]:
    """The completed checkpoints in their order, over all starts."""
    return [text.split()[1] for text in messages(run) if text.startswith("saved step_")]


def assert_sound(run: Path, steps: list[int]) -> None:
    """Checks that these checkpoints exist, each file as it was written, and nothing else."""
    folders = step_folders(run / "checkpoints")
    assert [step_of(folder) for folder in folders] == steps
    for folder in folders:
        assert complete_file.find_damage(folder, complete_file.read_manifest(folder).files) == []


def assert_same_run(whole: Path, run: Path) -> None:
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    assert samples_in_order(run) == samples_in_order(whole), "no step was done twice"


@pytest.mark.parametrize(
    ("rank", "signals"), [(1, (signal.SIGUSR2,)), (0, (signal.SIGUSR2, signal.SIGTERM)), (0, (signal.SIGTERM,) * 2)]
)
def test_a_stop_during_a_save_waits_for_it_saves_its_own_step_once_and_loses_nothing(
    rank, signals, whole, shards, tmp_path
):
    recipe, run = make_recipe(shards), tmp_path / "run"
    third_step = 2 * MICRO_BATCHES + 1
    assert start_and_wait(recipe, run, HeldSave(rank, step=2, forward=third_step, signals=signals)) == [0, 0], output(
        run
    )
    assert saved(run) == ["step_00000002", "step_00000003"]
    assert_sound(run, [2, 3])
    assert not export_folder(run, MAX_STEPS).exists()
    assert start_and_wait(recipe, run) == [0, 0], output(run)
    assert_same_run(whole, run)
    names = ", then ".join(number.name for number in signals)
    record_fault(
        f"{names} to rank {rank} while a checkpoint is being written",
        how="sent by the writing thread, which then holds its file until the next step is over",
        promised="no deadlock, the checkpoint is completed, the step of the stop is saved once",
        happened="steps 2 and 3 saved, once each; started again, bit-identical",
        steps_lost=0,
    )


def test_a_stop_in_a_step_that_is_saved_anyway_saves_it_once(whole, shards, tmp_path):
    recipe, run = make_recipe(shards), tmp_path / "run"
    assert start_and_wait(recipe, run, Fault(1, signal.SIGUSR2, forward=2 * MICRO_BATCHES)) == [0, 0], output(run)
    assert saved(run) == ["step_00000002"]
    assert_sound(run, [2])
    assert start_and_wait(recipe, run) == [0, 0], output(run)
    assert_same_run(whole, run)


@pytest.mark.parametrize(
    "held",
    [
        HeldSave(0, step=5, forward=5 * MICRO_BATCHES + 1),
        HeldSave(1, step=6, forward=0, signals=(signal.SIGUSR2, signal.SIGTERM)),
    ],
    ids=["still writing", "stopped while writing the last"],
)
def test_a_run_that_ends_while_a_checkpoint_is_being_written_completes_it(held, whole, shards, tmp_path):
    run = tmp_path / "run"
    assert start_and_wait(make_recipe(shards, **{"checkpoint.every_steps": 5}), run, held) == [0, 0], output(run)
    assert saved(run) == ["step_00000005", "step_00000006"]
    assert_sound(run, [5, 6])
    assert messages(run)[-1].startswith("finished at step 6; exported to ")
    assert_same_run(whole, run)


def test_a_run_that_ends_for_losses_that_are_not_finite_completes_the_checkpoint_first(whole, shards, tmp_path):
    recipe, run = make_recipe(shards, max_nonfinite_steps=0), tmp_path / "run"
    key = make_loader(stage_of(recipe), Ranks()).order.batch(2)[-1]
    scaled = ScaledSamples(frozenset({(key.epoch, key.sample_id)}), math.nan)
    held = HeldSave(0, step=2, forward=2 * MICRO_BATCHES + 1)
    assert start_and_wait(recipe, run, held, scaled=scaled) == [1, 1]
    for rank in (0, 1):
        assert "That is more than max_nonfinite_steps=0: look at these samples" in output(run, rank)
    assert saved(run) == ["step_00000002"]
    assert_sound(run, [2])
    assert start_and_wait(recipe, run) == [0, 0], output(run)
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
