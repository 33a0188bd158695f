"""The recipe alone chooses the parts of a training of each stage."""

import pytest
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe

from dreamdance.recipe import load_recipe
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance.training.stages.training_stage import stage_of


def test_the_task_of_a_recipe_chooses_the_stage_that_builds_and_samples() -> None:
    assert isinstance(stage_of(tiny_stage1_recipe()).build(device="meta"), GeometryObjective)
    assert isinstance(stage_of(tiny_stage2_recipe()).build(device="meta"), AnimationObjective)


def test_a_recipe_that_trains_nothing_has_no_stage() -> None:
    with pytest.raises(TypeError, match="a PrepareRecipe trains no stage"):
        stage_of(load_recipe("recipes/demo/prepare.yaml"))


@pytest.mark.parametrize(
    ("controls", "maps"), [(["pose"], []), (["pose", "depth"], ["depth"]), (["normal", "depth"], ["normal", "depth"])]
)
def test_stage_2_reads_the_maps_that_its_controls_name(controls: list[str], maps: list[str]) -> None:
    assert list(stage_of(tiny_stage2_recipe({"model.controls": controls})).maps) == maps


def test_stage_1_reads_every_map_that_it_denoises() -> None:
    assert list(stage_of(tiny_stage1_recipe()).maps) == ["normal", "depth"]
