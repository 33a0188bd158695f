"""What `tools/full_size.py` would run for hours: its recipes are accepted, and its checks call pipelines rightly."""

from pathlib import Path

import pytest
from support.recipes import HEIGHT, WIDTH
from support.tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline
from support.tool_modules import load_tool

from dreamdance.launch.run_folder import differences
from dreamdance.recipe import TrainingRecipe, load_recipe

ROOT = Path(__file__).parents[2]


tool, checks = load_tool("full_size"), load_tool("full_size_checks")


@pytest.mark.parametrize("name", tool.TRAININGS)
def test_each_training_is_accepted_and_its_validation_is_as_short_as_can_be(name: str, tmp_path: Path) -> None:
    (path, *begun), (_, *continued) = (tool._training(name, tmp_path, max_steps=steps) for steps in (1, 2))
    recipe = load_recipe(ROOT / path, begun)
    assert isinstance(recipe, TrainingRecipe)
    assert recipe.cluster.gpus_per_node == 0
    changed = differences(recipe.model_dump(mode="json"), load_recipe(ROOT / path, continued).model_dump(mode="json"))
    assert changed == {}, "the second step continues the same run"
    section, sampling = recipe.validation, recipe.sampling
    assert (section.noise_levels, section.num_frames, sampling.num_inference_steps) == (1, 1, 1)
    passes = sampling.guidance_scale if name == "stage2" else 1 + max(sampling.guidance_scales.in_order)
    assert passes == 1, "no guidance"


def test_the_checks_run_both_pipelines_on_exports_of_the_trainings(tmp_path: Path) -> None:
    animation = tiny_animation_pipeline()
    animation.controlnet.register_to_config(reference_first=True)  # as recipes/stage2.yaml trains it
    for name, pipeline in (("stage1_temporal", tiny_geometry_pipeline()), ("stage2", animation)):
        pipeline.save_pretrained(tmp_path / f"runs/full_{name}/exports/step_00000002")
    sizes = {"width": WIDTH, "height": HEIGHT}
    assert f"normals (1, 4, 3, {HEIGHT}, {WIDTH}), finite" in checks.geometry_pipeline(tmp_path, **sizes)
    assert f"frames (1, 15, 3, {HEIGHT}, {WIDTH}), finite" in checks.animation_pipeline(tmp_path, **sizes)
