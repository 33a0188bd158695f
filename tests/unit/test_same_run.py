"""The keys of a recipe that may change within a run, and the division of a batch."""

from pathlib import Path

import pytest

from dreamdance.errors import RecipeError
from dreamdance.recipe import load_recipe
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.keys import keys
from dreamdance.recipe.same_run import CHANGEABLE_KEYS, is_changeable, result_json

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"


@pytest.mark.parametrize(
    "word",
    [
        "cluster.tasks_per_node=1",
        "logging.every_steps=1",
        "max_steps=100000",
        "checkpoint.allow_changed=[seed]",
        "data.verify=hash",
    ],
)
def test_a_key_that_may_change_leaves_the_result_of_a_training_the_same(word):
    recipe, changed = load_recipe(DEMO / "stage2.yaml"), load_recipe(DEMO / "stage2.yaml", [word])
    assert changed != recipe
    assert result_json(changed) == result_json(recipe)


@pytest.mark.parametrize("word", ["seed=5", "data.stride=[1, 3]", "checkpoint.keep_last=7", "optimizer.lr=1e-5"])
def test_any_other_key_makes_another_result(word):
    assert result_json(load_recipe(DEMO / "stage2.yaml", [word])) != result_json(load_recipe(DEMO / "stage2.yaml"))


def test_every_changeable_key_is_a_key_or_a_section_of_a_recipe():
    known = {key.path for key in keys()}
    for name in CHANGEABLE_KEYS:
        assert any(path == name or path.startswith(f"{name}.") for path in known), name
        assert is_changeable(name)
    assert is_changeable("cluster.nodes")
    assert not is_changeable("clusters")


def test_a_batch_too_small_for_one_micro_batch_per_process_is_refused():
    with pytest.raises(RecipeError, match=r"batch_size 4 is not micro_batch_size 2 x accumulation x 4 .* fit: 1, 2 "):
        accumulation_steps(4, 2, 4)
    assert accumulation_steps(12, 2, 3) == 2
