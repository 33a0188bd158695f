"""The planned size of a checkpoint equals that of a real one, and a save that would take too long gives a warning."""

from pathlib import Path
from typing import Any

import pytest
from support.interruptions import run_settings
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe

from dreamdance.recipe.schema import Stage1Recipe
from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.process_group import process_group, repeatable_arithmetic
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.checkpointing.saving_plan import describe_checkpoint, plan_checkpoint
from dreamdance.training.inputs import PreparedInputs
from dreamdance.training.planning.plan import describe
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import build_trainer

KINDS = [("bf16", 2), ("fp32", 0)]
WORLD_SIZE = 2


def make_recipe(**changes: Any) -> Stage1Recipe:
    return tiny_stage1_recipe("domains", changes)


def save_one_of_each(ranks: Ranks, *, recipes: list[Stage1Recipe], runs: Path) -> list[dict[str, int]]:
    """Takes a step of each recipe and saves it."""
    found = []
    with StopRequest() as stop, process_group(ranks, timeout_seconds=60), repeatable_arithmetic(enabled=True):
        for number, recipe in enumerate(recipes):
            run = runs / str(number)
            if ranks.is_main:
                run.mkdir(parents=True)
            trainer = build_trainer(
                stage_of(recipe), run, ranks, stop, Watchdog.from_limits(recipe.cluster), deterministic=True
            )
            trainer.inputs = PreparedInputs(iter(trainer.loader), trainer.engine.objective, ranks.device)
            trainer._take_step()
            trainer.checkpointer.begin(1, {"loader": trainer.loader.state_dict(), "guard": {}})
            trainer.checkpointer.finish()
            trainer.checkpointer.close()
            trainer.metrics.close()
            found.append({"trainable": sum(value.numel() for value in trainer.engine.trainable.values())})
    return found


@pytest.mark.distributed
def test_the_planned_size_is_that_of_a_real_checkpoint(shards, tmp_path):
    """A network of 12 M weights; its 350 names are not part of the plan."""
    recipes = [
        make_recipe(
            **{
                **run_settings(shards, max_steps=4, batch_size=2),
                "precision": precision,
                "sharding.zero_stage": stage,
                "model.unet.config.block_out_channels": [64, 192],
            }
        )
        for precision, stage in KINDS
    ]
    run = tmp_path / "runs"
    saved, _ = run_ranks(save_one_of_each, WORLD_SIZE, tmp_path / "ranks", recipes=recipes, runs=run)
    for number, (recipe, found) in enumerate(zip(recipes, saved, strict=True)):
        files = [path for path in checkpoint_folder(run / str(number), 1).rglob("*") if path.is_file()]
        assert len(files) == 2 + WORLD_SIZE
        real = sum(path.stat().st_size for path in files)
        assert plan_checkpoint(recipe, found["trainable"]).num_bytes == pytest.approx(real, rel=0.02), KINDS[number]


def test_the_bytes_of_full_size_are_counted_by_hand():
    """1,676 M weights of stage 1 in bf16: 16 bytes each, written at 500 MB/s and read back."""
    plan = plan_checkpoint(make_recipe(precision="bf16"), 1_676_000_000)
    assert plan.num_bytes == 26_816_000_000
    assert plan.seconds == pytest.approx(107.264)
    assert plan.save_limit_seconds == pytest.approx(96.0)
    assert not plan.fits


@pytest.mark.parametrize(("storage", "stop", "warned"), [(500, 120, True), (1000, 120, False), (500, 180, False)])
def test_a_save_longer_than_the_time_before_a_stop_gives_a_warning_with_its_keys(storage, stop, warned):
    recipe = make_recipe(
        **{"precision": "bf16", "cluster.storage_mb_per_second": storage, "cluster.stop_seconds": stop}
    )
    text = "\n".join(describe_checkpoint(recipe, 1_676_000_000))
    assert "26.82 GB each, 80.45 GB for the last 3\n" in text
    assert f"read back in {53_632 / storage:,.0f} s at {storage:,} MB/s (cluster.storage_mb_per_second)" in text
    assert ("WARNING" in text) == warned
    assert ("Set cluster.stop_seconds=180 or more" in text) == warned


def test_the_plan_of_a_recipe_describes_its_checkpoints():
    text = describe(make_recipe())
    assert "checkpoints (estimate):" in text
    assert "WARNING" not in text
