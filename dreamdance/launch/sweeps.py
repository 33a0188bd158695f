"""Loads the recipe of a command line, once for each combination of swept values."""

import re
from collections.abc import Sequence

from dreamdance.errors import RecipeError
from dreamdance.recipe import LoadedRecipe, given_value, load
from dreamdance.recipe.overrides import split_choices


def load_all(words: Sequence[str], sweeps: Sequence[str], cluster: str, *, usage: str) -> list[LoadedRecipe]:
    """The recipe with the command line's changes, once for each combination of swept values.

    Args:
        words: the recipe's file and the changes.
        sweeps: `key=v1,v2` for each swept key.
        cluster: the option `--cluster`.
        usage: shown with an error.

    Raises:
        RecipeError: a recipe, a change or a sweep is wrong.
    """
    file, *overrides = words
    if "=" in file:
        raise RecipeError(f"the first word is the recipe's file, not '{file}'\nusage: {usage}")
    if cluster == "debug":  # one process, with a GPU if the recipe uses GPUs
        gpus = given_value(file, overrides, "cluster.gpus_per_node")
        overrides += ["cluster.nodes=1", "cluster.tasks_per_node=1", "cluster.array=1"]
        overrides += ["cluster.gpus_per_node=1"] if isinstance(gpus, int) and gpus > 1 else []
    combinations: list[list[str]] = [[]]
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise RecipeError(f"--sweep expects key=v1,v2, not '{sweep}'")
        choices = [f"{key}={value}" for value in split_choices(values)]
        combinations = [[*chosen, choice] for chosen in combinations for choice in choices]
    loaded = [load(file, [*overrides, *chosen]) for chosen in combinations]
    if not sweeps:
        return loaded
    names = [_sweep_name(one.recipe.name, chosen) for one, chosen in zip(loaded, combinations, strict=True)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        alike = [" ".join(chosen) for name, chosen in zip(names, combinations, strict=True) if name == twice]
        raise RecipeError(
            f"--sweep: {' and '.join(alike)} would have the same name '{twice}'; run them separately, each with name="
        )
    return [load(file, [*overrides, *chosen, f"name={name}"]) for name, chosen in zip(names, combinations, strict=True)]


def _sweep_name(name: str, chosen: Sequence[str]) -> str:
    """The recipe's name with the chosen values; `1e-4` gives `1e_4`, `-1` gives `minus_1`."""
    for choice in chosen:
        key, _, value = choice.partition("=")
        value = re.sub(r"(?<![a-z0-9.])-(?=[0-9.])", "minus_", value.lower())
        name += f"_{key.rpartition('.')[2]}_{value}"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
