"""Dropped conditions of a training sample: the reference (for guidance) and control maps (for robustness).

The key of the sample decides (C8): the outcome does not depend on the batch, the rank or the device.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dreamdance.errors import UserError
from dreamdance.runtime.sample_random import sample_generator

Keys = Sequence[Sequence[int]]


class DroppedConditions(NamedTuple):
    """For each of `b` samples: whether its conditioning latents, and whether its image embedding, become zeros."""

    latents: Tensor
    embedding: Tensor


def drop_references(keys: Keys, probability: float) -> Tensor:
    """Decides for each sample of stage 1 whether its reference is dropped: zero latents and a zero image embedding.

    Args:
        keys: `b` keys (seed, epoch, sample id).
        probability: probability of a drop.

    Returns:
        `b` booleans on the CPU.
    """
    return _draw_uniform(keys, "reference dropout") < probability


def drop_conditions(keys: Keys, *, latents: float, embedding: float, both: float) -> DroppedConditions:
    """Decides what each sample of stage 2 drops of its reference; at most one of three events happens to a sample.

    Args:
        keys: `b` keys.
        latents: probability that the conditioning latents alone are dropped.
        embedding: probability that the image embedding alone is dropped.
        both: probability that both are dropped.

    Returns:
        `b` booleans for each, on the CPU.

    Raises:
        UserError: The probabilities add up to more than 1.
    """
    if latents + embedding + both > 1:
        raise UserError(
            f"objective.latents_dropout, embedding_dropout and both_dropout are {latents}, {embedding} and {both}; "
            "only one of them happens at a time, so their sum must not exceed 1"
        )
    draw = _draw_uniform(keys, "condition dropout")
    only_latents = draw < latents
    only_embedding = (draw >= latents) & (draw < latents + embedding)
    together = (draw >= latents + embedding) & (draw < latents + embedding + both)
    return DroppedConditions(latents=only_latents | together, embedding=only_embedding | together)


def draw_kept_controls(
    keys: Keys, names: Sequence[str], num_frames: int, *, frame_rate: float, modality_rate: float
) -> dict[str, Tensor]:
    """Robust conditioning: decides which control maps become zero images, across frames and modalities.

    A modality is dropped for the whole clip with probability `modality_rate`, and each of its frames with probability
    `frame_rate`, all independently. A clip never loses all of its maps: the function draws such an outcome again, so
    that all other outcomes keep their proportions. A single modality is therefore never dropped for a whole clip.

    Args:
        keys: `b` keys.
        names: the modalities.
        num_frames: f.
        frame_rate: below 1.
        modality_rate: below 1.

    Returns:
        For each modality `b f` booleans on the CPU: whether the map is kept.

    Raises:
        UserError: a rate is 1 or more: every map would be dropped.
    """
    for name, rate in (("frame_control_dropout", frame_rate), ("modality_control_dropout", modality_rate)):
        if not 0 <= rate < 1:
            raise UserError(f"objective.{name} is {rate}; it must be at least 0 and below 1, or no map is left")
    # sorted, so that the order of the recipe's list does not change what is dropped
    names = sorted(names)
    kept = torch.stack([_draw_kept(key, len(names), num_frames, frame_rate, modality_rate) for key in keys], dim=1)
    return dict(zip(names, kept, strict=True))


def blank_controls(maps: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replaces control maps by zero images.

    Args:
        maps: for each modality `b f 3 H W` or `(b f) 3 H W` in [0, 1].
        kept: for each modality `b f` booleans, on the maps' device, see `draw_kept_controls`.

    Returns:
        New maps of the same names and shapes.
    """
    return {name: _blank(frames, kept[name]) for name, frames in maps.items()}


def _draw_kept(
    key: Sequence[int], num_modalities: int, num_frames: int, frame_rate: float, modality_rate: float
) -> Tensor:
    """Returns `m f` booleans, at least one of them true."""
    generator = sample_generator(key, "control dropout")
    while True:
        modalities = torch.rand(num_modalities, 1, generator=generator) >= modality_rate
        frames = torch.rand(num_modalities, num_frames, generator=generator) >= frame_rate
        kept = modalities & frames
        if kept.any():
            return kept


def _blank(maps: Tensor, kept: Tensor) -> Tensor:
    """Zeroes the frames of one modality that are not `kept` (`b f`)."""
    flags = rearrange(kept, "b f -> (b f)").reshape(*maps.shape[:-3], 1, 1, 1)
    return torch.where(flags, maps, torch.zeros_like(maps))


def _draw_uniform(keys: Keys, purpose: str) -> Tensor:
    """Draws one number in [0, 1) per sample."""
    return torch.stack([torch.rand((), generator=sample_generator(key, purpose)) for key in keys])
