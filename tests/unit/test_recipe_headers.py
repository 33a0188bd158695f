"""Numbers in the header of a recipe equal those of the recipe."""

import re
from pathlib import Path

import pytest
from support.step_budgets import budgets

from dreamdance.recipe import TrainingRecipe, load_recipe
from dreamdance.runtime.gpus import GPUS
from dreamdance.training.planning.checkpointing_level import choose_level
from dreamdance.training.planning.duration import step_seconds
from dreamdance.training.planning.plan import GIB, GPU_RESERVE_GIB

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
TRAINING = [path for path in RECIPES if "max_steps:" in path.read_text(encoding="utf-8")]
# The second set, stage1_*_v, costs what the first does; its headers refer to it.
FULL = [path for path in TRAINING if path.parent.name == "recipes" and not path.stem.endswith("_v")]


HOURS = re.compile(
    r"about ([\d.]+) hours of computing on \d+ (\w+) \(the estimate of --dry-run; not measured\), "
    r"([\d.]+) hours on \d+ (\w+), the paper's GPU; with tf32: true ([\d.]+) and ([\d.]+)\."
)


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
        assert HOURS.search(header(path)), name_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_memory_and_hours_of_a_full_recipes_header_and_its_row_of_the_table_are_the_plans(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without weights: the published shapes
    recipe = load_recipe(path)
    assert isinstance(recipe, TrainingRecipe)
    (stated,) = numbers(r"about (\d+) GiB per GPU", header(path))
    (memory,) = numbers(r"GPUs of (\d+) GB", header(path))
    chosen = choose_level(recipe, 0.99 * memory)  # what such a GPU reports, in GiB
    level = re.search(r"auto \(the default\) takes (\w+) ", header(path))
    assert level is not None
    assert level[1] == chosen.recipe.sharding.checkpointing_level
    plan = chosen.plan
    assert plan is not None
    wanted = plan.total_bytes / GIB + GPU_RESERVE_GIB
    assert wanted <= stated + 0.5
    assert wanted == pytest.approx(stated, abs=1.0)
    ((hours, name, more_hours, other, *with_tf32),) = HOURS.findall(header(path))
    for tf32, stated_hours in ((False, (hours, more_hours)), (True, with_tf32)):
        for gpu, value in zip((name, other), stated_hours, strict=True):
            step = step_seconds(recipe.model_copy(update={"tf32": tf32}), plan.cost, GPUS[gpu])
            assert recipe.max_steps * step.total / 3600 == pytest.approx(float(value), rel=0.06)
    # The plan counts what tools/step_budgets.csv has for this form of the step; see test_step_budgets.py.
    problems = list(budgets.differences(budgets.numbers(plan.cost), budgets.row_of(path.stem, "pictures")))
    assert not problems, f"{problems}; if that is meant, run tools/step_budgets.py {path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_runs_that_a_header_names_are_runs_of_other_recipes(path: Path) -> None:
    names = {load_recipe(other).name for other in RECIPES}
    for name in re.findall(r"[Ss]tarts from (\w+_\w+)", header(path)):
        assert name in names
        assert name == getattr(load_recipe(path), "init_from", None)
