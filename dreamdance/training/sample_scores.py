"""How far samples of held-out clips are from the truth, and clips with the reference of another person."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.media.transforms import decode_normals

# Squared errors are taken to be at least this, so that equal frames have 100 dB.
_SMALLEST_SQUARE = 1e-10


def sample_scores(batch: ClipBatch, predictions: Mapping[str, Tensor]) -> dict[str, float]:
    """Distances of predictions from the clips' own maps, over all clips and frames.

    Args:
        batch: the truth.
        predictions: by name, `b f c H W` in [0,1], normals as pictures.

    Returns:
        By name: `l1_rgb` and `l1_depth`, mean absolute differences in [0,1]; `psnr_rgb` in decibel, the mean over
        frames; `normal_degrees`, the mean angle between normals, or `normal_degrees_body` where the clips have masks,
        inside of these.
    """
    scores = {}
    for name in ("rgb", "depth"):
        if name in predictions and name in batch.maps:
            difference = predictions[name].double().cpu() - batch.maps[name].double().cpu()
            scores[f"l1_{name}"] = float(difference.abs().mean())
            if name == "rgb":
                squares = difference.square().mean(dim=(-3, -2, -1)).clamp(min=_SMALLEST_SQUARE)
                scores["psnr_rgb"] = float((-10 * squares.log10()).mean())
    if "normal" in predictions and "normal" in batch.maps:
        found, true = (decode_normals(maps["normal"].double().cpu()) for maps in (predictions, batch.maps))
        crossed = torch.linalg.cross(found, true, dim=-3).square().sum(dim=-3).sqrt()
        degrees = torch.rad2deg(torch.atan2(crossed, (found * true).sum(dim=-3)))
        mask = batch.maps.get("mask")
        inside = torch.ones_like(degrees) if mask is None else mask[..., 0, :, :].double().cpu()
        if inside.any():
            name = "normal_degrees" if mask is None else "normal_degrees_body"
            scores[name] = float((degrees * inside).sum() / inside.sum())
    return scores


def other_references(batch: ClipBatch, count: int, *, reference_first: bool = False) -> ClipBatch | None:
    """The first clips, each with the reference of the next clip of another video; None if all are of one video.

    Clips of one video, whose ids differ in their last two parts alone (`<video>.<split>.<number>`), show one person.

    Args:
        batch: the clips.
        count: how many clips to take.
        reference_first: whether frame 0 of the maps is the reference's own; then it changes too.
    """
    videos = [name.rsplit(".", 2)[0] for name in batch.clip_ids]
    pairs = []
    for clip in range(min(count, len(videos))):
        following = [*range(clip + 1, len(videos)), *range(clip)]
        pairs += [(clip, other) for other in following if videos[other] != videos[clip]][:1]
    if not pairs:
        return None
    clips, others = (list(column) for column in zip(*pairs, strict=True))
    maps = {name: frames[clips] for name, frames in batch.maps.items()}
    if reference_first:
        maps = {name: torch.cat([batch.maps[name][others, :1], frames[:, 1:]], dim=1) for name, frames in maps.items()}
    return replace(
        batch,
        maps=maps,
        reference=batch.reference[others],
        fps=batch.fps[clips],
        keys=batch.keys[clips],
        clip_ids=[f"{batch.clip_ids[clip]}\nreference of {batch.clip_ids[other]}" for clip, other in pairs],
    )
