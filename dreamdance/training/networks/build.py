"""Builds an objective's networks from a recipe, and moves trained weights from one run into the next.

Weights are read from local safetensors only; what is missing is named together with the recipe's key.
"""

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNetSpatioTemporalConditionModel
from torch import nn

from dreamdance.errors import CheckpointError, RecipeError
from dreamdance.models import (
    CrossDomainControllerModel,
    GeometryUNetModel,
    PoseEncoderModel,
    ReferenceUNetModel,
    SpatioTemporalControlNetModel,
)
from dreamdance.models.autoencoding import Autoencoder, downscale_factor
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET, STABLE_VIDEO_DIFFUSION_UNET
from dreamdance.models.channels_last import use_channels_last
from dreamdance.models.image_embedding import embedding_width
from dreamdance.models.temporal_convolution import fold_temporal_convolutions
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe, TrainingData
from dreamdance.training.networks.sources import open_autoencoder, open_image_encoder, open_unet, read_weights
from dreamdance.training.networks.trainability import Objective
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance_kernels import checkpoint_keeping_attention

logger = logging.getLogger(__name__)

_FROZEN_COMPONENTS = ("vae", "image_encoder")


def build_objective(recipe: Stage1Recipe | Stage2Recipe, *, device: str = "cpu") -> Objective:
    """Builds all networks of a training recipe and the objective that holds them.

    What the recipe gives as a path is read; the rest is random, seeded by the recipe alone, the same on every rank.

    Args:
        recipe: of either stage.
        device: where the networks come to lie; `"meta"` builds shapes only, from the published configurations where
            weights are absent.

    Raises:
        MissingInputError: a folder or its weights are not there.
        RecipeError: the networks that the recipe names do not fit together.
    """
    # random weights are drawn on the CPU whatever the device, so that they are the same everywhere
    with torch.random.fork_rng(devices=()), torch.device("meta" if device == "meta" else "cpu"):
        torch.default_generator.manual_seed(recipe.seed)
        objective = _build_stage1(recipe, device) if isinstance(recipe, Stage1Recipe) else _build_stage2(recipe, device)
    objective.to(device)
    fold_temporal_convolutions(objective)
    if recipe.model.channels_last:
        for network in exportable(objective).values():
            use_channels_last(network)
    if recipe.sharding.gradient_checkpointing:
        for network in exportable(objective).values():
            if network._supports_gradient_checkpointing:
                network.enable_gradient_checkpointing(
                    checkpoint_keeping_attention
                    if recipe.sharding.gradient_checkpointing == "keep_attention"
                    else None  # diffusers' own: everything inside a block is computed twice
                )
    return objective


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


def _build_stage1(recipe: Stage1Recipe, device: str) -> GeometryObjective:
    model = recipe.model
    vae = open_autoencoder(model.autoencoder, temporal=False, device=device)
    image_encoder = open_image_encoder(model.image_encoder, huge=False, device=device)
    base = open_unet(model.unet, UNet2DConditionModel, published=STABLE_DIFFUSION_1_5_UNET, device=device)
    _check_fit(base, vae, embedding_width(image_encoder), recipe.data, latent_inputs=1)
    unet = GeometryUNetModel.from_unet2d(
        base,
        geometry_attention=model.geometry_attention,
        temporal_attention=model.temporal_attention,
        max_frames=model.max_frames,
        trained_frames=recipe.data.num_frames if model.temporal_attention else None,
        attention_backend=model.attention_backend,
    )
    pose_encoder = PoseEncoderModel(
        out_channels=base.config.block_out_channels[0],
        channels=tuple(model.pose_channels),
        downscale_factor=downscale_factor(vae),
    )
    return GeometryObjective(
        ReferenceUNetModel.from_unet2d(base),
        unet,
        pose_encoder,
        vae,
        image_encoder,
        step=recipe.train,
        settings=recipe.objective,
    )


def _build_stage2(recipe: Stage2Recipe, device: str) -> AnimationObjective:
    model = recipe.model
    vae = open_autoencoder(model.autoencoder, temporal=True, device=device)
    image_encoder = open_image_encoder(model.image_encoder, huge=True, device=device)
    published = STABLE_VIDEO_DIFFUSION_UNET
    unet = open_unet(model.unet, UNetSpatioTemporalConditionModel, published=published, device=device)
    _check_fit(unet, vae, embedding_width(image_encoder), recipe.data, latent_inputs=2)
    controller = CrossDomainControllerModel(
        controls=model.controls,
        out_channels=unet.config.block_out_channels[0],
        channels=tuple(model.controller_channels),
        head_width=model.controller_head_width,
        downscale_factor=downscale_factor(vae),
        geometry_attention=model.geometry_attention,
        attention_backend=model.attention_backend,
    )
    return AnimationObjective(
        unet,
        SpatioTemporalControlNetModel.from_unet(unet, trained_frames=recipe.data.num_frames),
        controller,
        vae,
        image_encoder,
        settings=recipe.objective,
    )


def _check_fit(unet: ModelMixin, vae: Autoencoder, token_width: int, data: TrainingData, *, latent_inputs: int) -> None:
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
