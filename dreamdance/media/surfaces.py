"""Surfaces in pictures: normals of a depth map, angles between normals, and the alignment of depths.

Normals are vectors in camera space, x right, y up, z towards the camera.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
MaskArray = NDArray[np.bool_]


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


def angles(first: FloatArray, second: FloatArray) -> NDArray[np.float64]:
    """Angles in degrees between vectors `... 3` of any length; accurate for nearly parallel ones, unlike arccos."""
    a, b = _as_float64(first), _as_float64(second)
    cross = np.linalg.norm(np.cross(a, b), axis=-1)
    angles: NDArray[np.float64] = np.degrees(np.arctan2(cross, (a * b).sum(axis=-1)))
    return angles


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


def normals_from_depth(depth: FloatArray, camera: PinholeCamera) -> NDArray[np.float64]:
    """Unit normals of the surface of a depth map, by central differences of its points.

    Args:
        depth: `... H W`, metres along the optical axis.
        camera: intrinsics of these frames.

    Returns:
        `... H W 3`, facing the camera; the outermost pixels have one-sided differences.
    """
    z = _as_float64(depth)
    rows, columns = np.mgrid[: z.shape[-2], : z.shape[-1]]
    x = (columns - camera.centre_x) / camera.focal_x * z
    y = -(rows - camera.centre_y) / camera.focal_y * z
    return _normals_of_points(np.stack([x, y, -z], axis=-1))


def normals_from_relief(height: FloatArray) -> NDArray[np.float64]:
    """Unit normals of a surface that is seen in parallel projection.

    Args:
        height: `... H W`, towards the camera, in widths of a (square) pixel.

    Returns:
        `... H W 3`, facing the camera; the outermost pixels have one-sided differences.
    """
    z = _as_float64(height)
    rows, columns = np.mgrid[: z.shape[-2], : z.shape[-1]]
    x, y = (np.broadcast_to(values, z.shape) for values in (columns, -rows))
    return _normals_of_points(np.stack([x, y, z], axis=-1))


def consistency_angle(normals: FloatArray, depth: FloatArray, mask: MaskArray, camera: PinholeCamera) -> float:
    """Mean angle in degrees between predicted normals and the normals of predicted depth.

    Only pixels whose eight neighbours lie in the mask count: differences across the body's outline are not a surface.

    Args:
        normals: `f H W 3`.
        depth: `f H W` metres.
        mask: `f H W`.
        camera: intrinsics of these frames.
    """
    check_shapes(normals, normals, mask, channels=3)
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


def check_shapes(first: FloatArray, second: FloatArray, mask: MaskArray, channels: int | None = None) -> None:
    """Raises ValueError if two maps and their mask `f H W` do not have the same frames and size."""
    expected = mask.shape if channels is None else (*mask.shape, channels)
    if mask.ndim != 3 or first.shape != expected or second.shape != expected:
        raise ValueError(
            f"with a mask f H W of {mask.shape} both maps must be {expected}, not {first.shape} and {second.shape}"
        )


def _as_float64(values: FloatArray) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _normals_of_points(points: NDArray[np.float64]) -> NDArray[np.float64]:
    rightwards, downwards = np.gradient(points, axis=-2), np.gradient(points, axis=-3)
    normals = np.cross(downwards, rightwards)
    unit: NDArray[np.float64] = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    return unit
