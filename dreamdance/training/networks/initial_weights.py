"""Where a run's first weights come from when it continues another run: `init_from` and `init_step` (C6)."""

import logging
from pathlib import Path

import torch

from dreamdance.errors import MissingInputError, RecipeError
from dreamdance.recipe import load_recipe
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runs.layout import RECIPE_FILE, checkpoint_folder, export_folder, final_export
from dreamdance.training.checkpointing.checkpointer import read_average
from dreamdance.training.networks.build import load_networks
from dreamdance.training.objectives.output import Objective

logger = logging.getLogger(__name__)


def load_initial_weights(objective: Objective, recipe: TrainingRecipe, runs: Path) -> None:
    """Loads the averaged weights that `recipe.init_from` names; does nothing where it names none.

    A finished run's come from the export of its last step. With `init_step`, that step's export, else its checkpoint:
    there only trained weights lie, so those that were frozen then are fetched from where that run had them.

    Args:
        objective: changed in place; module weights only, no optimizer state.
        recipe: of the run that starts.
        runs: the folder of all runs.

    Raises:
        MissingInputError: no such run, export or checkpoint, or the run is unfinished and `init_step` not given.
        CheckpointError: what is found is damaged or does not fit.
    """
    if recipe.init_from is None:
        return
    run = runs / recipe.init_from
    if recipe.init_step is None:
        final = final_export(run)
        if final is None:
            state = "is not finished" if run.is_dir() else f"does not exist (looked in {run})"
            raise MissingInputError(
                f"init_from: run '{run.name}' {state}; train it to the end, or give init_step to start from one of its "
                f"checkpoints (in {run / 'checkpoints'})"
            )
        load_networks(objective, final)
        return
    export = export_folder(run, recipe.init_step)
    if export.is_dir():
        load_networks(objective, export)
        return
    checkpoint = checkpoint_folder(run, recipe.init_step)
    if not checkpoint.is_dir():
        raise MissingInputError(
            f"init_step: run '{run.name}' has neither an export nor a checkpoint of step {recipe.init_step}"
        )
    source = load_recipe(run / RECIPE_FILE)
    if not isinstance(source, TrainingRecipe):
        raise RecipeError(f"init_from: run '{run.name}' does not train anything")
    load_initial_weights(objective, source, runs)
    _overlay(objective, checkpoint)


def _overlay(objective: Objective, checkpoint: Path) -> None:
    """Copies a checkpoint's averaged weights over the parameters of the same names."""
    parameters = dict(objective.named_parameters())
    with torch.no_grad():
        for name, value in read_average(checkpoint).items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise RecipeError(f"init_from: this recipe's networks have no {name} of shape {tuple(value.shape)}")
            parameters[name].copy_(value)
    logger.info("loaded averaged weights from %s", checkpoint)
