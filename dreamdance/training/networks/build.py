"""Steps that both stages share when they build networks: seeding, moving to the device, and checks of sizes."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin

from dreamdance.errors import RecipeError
from dreamdance.models.autoencoding import Autoencoder, downscale_factor
from dreamdance.models.channels_last import use_channels_last
from dreamdance.models.equal_rewrites import EQUAL_REWRITES, apply_equal_rewrites
from dreamdance.models.gradient_checkpointing import set_checkpointing_level
from dreamdance.recipe.model_sections import NetworkSource
from dreamdance.recipe.training_sections import Sharding, TrainingData
from dreamdance.training.networks.sources import absent_folder
from dreamdance.training.objectives.output import Objective

_FROZEN_COMPONENTS = ("vae", "image_encoder")


@contextmanager
def seeded_networks(seed: int, device: str) -> Iterator[None]:
    """In the block, random weights depend on `seed` alone; they are equal on every rank and device.

    With `"meta"` networks have shapes only.
    """
    # random weights are drawn on the CPU for every device, so that they are equal everywhere
    with torch.random.fork_rng(devices=()), torch.device("meta" if device == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def prepare_networks(
    objective: Objective,
    sharding: Sharding,
    *,
    channels_last: bool,
    device: str,
    rewrites: Collection[str] = EQUAL_REWRITES,
) -> None:
    """Moves an objective's networks to the device; sets how they compute, their memory format and checkpointing.

    Args:
        objective: changed in place.
        sharding: the recipe's section; its `checkpointing_level` is applied.
        channels_last: the recipe's `model.channels_last`.
        device: `"cpu"`, `"cuda"` or `"meta"`.
        rewrites: see `apply_equal_rewrites`.
    """
    objective.to(device)
    apply_equal_rewrites(objective, rewrites)
    for network in exportable(objective).values():
        if channels_last:
            use_channels_last(network)
        set_checkpointing_level(network, sharding.checkpointing_level)


def exportable(objective: Objective) -> dict[str, ModelMixin]:
    """The networks that training may change, by their names in the pipeline and its export."""
    return {
        name: network
        for name, network in objective.named_children()
        if isinstance(network, ModelMixin) and name not in _FROZEN_COMPONENTS
    }


def check_fit(
    unet: ModelMixin,
    source: NetworkSource,
    vae: Autoencoder,
    token_width: int,
    data: TrainingData,
    *,
    latent_inputs: int,
    further_outputs: int = 0,
) -> None:
    """Checks that channels, widths and picture sizes of a recipe's networks fit together.

    Args:
        unet: the base network.
        source: where it comes from.
        vae: the autoencoder.
        token_width: width of the image encoder's embedding.
        data: the pictures' size.
        latent_inputs: how many latents the UNet reads side by side.
        further_outputs: channels that it predicts beside those of the latents.

    Raises:
        RecipeError: they do not; the text lists every key that must change.
    """
    channels = vae.config.latent_channels
    factor = downscale_factor(vae)
    wanted = {
        "in_channels": channels * latent_inputs,
        "out_channels": channels + further_outputs,
        "cross_attention_dim": token_width,
    }
    problems = [
        f"model.unet.config.{key} is {unet.config[key]}, but the autoencoder and the image encoder need {value}"
        for key, value in wanted.items()
        if unet.config[key] != value
    ]
    if further_outputs and unet.config["out_channels"] != wanted["out_channels"]:
        problems.append("objective.prediction_type=blend needs one output channel more than the latents have")
    problems += [
        f"data.{side} is {pixels}, but the autoencoder needs a multiple of {factor}"
        for side, pixels in (("width", data.width), ("height", data.height))
        if pixels % factor
    ]
    if problems:
        if (folder := absent_folder(source)) is not None:
            problems.append(f"there is no network in '{folder}', so the published one's shape was taken")
        raise RecipeError("; ".join(problems))
