"""The metrics of the table, and the scores of one prediction of one clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import metric_disparity
from dreamdance.evaluation import image_metrics
from dreamdance.evaluation.clips import Prediction, Truth
from dreamdance.evaluation.geometry_metrics import (
    angular_error,
    depth_error,
    disparity_error,
    parallel_consistency,
)
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
        is_relative: whether 1 is the best value, being the truth's own.
        is_pooled: whether means are over the frames of all clips, as in DisCo's code, and not over clips.
    """

    key: str
    title: str
    digits: int
    higher_is_better: bool = False
    scientific: bool = False
    is_relative: bool = False
    is_pooled: bool = False

    @property
    def arrow(self) -> str:
        """Where better values are."""
        if self.is_relative:
            return "→ 1"
        return "↑" if self.higher_is_better else "↓"


GEOMETRY_METRICS = (
    Metric("angular_error_mean", "normals: mean angle (deg)", 2),
    Metric("angular_error_median", "median angle (deg)", 2),
    Metric("abs_rel", "depth: AbsRel", 4),
    Metric("delta_1.25", "delta < 1.25", 4, higher_is_better=True),
    Metric("abs_rel_aligned_in_body", "AbsRel of the body's relief", 4),
    Metric("consistency_angle", "normals to depth (deg)", 2),
    Metric("consistency_parallel", "normals to depth, camera unknown (deg)", 2),
)
# Where the clips have no body mask.
WHOLE_GEOMETRY_METRICS = (
    Metric("angular_error_mean_frame", "normals: mean angle (deg)", 2),
    Metric("angular_error_median_frame", "median angle (deg)", 2),
    Metric("abs_rel_frame", "depth: AbsRel", 4),
    Metric("disparity_l1_frame", "disparity: L1", 4),
    Metric("consistency_parallel_frame", "normals to depth, camera unknown (deg)", 2),
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
    Metric("lpips_alex", "LPIPS (AlexNet)", 4),
    Metric("lpips_vgg", "LPIPS (VGG16)", 4),
    Metric("grain", "detail of the background, relative", 3, is_relative=True),
    Metric("grain_distance", "mean distance of a clip's detail from 1", 3),
)
VIDEO_METRICS = (
    Metric("fvd", "FVD", 1),
    Metric("fid_vid", "FID-VID", 2),
)
TEMPORAL_METRICS = (
    Metric("flicker", "flicker where the truth stands still (of 255)", 3),
    Metric("colour_drift", "colour drift (of 255)", 2),
    Metric("seam_ratio", "change at the windows' seams, relative", 3, is_relative=True),
)
DISCO_METRICS = (
    Metric("l1_disco", "L1 (DisCo)", 2, scientific=True, is_pooled=True),
    Metric("psnr_disco", "PSNR (DisCo, repaired)", 2, higher_is_better=True, is_pooled=True),
    Metric("psnr_disco_overflow", "PSNR (DisCo, overflow)", 2, higher_is_better=True, is_pooled=True),
    Metric("ssim_disco", "SSIM (DisCo, grey)", 4, higher_is_better=True, is_pooled=True),
    Metric("lpips_disco", "LPIPS (DisCo)", 4, is_pooled=True),
    Metric("fvd_disco", "FVD (DisCo)", 1),
    Metric("fid_vid_disco", "FID-VID (DisCo)", 2),
)
GIF_METRICS = (
    Metric("fvd_disco_gif", "FVD (DisCo, GIF)", 1),
    Metric("fid_vid_disco_gif", "FID-VID (DisCo, GIF)", 2),
)
# The tables, in order. Numbers of different protocols never share one.
TABLES = {
    "Geometry inside the body": GEOMETRY_METRICS,
    "Geometry of whole frames": WHOLE_GEOMETRY_METRICS,
    "Frames inside the body": BODY_METRICS,
    "Whole frames": FRAME_METRICS,
    "Videos": VIDEO_METRICS,
    "Over time": TEMPORAL_METRICS,
    "DisCo's protocol: bytes at 256x256, over the frames of all clips": DISCO_METRICS,
    "DisCo's protocol through GIFs": GIF_METRICS,
}
METRICS = tuple(metric for metrics in TABLES.values() for metric in metrics)
# Scores of the truth itself that say something: its others are perfect.
TRUTH_KEYS = ("consistency_angle", "consistency_parallel", "consistency_parallel_frame", "flicker", "colour_drift")

# Scores that the table compares with the best trivial answer.
IMPROVEMENT_KEYS = (
    "angular_error_mean",
    "abs_rel",
    "abs_rel_aligned_in_body",
    "l1_body",
    "psnr_body",
    "l1",
    "psnr",
    "lpips_alex",
    "lpips_vgg",
)

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
    masks = {"": None} if truth.frame_mask is None else {"": None, "_body": truth.frame_mask}
    similarities = image_metrics.ssim_inside(frames, true_frames, list(masks.values()))
    scores = {}
    for (suffix, mask), similarity in zip(masks.items(), similarities, strict=True):
        scores[f"l1{suffix}"] = image_metrics.l1(frames, true_frames, mask)
        scores[f"psnr{suffix}"] = image_metrics.psnr(frames, true_frames, mask)
        scores[f"ssim{suffix}"] = similarity
    scores["grain"] = image_metrics.grain(frames, true_frames, truth.frame_mask)
    scores["grain_distance"] = abs(scores["grain"] - 1)
    return scores


def score_disco(frames: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Scores:
    """The metrics of DisCo's protocol that need no network, of bytes `f 256 256 3`."""
    return {
        "l1_disco": image_metrics.l1_disco(frames, truth),
        "psnr_disco": image_metrics.psnr_disco(frames, truth),
        "psnr_disco_overflow": image_metrics.psnr_disco_overflow(frames, truth),
        "ssim_disco": image_metrics.ssim_disco(frames, truth),
    }


def _score_maps(prediction: Prediction, truth: Truth) -> Scores:
    """Inside the body; over whole frames, under other names, if the clip has no mask of it."""
    scores: Scores = {}
    some = prediction.disparity if prediction.normals is None else prediction.normals
    if some is None:
        return scores
    suffix = "_frame" if truth.map_mask is None else ""
    mask = np.ones(some.shape[:3], dtype=np.bool_) if truth.map_mask is None else truth.map_mask
    if prediction.normals is not None and truth.pictures.normals is not None:
        angle = angular_error(prediction.normals, truth.pictures.normals, mask)
        scores |= {f"angular_error_mean{suffix}": angle.mean, f"angular_error_median{suffix}": angle.median}
    scores |= _score_depth(prediction, truth, mask)
    if prediction.normals is not None and prediction.disparity is not None and "consistency_angle" not in scores:
        scores[f"consistency_parallel{suffix}"] = parallel_consistency(prediction.normals, prediction.disparity, mask)
    return scores


def _score_depth(prediction: Prediction, truth: Truth, mask: NDArray[np.bool_]) -> Scores:
    disparity, true_disparity, scores = prediction.disparity, truth.pictures.disparity, Scores()
    if disparity is None or true_disparity is None:
        return scores
    metric, is_whole = truth.metric_disparity, truth.map_mask is None
    if metric is None or truth.depth_range is None:
        if is_whole:
            scores["disparity_l1_frame"] = disparity_error(disparity, true_disparity)
        return scores
    low, _ = truth.depth_range
    error = depth_error(disparity, metric, mask, min_disparity=low)
    if is_whole:
        return {"abs_rel_frame": error.abs_rel}
    relief = depth_error(disparity, metric, mask, min_disparity=low, fit_mask=mask)
    scores |= {"abs_rel": error.abs_rel, "delta_1.25": error.delta, "abs_rel_aligned_in_body": relief.abs_rel}
    if prediction.normals is not None and truth.camera is not None:
        depth = 1.0 / metric_disparity(disparity.clip(0, 1), truth.depth_range)
        scores["consistency_angle"] = consistency_angle(prediction.normals, depth, mask, truth.camera)
    return scores


def as_bytes(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames in [0, 1] as bytes 0..255, rounded."""
    rounded: NDArray[np.uint8] = np.rint(frames.clip(0, 1) * 255).astype(np.uint8)
    return rounded


def mean_scores(clips: Sequence[Scores], num_frames: Sequence[int] | None = None) -> Scores:
    """Mean of each metric over the clips that have it; NaN values are left out.

    Args:
        clips: the scores of each clip.
        num_frames: numbers of their frames, the weights of pooled metrics; equal ones by default.
    """
    weights = num_frames or [1] * len(clips)
    means = {}
    for metric in METRICS:
        found = [
            (scores[metric.key], weight if metric.is_pooled else 1)
            for scores, weight in zip(clips, weights, strict=True)
            if not np.isnan(scores.get(metric.key, np.nan))
        ]
        if found:
            values, of_each = zip(*found, strict=True)
            means[metric.key] = float(np.average(values, weights=of_each))
    return means
