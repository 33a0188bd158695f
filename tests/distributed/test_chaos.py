"""A chaos run: training with faults at random instants ends bit-identical to an undisturbed training.

In CI the ranks are forked and six faults are injected; `tools/faults.sh` injects 24 into a run of the command.
The number of ranks is constant: on another number a run resumes the same values, but sums in another order (see
test_changed_world_size.py), so its losses are not bit-identical.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chaos import KINDS, FaultyRun, inject_and_check, make_plan
from support.chaos_starts import CommandStart, ForkedStart, Start
from support.fault_log import record_fault
from support.interruptions import (
    assert_same_checkpoint,
    assert_same_export,
    assert_same_tensorboard,
    progress,
    run_settings,
)
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Recipe

from dreamdance.recipe import dump_recipe
from dreamdance.runs.layout import checkpoint_folder, export_folder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEED = int(os.environ.get("DREAMDANCE_CHAOS_SEED", "4"))
NUM_FAULTS = int(os.environ.get("DREAMDANCE_CHAOS_FAULTS", "6"))
WORLD_SIZE = int(os.environ.get("DREAMDANCE_CHAOS_RANKS", "2"))
BY_COMMAND = bool(os.environ.get("DREAMDANCE_CHAOS_BY_COMMAND"))
EVERY_STEPS = 10
STEPS_BETWEEN_FAULTS = 20
FEW_KINDS = (
    "rank killed",
    "rank stopped",
    "asked to stop by SIGUSR2",
    "killed during a save",
    "data worker killed",
    "bit flipped in the newest checkpoint",
)
CHOSEN_KINDS = FEW_KINDS if len(FEW_KINDS) >= NUM_FAULTS else tuple(KINDS)
TIME_LIMIT_SECONDS = 3000


def make_recipe(shards: Path) -> Recipe:
    """A recipe whose step time-out detects a hang within seconds; the first step may take longer on a busy machine."""
    changes: dict[str, Any] = {
        "name": "chaos",
        "max_steps": STEPS_BETWEEN_FAULTS * (NUM_FAULTS + 4),
        "batch_size": WORLD_SIZE,
        "data.num_workers": 1,
        "data.verify": "size",
        "cluster.tasks_per_node": WORLD_SIZE,
        "cluster.step_timeout_seconds": 8,
        "cluster.collective_timeout_seconds": 60,
        "checkpoint.every_steps": EVERY_STEPS,
        "checkpoint.keep_last": 3,
        "validation.loss_every_steps": 25,
        "validation.sample_every_steps": 100,
    }
    return tiny_stage1_recipe("domains", run_settings(shards, **changes))


def starter(recipe: Recipe, run: Path) -> Callable[[], Start]:
    """A function that starts the run, the same way at each call."""
    run.parent.mkdir()
    if not BY_COMMAND:
        return lambda: ForkedStart(recipe, run)
    file = run.parent / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    return lambda: CommandStart(file, run)


@pytest.mark.timeout(TIME_LIMIT_SECONDS)
def test_a_run_with_faults_at_random_instants_is_bit_identical_to_an_undisturbed_one(shards, tmp_path):
    recipe = make_recipe(shards)
    whole, broken = tmp_path / "whole" / recipe.name, tmp_path / "broken" / recipe.name
    undisturbed = starter(recipe, whole)()
    try:
        while not undisturbed.is_over():
            time.sleep(0.1)
    finally:
        undisturbed.end()
    assert export_folder(whole, recipe.max_steps).is_dir(), undisturbed.log()

    with FaultyRun(broken, starter(recipe, broken), seed=SEED) as run:
        for fault in make_plan(CHOSEN_KINDS, NUM_FAULTS, last_step=STEPS_BETWEEN_FAULTS * NUM_FAULTS, seed=SEED):
            inject_and_check(run, fault, every_steps=EVERY_STEPS)
        run.wait_for_end()
    assert export_folder(broken, recipe.max_steps).is_dir(), run.start.log()

    last = recipe.max_steps
    assert_same_checkpoint(checkpoint_folder(whole, last), checkpoint_folder(broken, last), world_size=WORLD_SIZE)
    assert_same_export(export_folder(whole, last), export_folder(broken, last))
    assert_same_tensorboard(whole, broken)
    losses = {line["done"]: line["loss"] for line in progress(whole) if "loss" in line}
    assert sorted(losses) == list(range(1, last + 1))
    reported = [(line["done"], line["loss"]) for line in progress(broken) if "loss" in line]
    assert [pair for pair in reported if pair[1] != losses[pair[0]]] == [], "repeated steps give the same losses"
    record_fault(
        f"chaos run: {NUM_FAULTS} faults in {last} steps",
        how=f"seed {SEED}, {WORLD_SIZE} ranks, {'by command' if BY_COMMAND else 'forked'}, {len(CHOSEN_KINDS)} kinds",
        promised="weights, moments, average, losses in TensorBoard and export equal those of an undisturbed run",
        happened="all bit-identical",
        steps_lost=len(reported) - last,
    )
