"""Scores of single frames of a clip, for curves over time.

The scores of the table are their means, but for SSIM and colour drift.
"""

import numpy as np

from dreamdance.evaluation import image_metrics
from dreamdance.evaluation.clips import Prediction, Truth
from dreamdance.evaluation.geometry_metrics import angular_error
from dreamdance.evaluation.temporal_metrics import colour_drift_curve
from dreamdance.media.surfaces import align_disparity

# Key of a curve -> its title; a curve inside the body is absent without masks.
CURVES = {
    "l1_body": "L1 inside the body",
    "l1": "L1 of the whole frame",
    "angular_error_mean": "normals: angle inside the body (deg)",
    "abs_rel": "depth: AbsRel inside the body",
    "colour_drift": "colour drift from the first frame (of 255)",
}


def frame_curves(prediction: Prediction, truth: Truth) -> dict[str, list[float]]:
    """For each of `CURVES` that can be computed, a value for each frame; NaN where the frame has no body.

    Args:
        prediction: has the same frames and sizes as the truth.
        truth: the truth of one clip, or of some frames of it.
    """
    curves: dict[str, list[float]] = {}
    frames, true_frames = prediction.frames, truth.pictures.frames
    if frames is not None and true_frames is not None:
        numbers = [slice(number, number + 1) for number in range(len(true_frames))]
        if truth.frame_mask is not None:
            mask = truth.frame_mask
            curves["l1_body"] = [image_metrics.l1(frames[one], true_frames[one], mask[one]) for one in numbers]
        curves["l1"] = [image_metrics.l1(frames[one], true_frames[one]) for one in numbers]
        curves["colour_drift"] = colour_drift_curve(frames).tolist()
    normals, true_normals = prediction.normals, truth.pictures.normals
    if truth.map_mask is None or normals is None or true_normals is None:
        return curves
    numbers = [slice(number, number + 1) for number in range(len(true_normals))]
    curves["angular_error_mean"] = [
        angular_error(normals[one], true_normals[one], truth.map_mask[one]).mean for one in numbers
    ]
    if (errors := _relative_depth_errors(prediction, truth)) is not None:
        curves["abs_rel"] = errors
    return curves


def truth_curves(truth: Truth) -> dict[str, list[float]]:
    """The curves of the truth itself that say something: its others are perfect."""
    return {"colour_drift": colour_drift_curve(truth.pictures.given_frames).tolist()}


def _relative_depth_errors(prediction: Prediction, truth: Truth) -> list[float] | None:
    """AbsRel of each frame, after one alignment of the whole clip as in `geometry_metrics.depth_error`."""
    disparity, true, depth_range = prediction.disparity, truth.metric_disparity, truth.depth_range
    masks = truth.map_mask
    if disparity is None or true is None or depth_range is None or masks is None:
        return None
    scale, shift = align_disparity(disparity.ravel(), true.ravel())
    aligned = np.maximum(scale * disparity.astype(np.float64) + shift, depth_range[0])
    errors = np.abs(true / aligned - 1.0)
    return [
        float(error[mask].mean()) if mask.any() else float("nan") for error, mask in zip(errors, masks, strict=True)
    ]
