"""Weights of face and hands in a loss, at the latents' size."""

import torch
from torch import Tensor

from dreamdance.media.keypoint_regions import REGIONS
from dreamdance.recipe.objective_sections import RegionWeights


def region_weights(boxes: Tensor, settings: RegionWeights, *, height: int, width: int) -> Tensor:
    """A weight for each place of the latents: 1 outside of all regions, `settings` within, then a mean of 1 per clip.

    A place that a box covers in part has that part of the additional weight, times the confidence of the box. Where two
    regions overlap, the larger weight counts. Makes no copies between devices.

    Args:
        boxes: `b f 3 5`, see `ClipBatch.regions`.
        settings: the recipe's `objective.region_weights`.
        height, width: size of the latents.

    Returns:
        `b f height width`, float32, of mean 1 in each clip.
    """
    left, top, right, bottom, confidence = boxes.unbind(dim=-1)
    covered = _coverage(top, bottom, height)[..., :, None] * _coverage(left, right, width)[..., None, :]
    covered = covered * confidence.clamp(min=0)[..., None, None]
    raised = [(getattr(settings, key) - 1) * covered[:, :, number] for number, (key, _) in enumerate(REGIONS)]
    weights = 1 + torch.stack(raised).amax(dim=0)
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def _coverage(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The part of each of `count` equal cells of [0, 1] that lies between two numbers; `...` to `... count`."""
    edges = torch.arange(count + 1, device=low.device) / count
    return (torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])).clamp(min=0) * count
