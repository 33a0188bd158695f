"""Compares a recipe with that of the run that `init_from` names, before anything starts."""

from pathlib import Path

from dreamdance.errors import RecipeError
from dreamdance.recipe import Recipe, TrainingRecipe
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from dreamdance.recipe.yaml_text import read_yaml
from dreamdance.runs.layout import RECIPE_FILE

# Of `objective`: what frozen weights were trained for.
PREDICTION_KEYS = {"prediction_type", "zero_terminal_snr"}


def require_same_prediction(recipe: Recipe, runs: Path) -> None:
    """Refuses to build on frozen weights that were trained for another prediction or another noise schedule.

    A training of all weights may change both; one of a branch alone cannot.

    Args:
        recipe: the run's.
        runs: the folder of all runs.

    Raises:
        RecipeError: the run that `init_from` names differs in `objective.prediction_type` or in
            `objective.zero_terminal_snr`, and this one leaves its weights as they are.
    """
    if not isinstance(recipe, TrainingRecipe) or recipe.init_from is None or _trains_all(recipe):
        return
    stored = runs / recipe.init_from / RECIPE_FILE
    if not stored.is_file():
        return
    values = read_yaml(stored.read_text(encoding="utf-8")).value
    trained = values.get("objective") if isinstance(values, dict) else None
    if not isinstance(trained, dict):
        return
    own = recipe.model_dump(include={"objective"})["objective"]
    for name in sorted(PREDICTION_KEYS & own.keys()):
        given, before = (str(value).lower() for value in (own[name], trained.get(name, own[name])))
        if given != before:
            raise RecipeError(
                f"objective.{name} is {given}, but run '{recipe.init_from}' (init_from), whose weights stay as they "
                f"are, was trained with {before}: set objective.{name}={before}"
            )


def _trains_all(recipe: TrainingRecipe) -> bool:
    if isinstance(recipe, Stage2Recipe):
        return recipe.model.unfreeze == "all"
    return not isinstance(recipe, Stage1Recipe) or recipe.train in ("image", "domains")
