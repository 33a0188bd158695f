"""Errors of predicted normals and depth against the truth.

Normals are unit vectors in camera space, x right, y up, z towards the camera. Predicted depth is a disparity (near is
large), known up to scale and shift. Errors are measured inside a mask, the body, or over whole
frames.
"""

from dataclasses import dataclass

import numpy as np

from dreamdance.annotators.axes import geometry_consistency
from dreamdance.annotators.protocols import Depths
from dreamdance.media.surfaces import FloatArray, MaskArray, align_disparity, angles, check_shapes

DELTA_THRESHOLD = 1.25
# The consistency without a camera is measured on frames with about this many pixels in all, evenly chosen: memory.
MAX_CONSISTENCY_PIXELS = 2_000_000


@dataclass(frozen=True)
class AngularError:
    """Angles between predicted and true normals, in degrees; NaN if the mask is empty."""

    mean: float
    median: float


@dataclass(frozen=True)
class DepthError:
    """Relative depth errors after alignment; NaN if the mask is empty.

    Attributes:
        abs_rel: mean of |predicted - true| / true depth.
        delta: fraction of pixels for which max(predicted / true, true / predicted) < 1.25.
    """

    abs_rel: float
    delta: float


def angular_error(prediction: FloatArray, truth: FloatArray, mask: MaskArray) -> AngularError:
    """Mean and median angle over all masked pixels of a clip.

    Args:
        prediction, truth: `f H W 3`.
        mask: `f H W`.
    """
    check_shapes(prediction, truth, mask, channels=3)
    if not mask.any():
        return AngularError(float("nan"), float("nan"))
    errors = angles(prediction[mask], truth[mask])
    return AngularError(float(errors.mean()), float(np.median(errors)))


def depth_error(
    prediction: FloatArray,
    truth: FloatArray,
    mask: MaskArray,
    *,
    min_disparity: float,
    fit_mask: MaskArray | None = None,
) -> DepthError:
    """AbsRel and delta < 1.25 of depth inside the mask, after predicted disparity is aligned to true disparity.

    Disparity is aligned as in the evaluation of MiDaS, by one scale and shift for the whole clip, so that flicker
    counts as an error; depth is the inverse. If the fit is over the whole frame, the error includes the body's distance
    from its surroundings; if the fit is inside the mask, the error measures the body's relief alone.

    Args:
        prediction: `f H W` disparity up to scale and shift.
        truth: `f H W` disparity in 1/metre, positive.
        mask: `f H W`, where errors are measured.
        min_disparity: lower limit of the aligned disparity, the scene's farthest point: without it, a prediction near
            zero would give an unlimited depth.
        fit_mask: `f H W`, where scale and shift are fitted; the whole frame by default.

    Raises:
        ValueError: `min_disparity` or a true disparity inside the mask is not positive.
    """
    check_shapes(prediction, truth, mask)
    if min_disparity <= 0:
        raise ValueError(f"min_disparity must be positive, not {min_disparity}")
    if not mask.any():
        return DepthError(float("nan"), float("nan"))
    if np.min(truth[mask]) <= 0:
        raise ValueError("true disparity must be positive inside the mask")
    fitted = np.ones_like(mask) if fit_mask is None else fit_mask
    scale, shift = align_disparity(prediction[fitted], truth[fitted])
    aligned = np.maximum(scale * np.asarray(prediction[mask], dtype=np.float64) + shift, min_disparity)
    true = np.asarray(truth[mask], dtype=np.float64)
    ratio = np.maximum(aligned / true, true / aligned)
    return DepthError(float(np.abs(true / aligned - 1.0).mean()), float((ratio < DELTA_THRESHOLD).mean()))


def disparity_error(prediction: FloatArray, truth: FloatArray) -> float:
    """Mean absolute error of disparity over whole frames, after one scale and shift for the clip.

    For clips whose disparity has no unit: AbsRel of depth does not exist there.

    Args:
        prediction: `f H W` disparity up to scale and shift.
        truth: `f H W` disparity, normalised over the clip to [0, 1].
    """
    scale, shift = align_disparity(prediction, truth)
    return float(np.abs(scale * np.asarray(prediction, dtype=np.float64) + shift - truth).mean())


def parallel_consistency(normals: FloatArray, disparity: FloatArray, mask: MaskArray) -> float:
    """Mean angle in degrees between normals and the normals of disparity, where neither camera nor scale is known.

    The measure of `prepare`'s score `consistency` (`geometry_consistency`): seen in parallel projection, with the
    relief scaled to the normals' steepness. The truth's own value shows how much that costs.

    Args:
        normals: `f H W 3`.
        disparity: `f H W`.
        mask: `f H W`, where it is measured.
    """
    stride = max(1, round(mask.size / MAX_CONSISTENCY_PIXELS))
    depths = Depths(np.asarray(disparity[::stride], dtype=np.float32), kind="disparity")
    return geometry_consistency(normals[::stride], depths, mask[::stride])
