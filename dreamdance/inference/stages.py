"""Loads the trained stages that an `animate` recipe names, and checks that they can run with the recipe's settings."""

import hashlib
import json
import logging
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamdance.errors import CheckpointError, MissingInputError, RecipeError
from dreamdance.modalities import MODALITIES
from dreamdance.models.autoencoding import downscale_factor
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.pipelines.sampling import COMPONENTS_MODULE, PIPELINES_MODULE
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.runs.file_notes import noted_states
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.layout import EXPORT_INDEX_FILE, is_export, newest_export

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODE_SUFFIXES = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
COMPONENT_LIBRARIES = ("diffusers", "transformers", COMPONENTS_MODULE)
NUMBER_ENTRIES = ("default_height", "default_width")  # entries of `model_index.json` that are not components
SAFE_LOADING = {"local_files_only": True, "use_safetensors": True}  # a pickled file of weights could run any code


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


def find_export(
    name: str, run_folder: Path, pipeline_class: type[AnimationPipeline | GeometryPipeline], *, key: str
) -> Path:
    """The folder of an export: `name` itself if it is one, else the newest export of the run of that name.

    Raises:
        MissingInputError: there is neither.
        CheckpointError: the export is damaged, names foreign code, or contains pickled weights.
        RecipeError: the export is of the other stage.
    """
    folder = Path(name)
    if not is_export(folder):
        try:
            folder = newest_export(run_folder.parent / name)
        except MissingInputError as error:
            raise MissingInputError(f"{key}: {error}") from error
    try:
        index = json.loads((folder / EXPORT_INDEX_FILE).read_text(encoding="utf-8"))
        found = str(index["_class_name"]).removeprefix(f"{PIPELINES_MODULE}.")  # older exports have only the class name
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{key}: {folder / EXPORT_INDEX_FILE} is damaged ({error!r}); export that run again"
        ) from error
    if found != pipeline_class.__name__:
        raise RecipeError(f"{key}: {folder} is an export of {found}, but {pipeline_class.__name__} is needed here")
    check_components(folder, index, key=key)
    return folder


def check_components(folder: Path, index: dict[str, Any], *, key: str) -> None:
    """Refuses an export that contains code: diffusers imports any module that the index names for a component.

    Raises:
        CheckpointError: the export is refused; the error names the component or the file.
    """
    for component, named in index.items():
        if component.startswith("_") or named == [None, None]:
            continue
        if component in NUMBER_ENTRIES and (named is None or isinstance(named, int)):
            continue
        if not isinstance(named, list) or len(named) != 2 or named[0] not in COMPONENT_LIBRARIES:
            raise CheckpointError(
                f"{key}: {folder / EXPORT_INDEX_FILE} takes '{component}' from {named!r}; only components of "
                f"{', '.join(COMPONENT_LIBRARIES)} are loaded"
            )
    foreign = sorted(path for path in folder.rglob("*") if path.suffix in CODE_SUFFIXES)
    if foreign:
        raise CheckpointError(
            f"{key}: {foreign[0]} could run any code; an export has only .json and .safetensors files, remove this one"
        )


def read_export(folder: Path, known: Mapping[Path, FileState]) -> dict[Path, FileState]:
    """The states of an export's files, by absolute path; a file whose known state is still valid is not read again."""
    files = sorted(path.absolute() for path in folder.rglob("*") if path.is_file())
    states = {path: read_state(path, known.get(path)) for path in files}
    return {path: state for path, state in states.items() if state is not None}


def hash_export(folder: Path, states: Mapping[Path, FileState]) -> str:
    """One sha256 over the names and contents of an export's files."""
    listing = [f"{path.relative_to(folder.absolute()).as_posix()} {state.sha256}" for path, state in states.items()]
    return hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()


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
