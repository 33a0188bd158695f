"""A rank that stops without dying is ended by every rank's watchdog, and nothing is lost; one that is slow is named."""

import signal
import time
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import (
    WORLD_SIZE,
    assert_same_checkpoint,
    first_step_after,
    messages,
    output,
    resumed_step,
    settings,
    start,
    struck_at,
)
from support.ranks import StartedRanks
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Recipe, SlowRank, Strike, run_recorded

from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE

pytestmark = pytest.mark.distributed

MAX_STEPS = 8
LEAST_SECONDS = 3
STRUCK_STEP = 5
MICRO_BATCHES = 2


def make_recipe(shards: Path, **changes: object) -> Recipe:
    return tiny_stage1_recipe("domains", settings(shards, max_steps=MAX_STEPS, **changes))


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert start(make_recipe(shards), run) == [0, 0], output(run)
    return run


@pytest.mark.parametrize(
    ("number", "fault"), [(signal.SIGSTOP, "rank stopped (SIGSTOP)"), (None, "rank hangs in a step")]
)
def test_a_rank_that_stops_is_noticed_by_all_who_can_and_the_run_goes_on_bit_for_bit(
    number, fault, whole, shards, tmp_path
):
    run = tmp_path / "run"
    strike = Strike(1, number, forward=STRUCK_STEP * MICRO_BATCHES)
    watched = make_recipe(shards, **{"cluster.step_timeout_seconds": LEAST_SECONDS})
    with StartedRanks(run_recorded, WORLD_SIZE, run / "output", recipe=watched, run=run, strike=strike) as ranks:
        # What is stopped can do nothing, srun ends it with the others. Of two that can, the first to end is seen by the
        # other as a connection that broke.
        watching = ranks.processes[: 1 if number else 2]
        for process in watching:
            process.join(90)
        codes = [process.exitcode for process in watching]
        assert TRY_AGAIN_EXIT_CODE in codes, ranks.output()
        assert set(codes) <= {TRY_AGAIN_EXIT_CODE, 1}, codes
        told = output(run, codes.index(TRY_AGAIN_EXIT_CODE))
        assert f"training a step (step {STRUCK_STEP}) has taken over" in told
        assert "in _take_step" in told, "the stack of where it waits"
        ended = time.time()
    detected = ended - struck_at(run, 1)
    assert start(make_recipe(shards), run) == [0, 0], output(run)
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    record_fault(
        fault,
        how=f"in the forward pass of step {STRUCK_STEP} on rank 1 of 2; cluster.step_timeout_seconds={LEAST_SECONDS}",
        promised="a rank that can notices within the time, shows all stacks, ends with code 75, and the others with it",
        happened=f"so it did; started again from step {resumed_step(run)}, weights bit-identical",
        detected_seconds=detected,
        resumed_seconds=first_step_after(run, ended),
        steps_lost=STRUCK_STEP - 1 - resumed_step(run),
    )


def test_a_collective_that_another_rank_does_not_join_ends_within_the_recipes_time_even_unwatched(shards, tmp_path):
    """In the groups that DeepSpeed makes for itself as well."""
    run = tmp_path / "run"
    timeouts = {"cluster.step_timeout_seconds": 0, "cluster.collective_timeout_seconds": 12}
    recipe = tiny_stage1_recipe("domains", settings(shards, max_steps=MAX_STEPS, **timeouts))
    strike = Strike(1, signal.SIGSTOP, forward=STRUCK_STEP * MICRO_BATCHES)
    with StartedRanks(run_recorded, WORLD_SIZE, run / "output", recipe=recipe, run=run, strike=strike) as ranks:
        ranks.processes[0].join(90)
        assert ranks.processes[0].exitcode == 1, ranks.output()
        assert time.time() - struck_at(run, 1) < 60
    assert "12000ms" in output(run), "the time-out, in gloo's words"


def test_a_slow_rank_is_named_with_what_it_is_slow_in_and_ended_by_nobody(shards, tmp_path):
    run = tmp_path / "run"
    changes = {"logging.every_steps": 5, "max_steps": 10, "cluster.step_timeout_seconds": LEAST_SECONDS}
    recipe = tiny_stage1_recipe("domains", settings(shards, **changes))
    assert start(recipe, run, SlowRank(1, 0.3)) == [0, 0], output(run)
    told = [text for text in messages(run) if "holds the others up" in text]
    assert len(told) == 1, "said once, not at every line"
    assert told[0].startswith("rank 1 holds the others up: 0.6")
    assert "s of each step in the forward pass" in told[0]
    record_fault(
        "slow rank",
        how="0.3 s of sleep in each forward pass of rank 1 of 2",
        promised="a report names the rank and what it is slow in; nothing is ended",
        happened=told[0],
        steps_lost=0,
    )
