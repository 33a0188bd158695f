"""Loads the first weights of a run from another run: the keys `init_from` and `init_step` (C6)."""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from dreamdance.errors import CheckpointError, MissingInputError, RecipeError
from dreamdance.models import GeometryUNetModel
from dreamdance.recipe import TrainingRecipe, load_stored_recipe
from dreamdance.runs.layout import RECIPE_FILE, checkpoint_folder, export_folder, final_export
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.networks.build import exportable
from dreamdance.training.networks.sources import read_weights
from dreamdance.training.objectives.output import Objective

logger = logging.getLogger(__name__)


def load_initial_weights(objective: Objective, runs: Path, *, init_from: str | None, init_step: int | None) -> None:
    """Loads the averaged weights of the run that `init_from` names; does nothing where it is None.

    The weights of a finished run come from the export of its last step. With `init_step` they come from that step's
    export, else from its checkpoint. A checkpoint holds trained weights only; the frozen ones come from the run that
    the recipe beside the checkpoint names in its own `init_from`, or stay as they were built.

    Args:
        objective: changed in place; module weights only, no optimizer state.
        runs: the folder of all runs.
        init_from: the recipe's key: the run to start from.
        init_step: the recipe's key: a step of that run; None for its last one.

    Raises:
        MissingInputError: no such run, export or checkpoint, or the run is unfinished and `init_step` is not given.
        CheckpointError: the export or the checkpoint is damaged or does not fit.
        RecipeError: the run does not train, or a shape in its checkpoint does not fit this recipe.
    """
    if init_from is None:
        return
    run = runs / init_from
    if init_step is None:
        final = final_export(run)
        if final is None:
            state = "is not finished" if run.is_dir() else f"does not exist (looked in {run})"
            raise MissingInputError(
                f"init_from: run '{run.name}' {state}; train it to the end, or give init_step to start from one of its "
                f"checkpoints (in {run / 'checkpoints'})"
            )
        load_networks(objective, final)
        return
    export = export_folder(run, init_step)
    if export.is_dir():
        load_networks(objective, export)
        return
    checkpoint = checkpoint_folder(run, init_step)
    if not checkpoint.is_dir():
        raise MissingInputError(
            f"init_step: run '{run.name}' has neither an export nor a checkpoint of step {init_step}"
        )
    source = load_stored_recipe(run / RECIPE_FILE)
    if not isinstance(source, TrainingRecipe):
        raise RecipeError(f"init_from: run '{run.name}' does not train anything")
    load_initial_weights(objective, runs, init_from=source.init_from, init_step=source.init_step)
    _overlay(objective, checkpoint)


def load_networks(objective: Objective, export: Path) -> None:
    """Loads the trained networks of another run's export, network by network.

    A whole geometry or temporal branch may be missing, because the earlier run had not added it yet; the branch keeps
    its zero-initialised start. Any other missing or unknown parameter is an error.

    Args:
        objective: built for this run; changed in place.
        export: a folder in the diffusers layout, one subfolder per network.

    Raises:
        MissingInputError: the export lacks a network.
        CheckpointError: names or shapes of parameters do not fit.
    """
    for name, network in exportable(objective).items():
        weights = read_weights(export / name, key="init_from")
        expected = network.state_dict()
        missing = expected.keys() - weights.keys() - _new_branches(network, weights.keys())
        unexpected = weights.keys() - expected.keys()
        reshaped = {key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape}
        problems = [
            f"{kind} {_name_some(keys)}"
            for kind, keys in (("lacks", missing), ("has unknown", unexpected), ("has another shape of", reshaped))
            if keys
        ]
        if problems:
            raise CheckpointError(
                f"the {name} of {export} does not fit this recipe's: it {'; it '.join(problems)}. Give `model` the "
                "values that the run in init_from had; only geometry_attention and temporal_attention may be newly on"
            )
        network.load_state_dict(weights, strict=False)
        added = len(expected) - len(weights)
        logger.info("loaded %s from %s%s", name, export, f", {added} tensors are new" if added else "")


def _overlay(objective: Objective, checkpoint: Path) -> None:
    """Copies a checkpoint's averaged weights over the parameters of the same names."""
    parameters = dict(objective.named_parameters())
    with torch.no_grad():
        for name, value in read_checkpoint_weights(checkpoint).items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise RecipeError(f"init_from: this recipe's networks have no {name} of shape {tuple(value.shape)}")
            parameters[name].copy_(value)
    logger.info("loaded averaged weights from %s", checkpoint)


def _new_branches(network: nn.Module, present: Collection[str]) -> set[str]:
    """Names of all parameters in newly added branches of `network`: branches without any name in `present`."""
    if not isinstance(network, GeometryUNetModel):
        return set()
    branches = (network.geometry_parameters().keys(), network.temporal_parameters().keys())
    return {name for branch in branches if branch.isdisjoint(present) for name in branch}


def _name_some(keys: Collection[str], limit: int = 5) -> str:
    """The first few names, and the number of the others."""
    shown = ", ".join(sorted(keys)[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"
