"""Ranks that differ in recipe, code or base model are refused before the first step, on all ranks, with the cause."""

import os
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from support.fault_log import record_fault
from support.interruptions import output, run_settings
from support.ranks import StartedRanks
from support.recipes import tiny_stage1_recipe, tiny_unet_config
from support.training_scenarios import Recipe, run_recorded

import dreamdance
from dreamdance.runs.layout import progress_file
from dreamdance.runtime.ranks import Ranks

pytestmark = pytest.mark.distributed


def run_differently(ranks: Ranks, *, recipe: Recipe, run: Path, difference: str, elsewhere: Path) -> Any:
    """Trains; rank 1 has another recipe, another checkout, or another copy of the base model."""
    os.chdir(elsewhere / str(ranks.rank) if difference == "weights" else elsewhere)
    if ranks.rank == 1 and difference == "recipe":
        recipe = recipe.model_copy(update={"seed": 7})
    if ranks.rank == 1 and difference == "code":
        dreamdance.__path__ = [str(elsewhere)]
    run_recorded(ranks, recipe=recipe, run=run)


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("recipe", "recipe: seed: 0 on rank 0, 7 on rank 1"),
        ("code", "code: "),
        ("weights", "weights to train: "),
    ],
)
def test_a_rank_with_another_recipe_code_or_base_model_is_refused_on_all_ranks(difference, named, shards, tmp_path):
    changes = run_settings(shards, max_steps=4)
    if difference == "code":
        (tmp_path / "older.py").write_text("# another checkout\n")
    if difference == "weights":
        changes |= {"model.unet": {"path": "base"}, "data.height": 32}
        for rank in range(2):  # as on the disks of two nodes
            UNet2DConditionModel.from_config(tiny_unet_config()).save_pretrained(tmp_path / str(rank) / "base")
    run = tmp_path / "run"
    arguments = {"recipe": tiny_stage1_recipe("domains", changes), "difference": difference, "elsewhere": tmp_path}
    with StartedRanks(run_differently, 2, run / "output", run=run, **arguments) as ranks:
        assert ranks.wait() == [1, 1]
    for rank in range(2):
        assert "UserError: 1 of 2 ranks would train something else than rank 0. " in output(run, rank)
        assert named in output(run, rank)
    assert not progress_file(run).exists()
    record_fault(
        f"ranks with different {difference}",
        how="rank 1 of 2 has another",
        promised="refused on all ranks before the first step, naming the difference",
        happened="UserError on both ranks naming it",
        steps_lost=0,
    )
