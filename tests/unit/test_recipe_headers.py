"""Numbers in the header of a recipe equal those of the recipe."""

import re
from pathlib import Path

import pytest

from dreamdance.recipe import TrainingRecipe, load_recipe
from dreamdance.training.planning.plan import GIB, GPU_RESERVE_GIB, make_plan
from dreamdance.training.stages.training_stage import stage_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TRAINING = [path for path in RECIPES if "max_steps:" in path.read_text(encoding="utf-8")]
FULL = [path for path in TRAINING if path.parent.name == "recipes"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def header(path: Path) -> str:
    """The comment at the beginning of a recipe, as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def numbers(pattern: str, text: str) -> set[int]:
    return {int(found.replace(",", "")) for found in re.findall(pattern, text)}


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_numbers_of_steps_batches_and_sizes_in_headers_are_true(path: Path) -> None:
    recipe, text = load_recipe(path), header(path)
    assert isinstance(recipe, TrainingRecipe)
    assert numbers(r"Expect: (\d[\d,]*) steps\b", text) <= {recipe.max_steps}
    assert numbers(r"steps of (\d[\d,]*) ", text) <= {recipe.batch_size}
    assert numbers(r"(?:clips|windows) of (\d+) frames", text) <= {recipe.data.num_frames}
    sizes = {(int(width), int(height)) for width, height in re.findall(r"at (\d+)x(\d+)", text)}
    assert sizes <= {(recipe.data.width, recipe.data.height)}
    gpus = recipe.cluster.nodes * recipe.cluster.gpus_per_node
    assert numbers(r"on (\d+) GPUs", text) <= {gpus}
    assert numbers(r"on (\d+) CPU processes", text) <= {recipe.cluster.world_size}
    assert not ("single frames" in text and recipe.data.num_frames > 1)


def test_headers_contain_such_numbers() -> None:
    """Otherwise the test above would check nothing."""
    for path in FULL:
        assert re.search(r"[\d,]+ steps of \d+ .*at \d+x\d+ on \d+ GPUs", header(path)), name_of(path)
        assert re.search(r"about \d+ GiB per GPU", header(path)), name_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_the_memory_in_a_full_recipes_header_is_the_plans(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without weights: the published shapes
    recipe = load_recipe(path)
    assert isinstance(recipe, TrainingRecipe)
    (stated,) = numbers(r"about (\d+) GiB per GPU", header(path))
    wanted = make_plan(stage_of(recipe)).total_bytes / GIB + GPU_RESERVE_GIB
    assert wanted <= stated + 0.5
    assert wanted == pytest.approx(stated, abs=1.0)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_runs_that_a_header_names_are_runs_of_other_recipes(path: Path) -> None:
    names = {load_recipe(other).name for other in RECIPES}
    for name in re.findall(r"[Ss]tarts from (\w+_\w+)", header(path)):
        assert name in names
        assert name == getattr(load_recipe(path), "init_from", None)
