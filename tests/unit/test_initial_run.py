"""A branch that is trained alone keeps what the frozen weights of `init_from` were trained to predict."""

from pathlib import Path

import pytest
import yaml
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe

from dreamdance.errors import RecipeError
from dreamdance.launch.command import BAD_RECIPE, main
from dreamdance.launch.initial_run import require_same_prediction
from dreamdance.recipe import TrainingRecipe
from dreamdance.runs.layout import RECIPE_FILE

ROOT = Path(__file__).parents[2]
OTHER = [
    ({"objective.prediction_type": "v_prediction"}, "objective.prediction_type=sample"),
    ({"objective.zero_terminal_snr": False}, "objective.zero_terminal_snr=true"),
]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The recipe of a run `first`, and one that this version cannot read."""
    for name, content in (
        ("first", tiny_stage1_recipe("domains").model_dump(mode="json")),
        ("of_stage_2", tiny_stage2_recipe().model_dump(mode="json")),
        ("unreadable", ["no recipe"]),
        ("without_objective", {"task": "stage1"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECIPE_FILE).write_text(yaml.safe_dump(content))
    return tmp_path


def refusal(recipe: TrainingRecipe, runs: Path) -> str:
    """The text of the error; empty if the recipe is accepted."""
    try:
        require_same_prediction(recipe, runs)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("branch", ["geometry", "temporal"])
@pytest.mark.parametrize(("changes", "remedy"), OTHER)
def test_another_prediction_or_noise_schedule_is_refused_with_the_word_that_cures_it(runs, branch, changes, remedy):
    """The branch would learn to bend a wrong prediction, and its loss would still fall."""
    text = refusal(tiny_stage1_recipe(branch, {"init_from": "first", **changes}), runs)
    assert "run 'first' (init_from), whose weights stay as they are" in text
    assert text.endswith(f"set {remedy}")


@pytest.mark.parametrize("source", ["first", "unreadable", "without_objective", "nobody", None])
def test_the_same_prediction_and_runs_that_name_none_are_accepted(runs, source):
    assert refusal(tiny_stage1_recipe("geometry", {"init_from": source}), runs) == ""


@pytest.mark.parametrize("changes", [changes for changes, _ in OTHER])
def test_a_training_of_all_weights_may_change_both(runs, changes):
    assert refusal(tiny_stage1_recipe("domains", {"init_from": "first", **changes}), runs) == ""


def test_stage_2_may_change_its_prediction_where_it_trains_all_weights_alone(runs):
    changed = {"init_from": "of_stage_2", "objective.prediction_type": "sample"}
    assert refusal(tiny_stage2_recipe({**changed, "model.unfreeze": "all"}), runs) == ""
    text = refusal(tiny_stage2_recipe({**changed, "model.unfreeze": "none"}), runs)
    assert text.startswith("objective.prediction_type is sample")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_command_refuses_it_before_anything_starts(runs, monkeypatch, capsys, options):
    monkeypatch.chdir(ROOT)
    recipe, word = "recipes/demo/stage1_geometry.yaml", "objective.prediction_type=v_prediction"
    words = [recipe, "init_from=first", word, "--runs", str(runs), "--cluster", "local", *options]
    assert main(words, lambda *_: "") == BAD_RECIPE
    assert "set objective.prediction_type=sample" in capsys.readouterr().err
    assert not (runs / "demo_stage1_geometry").exists()
