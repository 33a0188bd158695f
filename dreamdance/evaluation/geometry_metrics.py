"""Errors of predicted normals and depth against the truth, and how well both predictions agree with each other.

Normals are unit vectors in camera space, x right, y up, z towards the camera. Predicted depth is a disparity (near is
large), known up to scale and shift. All errors are measured inside a mask, the body.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
MaskArray = NDArray[np.bool_]

DELTA_THRESHOLD = 1.25


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


@dataclass(frozen=True)
class PinholeCamera:
    """Intrinsics in pixels of their frame; pixel centres have whole-number coordinates."""

    focal_x: float
    focal_y: float
    centre_x: float
    centre_y: float

    def resized(self, from_size: tuple[int, int], to_size: tuple[int, int]) -> "PinholeCamera":
        """The same camera for frames that were resized from one (height, width) to another."""
        down, right = to_size[0] / from_size[0], to_size[1] / from_size[1]
        return PinholeCamera(
            self.focal_x * right,
            self.focal_y * down,
            (self.centre_x + 0.5) * right - 0.5,
            (self.centre_y + 0.5) * down - 0.5,
        )


def _as_float64(values: FloatArray) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def angles(first: FloatArray, second: FloatArray) -> NDArray[np.float64]:
    """Angles in degrees between vectors `... 3` of any length; accurate for nearly parallel ones, unlike arccos."""
    a, b = _as_float64(first), _as_float64(second)
    cross = np.linalg.norm(np.cross(a, b), axis=-1)
    angles: NDArray[np.float64] = np.degrees(np.arctan2(cross, (a * b).sum(axis=-1)))
    return angles


def angular_error(prediction: FloatArray, truth: FloatArray, mask: MaskArray) -> AngularError:
    """Mean and median angle over all masked pixels of a clip.

    Args:
        prediction, truth: `f H W 3`.
        mask: `f H W`.
    """
    _check_shapes(prediction, truth, mask, channels=3)
    if not mask.any():
        return AngularError(float("nan"), float("nan"))
    errors = angles(prediction[mask], truth[mask])
    return AngularError(float(errors.mean()), float(np.median(errors)))


def align_disparity(prediction: FloatArray, truth: FloatArray) -> tuple[float, float]:
    """Scale and shift that bring predicted disparity closest to true disparity, by least squares.

    Args:
        prediction, truth: flat arrays of the pixels to fit. For a constant prediction, the scale is 0 and the shift is
            the truth's mean.
    """
    p, t = _as_float64(prediction), _as_float64(truth)
    centred = p - p.mean()
    variance = (centred**2).mean()
    if variance <= np.finfo(np.float64).eps * max(1.0, float((p**2).mean())):
        return 0.0, float(t.mean())
    scale = float((centred * (t - t.mean())).mean() / variance)
    return scale, float(t.mean() - scale * p.mean())


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
    _check_shapes(prediction, truth, mask)
    if min_disparity <= 0:
        raise ValueError(f"min_disparity must be positive, not {min_disparity}")
    if not mask.any():
        return DepthError(float("nan"), float("nan"))
    if np.min(truth[mask]) <= 0:
        raise ValueError("true disparity must be positive inside the mask")
    fitted = np.ones_like(mask) if fit_mask is None else fit_mask
    scale, shift = align_disparity(prediction[fitted], truth[fitted])
    aligned = np.maximum(scale * _as_float64(prediction[mask]) + shift, min_disparity)
    true = _as_float64(truth[mask])
    ratio = np.maximum(aligned / true, true / aligned)
    return DepthError(float(np.abs(true / aligned - 1.0).mean()), float((ratio < DELTA_THRESHOLD).mean()))


def normals_from_depth(depth: FloatArray, camera: PinholeCamera) -> NDArray[np.float64]:
    """Unit normals of the surface of a depth map, by central differences of its points.

    Args:
        depth: `... H W`, metres along the optical axis.
        camera: intrinsics of these frames.

    Returns:
        `... H W 3`, facing the camera; the outermost pixels have one-sided differences.
    """
    z = _as_float64(depth)
    height, width = z.shape[-2], z.shape[-1]
    rows, columns = np.mgrid[:height, :width]
    points = np.stack(
        [(columns - camera.centre_x) / camera.focal_x * z, -(rows - camera.centre_y) / camera.focal_y * z, -z], axis=-1
    )
    rightwards, downwards = np.gradient(points, axis=-2), np.gradient(points, axis=-3)
    normals = np.cross(downwards, rightwards)
    unit: NDArray[np.float64] = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    return unit


def consistency_angle(normals: FloatArray, depth: FloatArray, mask: MaskArray, camera: PinholeCamera) -> float:
    """Mean angle in degrees between predicted normals and the normals of predicted depth.

    Only pixels whose eight neighbours lie in the mask count: differences across the body's outline are not a surface.

    Args:
        normals: `f H W 3`.
        depth: `f H W` metres.
        mask: `f H W`.
        camera: intrinsics of these frames.
    """
    _check_shapes(normals, normals, mask, channels=3)
    inside = erode(mask)
    if not inside.any():
        return float("nan")
    return float(angles(normals[inside], normals_from_depth(depth, camera)[inside]).mean())


def erode(mask: MaskArray) -> MaskArray:
    """Removes from a mask `f H W` all pixels with a neighbour (of eight) outside of the mask or of the frame."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    height, width = mask.shape[1:]
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    eroded: MaskArray = np.logical_and.reduce(shifted)
    return eroded


def _check_shapes(prediction: FloatArray, truth: FloatArray, mask: MaskArray, channels: int | None = None) -> None:
    expected = mask.shape if channels is None else (*mask.shape, channels)
    if mask.ndim != 3 or prediction.shape != expected or truth.shape != expected:
        raise ValueError(
            f"with a mask f H W of {mask.shape} both maps must be {expected}, not {prediction.shape} and {truth.shape}"
        )
