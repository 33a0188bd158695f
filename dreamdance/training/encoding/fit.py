"""Whether stored latents are those that a training would compute itself: same shards, networks and pictures."""

import hashlib
import json
import logging

from torch import nn

from dreamdance.data.shards.cache import open_index
from dreamdance.data.shards.generated_maps import MapSettings
from dreamdance.data.shards.latents import LatentSettings, source_digest
from dreamdance.errors import UserError
from dreamdance.modalities import DOMAINS
from dreamdance.models.autoencoding import Autoencoder, downscale_factor
from dreamdance.models.image_embedding import ImageEncoder, Resizing
from dreamdance.recipe.schema import EncodeRecipe, Stage2Recipe, TrainingRecipe
from dreamdance.training.objectives.output import Objective

logger = logging.getLogger(__name__)

COMMAND = "python launchers/slurm.py recipes/encode.yaml"
MAPS_COMMAND = "python launchers/slurm.py recipes/encode_maps.yaml"


def resizing_of(recipe: TrainingRecipe | EncodeRecipe) -> Resizing:
    """How the image encoder of a stage sees pictures."""
    is_video = recipe.stage == "stage2" if isinstance(recipe, EncodeRecipe) else isinstance(recipe, Stage2Recipe)
    return "svd" if is_video else "clip"


def autoencoder_digest(vae: Autoencoder) -> str:
    """A hash of what decides an autoencoder's latents: its encoder's weights, its factor and scaling conventions.

    The decoder is left out: that of Stable Video Diffusion was trained on the encoder of Stable Diffusion.
    """
    parts = [part for part in (getattr(vae, "encoder", None), getattr(vae, "quant_conv", None)) if part is not None]
    conventions = {
        "factor": downscale_factor(vae),
        "channels": vae.config.latent_channels,
        "scaling_factor": vae.config.scaling_factor,
        "layers": [_layers(part) for part in parts],
    }
    return _digest(conventions, *parts)


def _layers(network: nn.Module) -> str:
    """The layers as torch prints them; a class of ours that computes the same (`equal_rewrites`) as its base class."""
    text = str(network)
    for kind in {type(module) for module in network.modules()}:
        own = next(base for base in kind.__mro__ if not base.__module__.startswith("dreamdance."))
        text = text.replace(f"{kind.__name__}(", f"{own.__name__}(")
    return text


def image_encoder_digest(image_encoder: ImageEncoder, *, resizing: Resizing) -> str:
    """A hash of an image encoder's weights, and of how it is shown pictures."""
    return _digest({"resizing": resizing, "layers": str(image_encoder)}, image_encoder)


def _digest(conventions: dict[str, object], *networks: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps(conventions, sort_keys=True).encode())
    for number, network in enumerate(networks):
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{number} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def require_fitting_latents(recipe: TrainingRecipe, objective: Objective) -> None:
    """Checks that the recipe's `data.latents`, if it names any, may replace what the objective would encode.

    Raises:
        UserError: they may not; the text lists every difference with the keys to change.
        ShardError: the folder is missing or contains no latents.
    """
    data = recipe.data
    if data.latents is None:
        return
    found = LatentSettings.of_index(open_index(data.latents))
    vae = autoencoder_digest(objective.vae)
    image_encoder = image_encoder_digest(objective.image_encoder, resizing=resizing_of(recipe))
    source = source_digest(open_index(data.train))
    compared = [
        ("the shards data.train.local", found.source, source),
        ("the network model.autoencoder", found.autoencoder, vae),
        ("the network model.image_encoder", found.image_encoder, image_encoder),
        ("data.width", found.width, data.width),
        ("data.height", found.height, data.height),
    ]
    problems = [f"{name} is {now}, the latents are of {then}" for name, then, now in compared if then != now]
    if data.flip_probability > 0 and not found.flip:
        problems.append(
            f"data.flip_probability is {data.flip_probability:g}, the latents are of pictures that are not mirrored "
            "(encode with `flip: true`, or set data.flip_probability to 0)"
        )
    if isinstance(recipe, Stage2Recipe) and recipe.objective.reference_first and not found.reference_moments:
        problems.append(
            "objective.reference_first is true, the latents of references were stored without standard deviations, by "
            "an earlier version or for stage 1 (encode again with `stage: stage2`, or set it to false)"
        )
    wanted = ("rgb",) if isinstance(recipe, Stage2Recipe) else DOMAINS
    if missing := [name for name in wanted if name not in found.domains]:
        problems.append(f"this stage denoises {', '.join(wanted)}, the latents lack {', '.join(missing)} (`domains`)")
    if problems:
        raise UserError(
            f"data.latents.local '{data.latents.local}' does not fit this recipe: {'; '.join(problems)}. Encode into "
            f"another folder ({COMMAND} output=...), or leave data.latents out to encode while training"
        )


def require_fitting_maps(recipe: TrainingRecipe) -> None:
    """Checks that the recipe's `data.maps`, if it names any, are maps of its training clips at stage 1's size.

    Raises:
        UserError: they are not; the text lists every difference with the keys to change.
        ShardError: the folder is missing or contains no generated maps.
    """
    data = recipe.data
    if data.maps is None or not isinstance(recipe, Stage2Recipe):
        return
    found = MapSettings.of_index(open_index(data.maps))
    compared = [
        ("the shards data.train.local", found.source, source_digest(open_index(data.train))),
        ("objective.geometry_width", found.width, recipe.objective.geometry_width),
        ("objective.geometry_height", found.height, recipe.objective.geometry_height),
    ]
    problems = [f"{name} is {now}, the maps are of {then}" for name, then, now in compared if then != now]
    if problems:
        raise UserError(
            f"data.maps.local '{data.maps.local}' does not fit this recipe: {'; '.join(problems)}. Make the maps in "
            f"another folder ({MAPS_COMMAND} output=...), or leave data.maps out to train on true maps"
        )
    logger.info("training on the maps of the stage 1 whose export has the sha256 %s", found.geometry)
