"""Recipes of both stages with real, small, random autoencoders in a folder; they have a latent distribution."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe, tiny_svd_config, tiny_unet_config

WIDTH, HEIGHT = 32, 48
BLOCKS = 4


def save_autoencoder(folder: Path, *, temporal: bool) -> None:
    """Saves an autoencoder of the published depth, in which a latent pixel covers 8x8 pixels."""
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (32,) * BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * BLOCKS,
        "latent_channels": 4,
    }
    if temporal:
        AutoencoderKLTemporalDecoder(**shape).save_pretrained(folder)
    else:
        AutoencoderKL(**shape, up_block_types=("UpDecoderBlock2D",) * BLOCKS).save_pretrained(folder)


def recipe_with_autoencoder(
    folder: Path, *, temporal: bool, train: str = "geometry", changes: dict[str, Any] | None = None
) -> Stage1Recipe | Stage2Recipe:
    """A recipe of 32x48 pixels that reads the autoencoder saved in `folder`; `temporal` is stage 2, else `train`."""
    shared = {"model.autoencoder": {"path": str(folder)}, "data.width": WIDTH, "data.height": HEIGHT, **(changes or {})}
    if temporal:
        unet = {**tiny_svd_config(), "in_channels": 8, "out_channels": 4}
        sizes = {"objective.geometry_width": WIDTH // 2, "objective.geometry_height": HEIGHT // 2}
        more = {"model.unet": {"config": unet}, "model.controller_channels": [8, 8, 8, 16], **sizes}
        return tiny_stage2_recipe({**more, **shared})
    unet = {**tiny_unet_config(), "in_channels": 4, "out_channels": 4}
    more = {"model.unet": {"config": unet}, "model.pose_channels": [8, 8, 8, 16]}
    return tiny_stage1_recipe(train, {**more, **shared})
