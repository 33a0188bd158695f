"""What both stages do to the networks that they build, and how a run takes over the networks of an export."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from dreamdance.errors import CheckpointError, RecipeError
from dreamdance.models import GeometryUNetModel
from dreamdance.models.autoencoding import Autoencoder, downscale_factor
from dreamdance.models.channels_last import use_channels_last
from dreamdance.models.temporal_convolution import fold_temporal_convolutions
from dreamdance.recipe.training_sections import Sharding, TrainingData
from dreamdance.training.networks.sources import read_weights
from dreamdance.training.objectives.output import Objective
from dreamdance_kernels import checkpoint_keeping_attention

logger = logging.getLogger(__name__)

_FROZEN_COMPONENTS = ("vae", "image_encoder")


@contextmanager
def seeded_networks(seed: int, device: str) -> Iterator[None]:
    """Within, random weights come from `seed` alone, the same on every rank and device; `"meta"` makes shapes only."""
    # random weights are drawn on the CPU whatever the device, so that they are the same everywhere
    with torch.random.fork_rng(devices=()), torch.device("meta" if device == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def prepare_networks(objective: Objective, sharding: Sharding, *, channels_last: bool, device: str) -> None:
    """Moves an objective's networks to the device, and sets how they compute and what they keep for the backward pass.

    Args:
        objective: changed in place.
        sharding: the recipe's section; its `gradient_checkpointing` is applied.
        channels_last: the recipe's `model.channels_last`.
        device: `"cpu"`, `"cuda"` or `"meta"`.
    """
    objective.to(device)
    fold_temporal_convolutions(objective)
    for network in exportable(objective).values():
        if channels_last:
            use_channels_last(network)
        if sharding.gradient_checkpointing and network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing(
                checkpoint_keeping_attention
                if sharding.gradient_checkpointing == "keep_attention"
                else None  # diffusers' own: everything inside a block is computed twice
            )


def exportable(objective: Objective) -> dict[str, ModelMixin]:
    """The networks that training may change, by the name which they have in the pipeline and its export."""
    return {
        name: network
        for name, network in objective.named_children()
        if isinstance(network, ModelMixin) and name not in _FROZEN_COMPONENTS
    }


def load_networks(objective: Objective, export: Path) -> None:
    """Loads the trained networks of another run's export, network by network.

    Parameters of the geometry and temporal branches may be missing, all of a branch at once: the run before had not
    added them yet, and they stay at their zero-initialised start. Anything else missing or left over is an error.

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
                "values which the run in init_from had; only geometry_attention and temporal_attention may be newly on"
            )
        network.load_state_dict(weights, strict=False)
        added = len(expected) - len(weights)
        logger.info("loaded %s from %s%s", name, export, f", {added} tensors are new" if added else "")


def check_fit(unet: ModelMixin, vae: Autoencoder, token_width: int, data: TrainingData, *, latent_inputs: int) -> None:
    """Raises where channels, widths and picture sizes of a recipe's networks do not fit together."""
    channels = vae.config.latent_channels
    factor = downscale_factor(vae)
    wanted = {
        "in_channels": channels * latent_inputs,
        "out_channels": channels,
        "cross_attention_dim": token_width,
    }
    problems = [
        f"model.unet.config.{key} is {unet.config[key]}, but the autoencoder and the image encoder need {value}"
        for key, value in wanted.items()
        if unet.config[key] != value
    ]
    problems += [
        f"data.{side} is {pixels}, but the autoencoder needs a multiple of {factor}"
        for side, pixels in (("width", data.width), ("height", data.height))
        if pixels % factor
    ]
    if problems:
        raise RecipeError("; ".join(problems))


def _new_branches(network: nn.Module, present: Collection[str]) -> set[str]:
    """Names of the whole branches of `network` of which `present` has nothing: newly added ones."""
    if not isinstance(network, GeometryUNetModel):
        return set()
    branches = (network.geometry_parameters().keys(), network.temporal_parameters().keys())
    return {name for branch in branches if branch.isdisjoint(present) for name in branch}


def _name_some(keys: Collection[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(sorted(keys)[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"
