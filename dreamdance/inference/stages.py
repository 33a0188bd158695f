"""Loads the trained stages that an `animate` recipe names, and checks that they can run with the recipe's settings."""

import logging
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dreamdance.errors import RecipeError
from dreamdance.modalities import MODALITIES
from dreamdance.models.autoencoding import downscale_factor
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.runs.exports import SAFE_LOADING, find_export, hash_export, read_export
from dreamdance.runs.file_notes import noted_states
from dreamdance.runs.file_states import FileState

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Stages:
    """The loaded pipelines, on this rank's device.

    Attributes:
        geometry: stage 1, or None if the recipe names none.
        animation: stage 2.
        weights: stage -> sha256 over the files of its export.
        files: the state of each file of the exports, by path.
        exports: stage -> folder of its export.
    """

    geometry: GeometryPipeline | None
    animation: AnimationPipeline
    weights: dict[str, str]
    files: dict[Path, FileState]
    exports: dict[str, str]


def load_stages(recipe: AnimateRecipe, run_folder: Path, device: torch.device) -> Stages:
    """Loads the newest exports of the runs that the recipe names, or the exports whose folders it names.

    Raises:
        MissingInputError: there is no such export.
        RecipeError: an export is of the other stage, stage 2 needs maps of stage 1 but the recipe names no stage 1, or
            sizes or windows do not fit the networks.
    """
    dtype = PRECISIONS[recipe.precision]
    exports = {"animation": find_export(recipe.animation_from, run_folder, AnimationPipeline, key="animation_from")}
    if recipe.geometry_from is not None:
        exports["geometry"] = find_export(recipe.geometry_from, run_folder, GeometryPipeline, key="geometry_from")
    animation = AnimationPipeline.from_pretrained(exports["animation"], torch_dtype=dtype, **SAFE_LOADING).to(device)
    animation.set_progress_bar_config(disable=True)
    geometry = None
    if recipe.geometry_from is not None:
        geometry = GeometryPipeline.from_pretrained(exports["geometry"], torch_dtype=dtype, **SAFE_LOADING).to(device)
        geometry.set_progress_bar_config(disable=True)
    if problems := list(_incompatible_settings(recipe, animation, geometry)):
        raise RecipeError("\n".join(problems))
    for text in _risky_settings(recipe, animation, geometry):
        logger.warning("%s", text)
    known = noted_states(run_folder)
    states = {stage: read_export(folder, known) for stage, folder in exports.items()}
    weights = {stage: hash_export(exports[stage], found) for stage, found in states.items()}
    for stage, folder in exports.items():
        logger.info("%s: %s in %s on %s", stage, folder, recipe.precision, device)
    named = {stage: str(folder) for stage, folder in exports.items()}
    return Stages(geometry, animation, weights, dict(ChainMap(*states.values())), named)


def before_each_computation(stages: Stages, call: Callable[[], None]) -> None:
    """Registers `call` to run before each forward pass of a network and of its direct parts.

    The duration of such a pass does not depend on the length of the clip; the duration of a denoising step does.
    """
    pipelines = [stages.animation, *([stages.geometry] if stages.geometry is not None else [])]
    networks = [part for pipeline in pipelines for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for network in networks:
        for part in (network, *network.children()):  # the encoder and decoder of an autoencoder are called directly
            part.register_forward_pre_hook(lambda *_: call())


def _incompatible_settings(
    recipe: AnimateRecipe, animation: AnimationPipeline, geometry: GeometryPipeline | None
) -> Iterator[str]:
    """Yields an error text for each setting with which the networks cannot run; each names the key to change."""
    sides = {"width": animation, "height": animation, "geometry_width": geometry, "geometry_height": geometry}
    for key, pipeline in sides.items():
        if pipeline is None:
            continue
        factor, size = downscale_factor(pipeline.vae), getattr(recipe, key)
        if size % factor:
            yield f"{key} {size} must be a multiple of {factor}, the autoencoder's factor"
    if foreign := [name for name in recipe.animation.control_scales if name not in animation.controls]:
        yield (
            f"animation.control_scales names {', '.join(foreign)}, but animation_from {recipe.animation_from} was "
            f"trained to read {', '.join(animation.controls)}"
        )
    if animation.reference_first and recipe.animation.window_overlap >= recipe.animation.window_frames - 1:
        yield (
            f"animation.window_overlap {recipe.animation.window_overlap} must be below animation.window_frames "
            f"{recipe.animation.window_frames} - 1: animation_from {recipe.animation_from} was trained with the "
            "reference as the first frame of each window (objective.reference_first)"
        )
    if geometry is None:
        if any(MODALITIES[name].domain for name in animation.controls):
            yield (
                f"animation_from {recipe.animation_from} was trained to read {', '.join(animation.controls)}: give "
                "geometry_from, the run or export of stage 1 that makes normal and depth maps"
            )
        return
    network = geometry.unet.config
    if network.temporal_attention and recipe.geometry.window_frames > network.max_frames:
        yield (
            f"geometry.window_frames {recipe.geometry.window_frames} is more than the {network.max_frames} frames "
            "(model.max_frames of its recipe) that stage 1's temporal attention has positions for"
        )
    elif network.trained_frames is not None and recipe.geometry.window_frames > network.trained_frames:
        yield (
            f"geometry.window_frames {recipe.geometry.window_frames} is more than the {network.trained_frames} frames "
            "(data.num_frames of its recipe) that stage 1's temporal attention was trained on: further positions are "
            f"untrained; set geometry.window_frames to {network.trained_frames} or less"
        )


def _risky_settings(
    recipe: AnimateRecipe, animation: AnimationPipeline, geometry: GeometryPipeline | None
) -> Iterator[str]:
    """Yields a warning for each setting with which the result may be bad; each names the key to change."""
    if problem := animation.describe_untrained(recipe.animation.window_frames):
        yield f"animation.{problem}"
    networks = {"animation": animation.controlnet.config}
    if geometry is not None and geometry.unet.config.temporal_attention:
        networks["geometry"] = geometry.unet.config
    for stage, network in networks.items():
        if network.trained_frames is None:
            yield (
                f"{stage}_from: this export is older and does not record on how many frames it was trained: make sure "
                f"that {stage}.window_frames {getattr(recipe, stage).window_frames} is at most data.num_frames of its "
                "training recipe"
            )
