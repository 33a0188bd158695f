"""A rank that hangs is ended by the watchdogs, and no more than steps are lost; a slow rank is named."""

import re
import signal
import time
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import (
    WORLD_SIZE,
    assert_same_checkpoint,
    fault_time,
    first_step_after,
    messages,
    output,
    resumed_step,
    run_settings,
    start_and_wait,
)
from support.ranks import StartedRanks
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Fault, Recipe, SlowRank, run_recorded

from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE

pytestmark = pytest.mark.distributed

MAX_STEPS = 8
LEAST_SECONDS = 3
FAULT_STEP = 5
MICRO_BATCHES = 2


def make_recipe(shards: Path, **changes: object) -> Recipe:
    return tiny_stage1_recipe("domains", run_settings(shards, max_steps=MAX_STEPS, **changes))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert start_and_wait(make_recipe(shards), run) == [0, 0], output(run)
    return run


@pytest.mark.parametrize(
    ("number", "fault"), [(signal.SIGSTOP, "rank stopped (SIGSTOP)"), (None, "rank hangs in a step")]
)
def test_a_stopped_rank_is_detected_by_the_watchdogs_and_the_run_resumes_bit_for_bit(
    number, fault, whole, shards, tmp_path
):
    run = tmp_path / "run"
    injected = Fault(1, number, forward=FAULT_STEP * MICRO_BATCHES)
    watched = make_recipe(shards, **{"cluster.step_timeout_seconds": LEAST_SECONDS})
    with StartedRanks(run_recorded, WORLD_SIZE, run / "output", recipe=watched, run=run, fault=injected) as ranks:
        # A stopped rank can do nothing: srun ends it with the others. If both ranks can act, the first end breaks the
        # connection of the other.
        watching = ranks.processes[: 1 if number else 2]
        for process in watching:
            process.join(90)
        codes = [process.exitcode for process in watching]
        assert TRY_AGAIN_EXIT_CODE in codes, ranks.output()
        assert set(codes) <= {TRY_AGAIN_EXIT_CODE, 1}, codes
        text = output(run, codes.index(TRY_AGAIN_EXIT_CODE))
        assert f"training a step (step {FAULT_STEP}) has taken over" in text
        assert "in _take_step" in text, "the stack of the hanging call"
        ended = time.time()
    detected = ended - fault_time(run, 1)
    assert start_and_wait(make_recipe(shards), run) == [0, 0], output(run)
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    record_fault(
        fault,
        how=f"in the forward pass of step {FAULT_STEP} on rank 1 of 2; cluster.step_timeout_seconds={LEAST_SECONDS}",
        promised="a rank that can act detects it in time, shows all stacks and ends with code 75; the others end too",
        happened=f"as promised; started again from step {resumed_step(run)}, weights bit-identical",
        detected_seconds=detected,
        resumed_seconds=first_step_after(run, ended),
        steps_lost=FAULT_STEP - 1 - resumed_step(run),
    )


def test_a_collective_that_another_rank_does_not_join_ends_within_the_recipes_time_even_unwatched(shards, tmp_path):
    """The time-out also holds in the groups that DeepSpeed makes."""
    run = tmp_path / "run"
    timeouts = {"cluster.step_timeout_seconds": 0, "cluster.collective_timeout_seconds": 12}
    recipe = tiny_stage1_recipe("domains", run_settings(shards, max_steps=MAX_STEPS, **timeouts))
    fault = Fault(1, signal.SIGSTOP, forward=FAULT_STEP * MICRO_BATCHES)
    with StartedRanks(run_recorded, WORLD_SIZE, run / "output", recipe=recipe, run=run, fault=fault) as ranks:
        ranks.processes[0].join(90)
        assert ranks.processes[0].exitcode == 1, ranks.output()
        assert time.time() - fault_time(run, 1) < 60
    assert "12000ms" in output(run), "the time-out in the message of gloo"


def test_a_slow_rank_is_named_with_its_slow_phase_and_not_ended(shards, tmp_path):
    run = tmp_path / "run"
    changes = {"logging.every_steps": 5, "max_steps": 10, "cluster.step_timeout_seconds": LEAST_SECONDS}
    recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
    assert start_and_wait(recipe, run, SlowRank(1, 0.3)) == [0, 0], output(run)
    reports = [text for text in messages(run) if "delays the other ranks" in text]
    assert len(reports) == 1, "reported once, not at every line"
    numbers = re.fullmatch(
        r"rank 1 delays the other ranks: ([\d.]+) s of each step in the forward pass; half of the ranks need at most "
        r"[\d.]+ s \(a step takes ([\d.]+) s\)",
        reports[0],
    )
    assert numbers is not None, reports[0]
    forward_seconds, step_seconds = float(numbers[1]), float(numbers[2])
    assert 0.6 <= forward_seconds <= step_seconds, "two forward passes, each with a sleep of 0.3 s"
    record_fault(
        "slow rank",
        how="0.3 s of sleep in each forward pass of rank 1 of 2",
        promised="a report names the rank and its slow phase; nothing is ended",
        happened=reports[0],
        steps_lost=0,
    )
