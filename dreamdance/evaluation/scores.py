"""The metrics of the table, and the scores of one prediction of one clip."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import metric_disparity
from dreamdance.evaluation import image_metrics
from dreamdance.evaluation.clips import Prediction, Truth
from dreamdance.evaluation.geometry_metrics import angular_error, depth_error
from dreamdance.media.surfaces import consistency_angle


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        key: the name in `table.json`.
        title: the name in `table.md`.
        digits: number of digits after the decimal point.
        higher_is_better: whether a larger value is the better one.
        scientific: whether to print as 1.23e-4.
    """

    key: str
    title: str
    digits: int
    higher_is_better: bool = False
    scientific: bool = False


GEOMETRY_METRICS = (
    Metric("angular_error_mean", "normals: mean angle (deg)", 2),
    Metric("angular_error_median", "median angle (deg)", 2),
    Metric("abs_rel", "depth: AbsRel", 4),
    Metric("delta_1.25", "delta < 1.25", 4, higher_is_better=True),
    Metric("abs_rel_aligned_in_body", "AbsRel of the body's relief", 4),
    Metric("consistency_angle", "normals to depth (deg)", 2),
)
BODY_METRICS = (
    Metric("l1_body", "L1", 4),
    Metric("psnr_body", "PSNR (dB)", 2, higher_is_better=True),
    Metric("ssim_body", "SSIM", 4, higher_is_better=True),
)
FRAME_METRICS = (
    Metric("l1", "L1", 4),
    Metric("psnr", "PSNR (dB)", 2, higher_is_better=True),
    Metric("ssim", "SSIM", 4, higher_is_better=True),
    Metric("l1_disco", "L1 (DisCo)", 2, scientific=True),
    Metric("psnr_disco_overflow", "PSNR (DisCo, overflow)", 2, higher_is_better=True),
    Metric("ssim_disco", "SSIM (DisCo, grey)", 4, higher_is_better=True),
)
METRICS = GEOMETRY_METRICS + BODY_METRICS + FRAME_METRICS

# Scores that the table compares with the best trivial answer.
IMPROVEMENT_KEYS = ("angular_error_mean", "abs_rel", "abs_rel_aligned_in_body", "l1_body", "psnr_body", "l1", "psnr")

Scores = dict[str, float]


def score(prediction: Prediction, truth: Truth) -> Scores:
    """All metrics that can be computed from the prediction and the truth.

    Args:
        prediction: has the same frames and sizes as the truth.
        truth: the truth of one clip.
    """
    return {**_score_frames(prediction, truth), **_score_maps(prediction, truth)}


def _score_frames(prediction: Prediction, truth: Truth) -> Scores:
    frames, true_frames = prediction.frames, truth.pictures.frames
    if frames is None or true_frames is None:
        return {}
    scores = {
        "l1": image_metrics.l1(frames, true_frames),
        "psnr": image_metrics.psnr(frames, true_frames),
        "ssim": image_metrics.ssim(frames, true_frames),
        "l1_disco": image_metrics.l1_disco(as_bytes(frames), as_bytes(true_frames)),
        "psnr_disco_overflow": image_metrics.psnr_disco_overflow(as_bytes(frames), as_bytes(true_frames)),
        "ssim_disco": image_metrics.ssim_disco(as_bytes(frames), as_bytes(true_frames)),
    }
    mask = truth.frame_mask
    if mask is not None:
        scores["l1_body"] = image_metrics.l1(frames, true_frames, mask)
        scores["psnr_body"] = image_metrics.psnr(frames, true_frames, mask)
        scores["ssim_body"] = image_metrics.ssim(frames, true_frames, mask)
    return scores


def _score_maps(prediction: Prediction, truth: Truth) -> Scores:
    scores: Scores = {}
    mask = truth.map_mask
    if mask is None:
        return scores
    if prediction.normals is not None and truth.pictures.normals is not None:
        angle = angular_error(prediction.normals, truth.pictures.normals, mask)
        scores |= {"angular_error_mean": angle.mean, "angular_error_median": angle.median}
    true_disparity, disparity = truth.metric_disparity, prediction.disparity
    if disparity is None or true_disparity is None or truth.depth_range is None:
        return scores
    low, _ = truth.depth_range
    error = depth_error(disparity, true_disparity, mask, min_disparity=low)
    relief = depth_error(disparity, true_disparity, mask, min_disparity=low, fit_mask=mask)
    scores |= {"abs_rel": error.abs_rel, "delta_1.25": error.delta, "abs_rel_aligned_in_body": relief.abs_rel}
    if prediction.normals is not None and truth.camera is not None:
        depth = 1.0 / metric_disparity(disparity.clip(0, 1), truth.depth_range)
        scores["consistency_angle"] = consistency_angle(prediction.normals, depth, mask, truth.camera)
    return scores


def as_bytes(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames in [0, 1] as bytes 0..255, rounded."""
    rounded: NDArray[np.uint8] = np.rint(frames.clip(0, 1) * 255).astype(np.uint8)
    return rounded


def mean_scores(clips: list[Scores]) -> Scores:
    """Mean of each metric over the clips that have it; NaN values are left out."""
    means = {}
    for metric in METRICS:
        values = [scores[metric.key] for scores in clips if metric.key in scores]
        values = [value for value in values if not np.isnan(value)]
        if values:
            means[metric.key] = float(np.mean(values))
    return means
