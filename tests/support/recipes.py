"""Small recipes of the real schema, small batches of rendered dancers, and helpers for networks, for all tests."""

import json
from dataclasses import replace
from typing import Any, TypeVar

import torch
from einops import rearrange, repeat
from torch import nn

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS, DancerClip, render_clip
from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.shards.columns import encode_disparity
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import encode_normals, pictures_to_tensor
from dreamdance.recipe import rules
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe

WIDTH, HEIGHT = 16, 24
PATCH_SIZE = 2
LATENT_CHANNELS = 3 * PATCH_SIZE**2
EMBEDDING_WIDTH = 24


Checked = TypeVar("Checked", Stage1Recipe, Stage2Recipe)


def tiny_stage1_recipe(train: str = "domains", changes: dict[str, Any] | None = None) -> Stage1Recipe:
    """A recipe of one step of stage 1: 16x24 pixels, patches of 2, a UNet of two levels.

    Args:
        train: image, domains, geometry or temporal.
        changes: dotted keys and their values, e.g. `{"data.num_frames": 6}`.
    """
    is_joint = train in ("geometry", "temporal")
    recipe = {
        **_shared(num_frames=4 if is_joint else 1),
        "task": "stage1",
        "name": f"tiny_stage1_{train}",
        "train": train,
        "model": {
            "unet": {"config": tiny_unet_config()},
            "autoencoder": {"patch_size": PATCH_SIZE},
            "image_encoder": {"stand_in_width": EMBEDDING_WIDTH},
            "pose_channels": [8, 16],
            "geometry_attention": is_joint,
            "temporal_attention": train == "temporal",
            "max_frames": 16,
        },
        "objective": {"prediction_type": "sample", "zero_terminal_snr": True},
        "sampling": {"num_inference_steps": 4, "window_frames": 4, "window_overlap": 1},
    }
    return _checked(Stage1Recipe, recipe, changes)


def tiny_stage2_recipe(changes: dict[str, Any] | None = None) -> Stage2Recipe:
    """A recipe of stage 2: 4 frames of 16x24 pixels, patches of 2, an SVD UNet of two levels, all weights trained."""
    recipe = {
        **_shared(num_frames=4),
        "task": "stage2",
        "name": "tiny_stage2",
        "model": {
            "unet": {"config": tiny_svd_config()},
            "autoencoder": {"patch_size": PATCH_SIZE},
            "image_encoder": {"stand_in_width": EMBEDDING_WIDTH},
            "controller_channels": [8, 16],
            "controller_head_width": 16,
            "unfreeze": "all",
        },
        "objective": {
            "geometry_width": WIDTH // 2,
            "geometry_height": HEIGHT // 2,
            "reference_first": False,
            "fps": "clip",
        },
        "sampling": {"num_inference_steps": 4, "window_frames": 4, "window_overlap": 1},
    }
    return _checked(Stage2Recipe, recipe, changes)


def tiny_unet_config() -> dict[str, Any]:
    """Constructor arguments of a `UNet2DConditionModel` of two levels, attention at the lower one."""
    return {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": EMBEDDING_WIDTH,
        "attention_head_dim": 2,
    }


def tiny_svd_config() -> dict[str, Any]:
    """Constructor arguments of a `UNetSpatioTemporalConditionModel` of two levels, attention at the lower one."""
    return {
        "in_channels": 2 * LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"],
        "up_block_types": ["CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"],
        "block_out_channels": [32, 64],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
        "cross_attention_dim": EMBEDDING_WIDTH,
        "num_attention_heads": [2, 4],
        "num_frames": 4,
    }


def tiny_clip_batch(
    *,
    num_clips: int = 2,
    num_frames: int = 4,
    width: int = WIDTH,
    height: int = HEIGHT,
    held_out: bool = False,
    first_id: int = 0,
) -> ClipBatch:
    """Rendered dancers in a batch like those of the loader; the reference is the last frame of each clip.

    Args:
        num_clips: number of clips b.
        num_frames: number of frames f.
        width: width in pixels.
        height: height in pixels.
        held_out: takes identities and motions that training never shows.
        first_id: sample id of the first clip; it determines the person and the key (0, 0, id).
    """
    seeds = HELD_OUT_SEEDS if held_out else TRAINING_SEEDS
    ids = range(first_id, first_id + num_clips)
    clips = [render_clip(seeds[index], num_frames=num_frames, width=width, height=height) for index in ids]
    rgb = torch.stack([pictures_to_tensor(clip.rgb) for clip in clips])
    return ClipBatch(
        maps={
            "rgb": rgb,
            "pose": torch.stack([_pose(clip, width, height) for clip in clips]),
            "normal": torch.stack([_normal(clip) for clip in clips]),
            "depth": torch.stack([_disparity(clip) for clip in clips]),
            "mask": torch.stack(
                [repeat(torch.from_numpy(clip.mask).float(), "f h w -> f c h w", c=3) for clip in clips]
            ),
        },
        reference=rgb[:, -1],
        fps=torch.full((num_clips,), 8.0),
        keys=torch.tensor([[0, 0, index] for index in ids]),
        clip_ids=[f"clip_{index}" for index in ids],
    )


def without(batch: ClipBatch, *names: str) -> ClipBatch:
    """The same batch without some maps."""
    return replace(batch, maps={name: frames for name, frames in batch.maps.items() if name not in names})


def select_clips(batch: ClipBatch, *indices: int) -> ClipBatch:
    """The batch of the clips with the given indices."""
    return batch.select(indices)


def perturb(network: nn.Module) -> Any:
    """Adds a little noise to every weight, so that no branch outputs zero; returns the network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def record_inputs(network: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A list to which every later call of the network appends its positional and named arguments."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    network.register_forward_pre_hook(lambda module, *arguments: calls.append(arguments), with_kwargs=True)
    return calls


def _pose(clip: DancerClip, width: int, height: int) -> torch.Tensor:
    return pictures_to_tensor(draw_poses(clip.keypoints, width=width, height=height))


def _normal(clip: DancerClip) -> torch.Tensor:
    return encode_normals(rearrange(torch.from_numpy(clip.normal), "f h w c -> f c h w"))


def _disparity(clip: DancerClip) -> torch.Tensor:
    disparity, _ = encode_disparity(clip.depth)
    return repeat(pictures_to_tensor(disparity[..., None]), "f 1 h w -> f c h w", c=3)


def _shared(*, num_frames: int) -> dict[str, Any]:
    return {
        "max_steps": 4,
        "batch_size": 2,
        "micro_batch_size": 2,
        "precision": "fp32",
        "data": {
            "train": {"local": "shards/train"},
            "validation": {"local": "shards/validation"},
            "width": WIDTH,
            "height": HEIGHT,
            "num_frames": num_frames,
        },
        "optimizer": {"lr": 1e-3},
        "sharding": {"gradient_checkpointing": False},
        "validation": {"noise_levels": 2},
    }


def _checked(recipe_class: type[Checked], values: dict[str, Any], changes: dict[str, Any] | None) -> Checked:
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        place: Any = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    # as JSON, like the parser: strict validation of JSON accepts a list for a tuple
    recipe = recipe_class.model_validate_json(json.dumps(values))
    problems = rules.problems(recipe)
    assert not problems, problems
    return recipe
