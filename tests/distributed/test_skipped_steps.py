"""A spike of the loss is skipped on all ranks; too many end the run or roll it back to its last good weights."""

import math
import signal
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import assert_same_checkpoint, messages, output, run_settings, start_and_wait
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Fault, Recipe, ScaledSamples

from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing.rank_file import read_rank_file
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 2
# The median of the loss needs ten steps; step 12 is saved, the loss of step 13 is the first spike.
FIRST_SCALED = 13


def make_recipe(shards: Path, **changes: object) -> Recipe:
    more = {
        "max_steps": 16,
        "checkpoint.every_steps": 4,
        "recovery.spike_factor": 10.0,
        "optimizer.lr": 1e-4,
        **changes,
    }
    return tiny_stage1_recipe("domains", run_settings(shards, **more))


def scaled_samples(recipe: Recipe, *steps: int, factor: float = 100.0) -> ScaledSamples:
    """Scales the pictures of one sample of each of these steps (counted from 1) by `factor`."""
    order = make_loader(stage_of(recipe), Ranks()).order
    keys = [order.batch(step - 1)[-1] for step in steps]
    return ScaledSamples(frozenset((key.epoch, key.sample_id) for key in keys), factor)


def updates(run: Path, step: int) -> int:
    """The number of updates of the average at a checkpoint."""
    return read_rank_file(checkpoint_folder(run, step), 0).average_updates


def test_a_spike_of_the_loss_on_one_rank_is_skipped_on_all_and_named(shards, tmp_path):
    recipe, run = make_recipe(shards), tmp_path / "run"
    assert start_and_wait(recipe, run, scaled=scaled_samples(recipe, FIRST_SCALED)) == [0, 0], output(run)
    (report,) = [text for text in messages(run) if "skipped" in text]
    key = make_loader(stage_of(recipe), Ranks()).order.batch(FIRST_SCALED - 1)[-1]
    assert report.startswith(f"step {FIRST_SCALED}: update skipped on all ranks (1 within 100 steps), loss ")
    assert f"; largest in sample {key.sample_id} of epoch {key.epoch} (clip dancer_{key.sample_id})" in report
    assert updates(run, 16) == 15, "one of 16 is skipped"
    record_fault(
        "loss spike",
        how="the pictures of one sample times 100, on one of two ranks; recovery.spike_factor=10",
        promised="the update is skipped on all ranks and reported with the sample; the run continues",
        happened="15 of 16 updates applied, the sample named",
        steps_lost=1,
    )


def test_without_the_key_no_update_is_skipped(shards, tmp_path):
    recipe, run = make_recipe(shards, **{"recovery.spike_factor": None}), tmp_path / "run"
    assert start_and_wait(recipe, run, scaled=scaled_samples(make_recipe(shards), FIRST_SCALED)) == [0, 0], output(run)
    assert updates(run, 16) == 16


def test_more_spikes_than_the_recipe_allows_end_the_run_with_the_keys_to_change(shards, tmp_path):
    recipe, run = make_recipe(shards, **{"recovery.max_spikes": 1}), tmp_path / "run"
    assert start_and_wait(recipe, run, scaled=scaled_samples(recipe, 13, 15)) == [1, 1]
    for rank in (0, 1):
        assert "That is more than recovery.max_spikes=1: look at these samples" in output(run, rank)
    assert (checkpoint_folder(run, 12) / "COMPLETE").is_file()
    record_fault(
        "loss spikes again and again",
        how="pictures of steps 13 and 15 scaled; recovery.max_spikes=1",
        promised="the run ends on all ranks at one more than allowed, with the keys to change",
        happened="UserError on both ranks",
    )


@pytest.mark.parametrize("factor", [100.0, math.nan])
def test_a_roll_back_takes_the_last_good_weights_and_the_next_data_and_survives_a_kill(factor, shards, tmp_path):
    """Spikes in steps 14 and 15 are too many: the run rolls back to step 12, without the update of step 13."""
    bounds = {"recovery.max_spikes": 1, "max_nonfinite_steps": 1, "recovery.max_roll_backs": 1}
    recipe = make_recipe(shards, **bounds)
    scale = scaled_samples(recipe, 14, 15, factor=factor)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_and_wait(recipe, whole, scaled=scale) == [0, 0], output(whole)
    (report,) = [text for text in messages(whole) if "returned to the weights" in text]
    assert report.startswith("step 15: more than ")
    assert "returned to the weights of step 12; continues with the next data (roll-back 1," in report
    assert updates(whole, 16) == 12 + 1, "the updates of steps 1 to 12, and of step 16"

    killed = Fault(0, forward=16 * MICRO_BATCHES)
    assert start_and_wait(recipe, broken, killed, scaled=scale)[0] == -signal.SIGKILL
    assert start_and_wait(recipe, broken, scaled=scale) == [0, 0], output(broken)
    assert_same_checkpoint(checkpoint_folder(whole, 16), checkpoint_folder(broken, 16))
    record_fault(
        "loss spikes" if math.isfinite(factor) else "non-finite losses",
        how="pictures of steps 14 and 15 scaled, one allowed; recovery.max_roll_backs=1; killed in step 16 as well",
        promised="rolled back to the newest checkpoint, continued with the next data; the same after a kill",
        happened="weights of step 12, then step 16; killed and started again, bit-identical",
        steps_lost=3,
    )
