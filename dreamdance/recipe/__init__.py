"""Typed recipes: one YAML file determines a run. This package does not import torch."""

from dreamdance.recipe.parse import LoadedRecipe, dump_recipe, given_value, load, load_recipe, load_stored_recipe
from dreamdance.recipe.schema import (
    AnimateRecipe,
    EncodeRecipe,
    EvaluateRecipe,
    PrepareRecipe,
    Recipe,
    Stage1Recipe,
    Stage2Recipe,
    TrainingRecipe,
)

__all__ = [
    "AnimateRecipe",
    "EncodeRecipe",
    "EvaluateRecipe",
    "LoadedRecipe",
    "PrepareRecipe",
    "Recipe",
    "Stage1Recipe",
    "Stage2Recipe",
    "TrainingRecipe",
    "dump_recipe",
    "given_value",
    "load",
    "load_recipe",
    "load_stored_recipe",
]
