"""The shipped recipes: all load, names are unique, headers are complete, ablations change one thing."""

import functools
import re
from pathlib import Path

import pytest

from dreamdance.recipe import Stage1Recipe, Stage2Recipe, TrainingRecipe, dump_recipe, load_recipe
from dreamdance.recipe.parse import TASKS, flatten

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
SECOND_SET = sorted(path.stem for path in RECIPES.glob("*_v.yaml"))
FULL = sorted({path.stem for path in RECIPES.glob("*.yaml")} - set(SECOND_SET))


@functools.cache
def by_name():
    return {recipe.name: recipe for recipe in map(load_recipe, FILES)}


def relative(path):
    return str(path.relative_to(RECIPES))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_recipe_loads_and_reads_back_the_same(path, tmp_path):
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_recipe_begins_with_its_purpose_its_launch_line_and_the_expected_result(path):
    header = "\n".join(line for line in path.read_text(encoding="utf-8").split("task:")[0].splitlines())
    assert header.startswith("# ")
    assert f"python launchers/slurm.py recipes/{relative(path)}" in header
    assert "Expect" in header


def test_names_are_unique_over_all_recipes():
    names = [load_recipe(path).name for path in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_demo_names_and_only_they_begin_with_demo(path):
    assert load_recipe(path).name.startswith("demo_") == (path.parent.name == "demo")


@pytest.mark.parametrize("name", FULL)
def test_every_recipe_at_full_size_has_a_demo_of_the_same_task(name):
    full, demo = load_recipe(RECIPES / f"{name}.yaml"), load_recipe(RECIPES / "demo" / f"{name}.yaml")
    assert type(full) is type(demo)
    assert full.name == name


def test_every_task_has_a_recipe_at_full_size():
    assert {by_name()[name].task for name in FULL} == TASKS.keys()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_recipe_starts_from_a_run_that_another_recipe_makes(path):
    recipe = load_recipe(path)
    names = by_name()
    for key in ("init_from", "geometry_from", "animation_from"):
        name = getattr(recipe, key, None)
        if name is not None:
            assert isinstance(names[name], TrainingRecipe)
            assert name.startswith("demo_") == recipe.name.startswith("demo_")


def test_a_run_that_starts_from_another_has_its_networks():
    recipes = by_name()
    for recipe in recipes.values():
        if isinstance(recipe, Stage1Recipe | Stage2Recipe) and recipe.init_from:
            before = recipes[recipe.init_from].model.model_dump(exclude={"geometry_attention", "temporal_attention"})
            assert recipe.model.model_dump(exclude={"geometry_attention", "temporal_attention"}) == before


def test_the_full_recipes_have_the_papers_sizes():
    stage1 = [load_recipe(RECIPES / f"stage1_{step}.yaml") for step in ("domains", "geometry", "temporal")]
    stage2 = load_recipe(RECIPES / "stage2.yaml")
    assert {(recipe.data.width, recipe.data.height) for recipe in stage1} == {(256, 384)}
    assert (stage2.data.width, stage2.data.height, stage2.data.num_frames) == (512, 768, 16)
    assert (stage2.max_steps, stage2.batch_size, stage2.cluster.world_size) == (50_000, 8, 8)
    assert stage2.model.unfreeze == "none"
    assert [recipe.optimizer.lr for recipe in (*stage1, stage2)] == [1e-5, 5e-5, 1e-4, 1e-5]


@pytest.mark.parametrize(
    ("ablation", "full", "changed"),
    [
        ("stage2_pose", "stage2", {"name", "model.controls"}),
        ("stage2_pose_depth", "stage2", {"name", "model.controls"}),
        ("stage2_pose_normal", "stage2", {"name", "model.controls"}),
        ("stage2_controller_without_geometry", "stage2", {"name", "model.geometry_attention"}),
        (
            "stage1_temporal_without_geometry",
            "stage1_temporal",
            {"name", "init_from", "model.geometry_attention"},
        ),
    ],
)
def test_an_ablation_differs_from_the_full_recipe_only_in_the_ablated_part(ablation, full, changed):
    with_part = flatten(load_recipe(RECIPES / f"{full}.yaml").model_dump(mode="json"))
    without = flatten(load_recipe(RECIPES / "ablations" / f"{ablation}.yaml").model_dump(mode="json"))
    assert {key for key in with_part if with_part[key] != without[key]} == changed


def test_the_second_set_differs_from_the_first_in_its_noise_and_weights_alone():
    assert SECOND_SET == ["stage1_domains_v", "stage1_geometry_v", "stage1_temporal_v"]
    noise = {
        "objective.prediction_type": "v_prediction",
        "objective.zero_terminal_snr": True,
        "objective.noise_offset": 0.05,
        "objective.min_snr_gamma": 5.0,
    }
    for name in SECOND_SET:
        first = flatten(load_recipe(RECIPES / f"{name.removesuffix('_v')}.yaml").model_dump(mode="json"))
        second = flatten(load_recipe(RECIPES / f"{name}.yaml").model_dump(mode="json"))
        names = {"name": name} | ({"init_from": f"{first['init_from']}_v"} if first["init_from"] else {})
        assert {key: second[key] for key in second if second[key] != first.get(key)} == noise | names


def test_every_ablation_is_compared_with_its_full_recipe():
    assert len(list((RECIPES / "ablations").glob("*.yaml"))) == 5


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_lines_of_a_recipe_fit_on_a_screen(path):
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


def test_recipes_keep_to_plain_values():
    for path in FILES:
        assert not re.search(r"\$\{|!!|&\w|<<:", path.read_text(encoding="utf-8"))
