"""Fits the surface of a body to the outline of its mask.

The shapes' outline is close to the mask's, not on it: clothes and hair are wider. Near the outline each pixel shows
what the shapes have at the same distance from their own outline: so the surface turns away from the camera where the
mask ends, with neither gaps nor ledges. What is still empty, such as cloth between two legs, is filled smoothly.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating[Any]]
_Map = NDArray[np.float32]
_Mask = NDArray[np.bool_]

# Width of the band along the outline in which pixels are moved, in metres: about the radius of a thigh.
_BAND = 0.09
# The largest move, as a share of the band: above 1 the order of pixels would change.
_LARGEST_MOVE = 0.7
# Standard deviation of the filter that smooths the directions of moves, in pixels.
_DIRECTION_SMOOTHING = 1.5
# Pixels that move less than this, in pixels, keep the exact surface.
_LEAST_MOVE = 0.3
# A moved pixel shows a surface if at least this share of its four samples does.
_LEAST_COVER = 0.2
# Standard deviation of the filter that smooths what is filled, in metres.
_FILL_SMOOTHING = 0.03
_FILL_ROUNDS = 3
# Distances beyond this number of pixels are not told apart.
_FARTHEST = 1000.0


@dataclass(frozen=True)
class Surface:
    """What each pixel shows: depths `(f, H, W)` in metres, infinite where nothing is; normals `(f, H, W, 3)`."""

    depths: _Map
    normals: _Map


def follow_mask(surface: Surface, mask: _Mask, *, focal: float, hips: _Array) -> Surface:
    """Fits a surface to a mask.

    Args:
        surface: of the shapes, in camera space.
        mask: `(f, H, W)`.
        focal: focal length in pixels.
        hips: `(f,)` depth of the hips, in metres.

    Returns:
        Finite depth and unit normals everywhere. Outside of the mask they are the clip's greatest depth and (0, 0, 1).
    """
    depths, normals = surface.depths.copy(), surface.normals.copy()
    for frame, inside in enumerate(mask):
        scale = focal / float(hips[frame])
        rows, columns = _box(inside, margin=round(_BAND * scale) + 2)
        part = _Part(depths[frame, rows, columns], normals[frame, rows, columns], inside[rows, columns])
        if not (part.mask & np.isfinite(part.depth)).any():  # a flat figure, if any
            part.depth[part.mask], part.normal[part.mask] = hips[frame], (0.0, 0.0, 1.0)
            continue
        _move(part, band=_BAND * scale)
        height, width = inside.shape
        u = np.arange(width)[columns] + 0.5 - width / 2
        v = height / 2 - 0.5 - np.arange(height)[rows]
        _fill(part, u, v, focal=focal, smoothing=_FILL_SMOOTHING * scale)
    depths[~mask] = depths[mask].max() if mask.any() else hips.max()
    normals[~mask] = (0.0, 0.0, 1.0)
    return Surface(depths, normals)


@dataclass(frozen=True)
class _Part:
    """Views of the part of one frame that contains the person; functions change `depth` and `normal` in place."""

    depth: _Map
    normal: _Map
    mask: _Mask


def _box(mask: _Mask, *, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a mask `(H, W)`, with a margin in pixels; empty slices for an empty mask."""
    slices = []
    for axis, size in zip((1, 0), mask.shape, strict=True):
        used = np.flatnonzero(mask.any(axis=axis))
        slices.append(slice(max(0, used[0] - margin), min(size, used[-1] + 1 + margin)) if len(used) else slice(0, 0))
    return slices[0], slices[1]


def _distance(region: _Mask) -> _Map:
    """Distance of each pixel of a region to the nearest one outside, in pixels, at most `_FARTHEST`.

    OpenCV's last bits differ from call to call. Squares of distances between pixels are whole numbers.
    """
    found = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    squares = np.minimum(np.asarray(found, dtype=np.float64), _FARTHEST) ** 2
    return np.asarray(np.sqrt(np.rint(squares)), dtype=np.float32)


def _signed_distance(region: _Mask) -> _Map:
    """Distance of each pixel's centre to a region's outline, positive inside, in pixels."""
    inside, outside = _distance(region), _distance(~region)
    return np.where(region, inside - 0.5, 0.5 - outside).astype(np.float32)


def _move(part: _Part, *, band: float) -> None:
    """Moves the shapes' surface to the mask's outline. Normals move along: they do not turn with the depth's slopes."""
    depth, normal, mask = part.depth, part.normal, part.mask
    height, width = depth.shape
    covered = np.isfinite(depth)
    to_mask, to_shapes = _signed_distance(mask), _signed_distance(covered)
    smooth = cv2.GaussianBlur(to_shapes, (0, 0), _DIRECTION_SMOOTHING)
    right, down = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
    length = np.maximum(np.hypot(right, down), 1e-6)  # cv2.magnitude's last bits differ from call to call
    limit = _LARGEST_MOVE * band
    gap = np.clip(to_mask - to_shapes, -limit, limit)
    move = np.where(mask, gap * np.clip(1.0 - to_mask / band, 0.0, 1.0), 0.0).astype(np.float32)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    from_columns, from_rows = columns + move * right / length, rows + move * down / length

    def sample(values: _Map) -> _Map:
        moved = cv2.remap(values, from_columns, from_rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(moved, dtype=np.float32)

    cover = sample(covered.astype(np.float32))
    moved = mask & (np.abs(move) >= _LEAST_MOVE) & (cover >= _LEAST_COVER)
    new_depth = sample(np.where(covered, depth, 0.0))[moved] / cover[moved]
    new_normal = sample(np.where(covered[..., None], normal, 0.0))[moved]
    new_normal /= np.maximum(np.linalg.norm(new_normal, axis=-1, keepdims=True), 1e-6)
    depth[moved], normal[moved] = new_depth, new_normal


def _fill(part: _Part, u: _Array, v: _Array, *, focal: float, smoothing: float) -> None:
    """Fills the pixels of the mask that show nothing: a smooth continuation of the depth, and its own normals.

    Args:
        part: of the frame.
        u: pixels right of the picture's centre, of each column.
        v: pixels above it, of each row.
        focal: focal length in pixels.
        smoothing: standard deviation of the filter, in pixels.
    """
    depth, mask = part.depth, part.mask
    empty = mask & ~np.isfinite(depth)
    if not empty.any():
        return
    known = mask & ~empty
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros(int(labels.max()) + 1, dtype=np.float32)
    values[labels[known]] = depth[known]
    filled = np.where(known, depth, values[labels])
    weight = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), smoothing)
    for _ in range(_FILL_ROUNDS):
        blurred = cv2.GaussianBlur(np.where(mask, filled, 0.0).astype(np.float32), (0, 0), smoothing)
        filled = np.where(empty, blurred / np.maximum(weight, 1e-6), filled).astype(np.float32)
    downwards, rightwards = np.gradient(np.where(mask, filled, values[labels]))
    rows, columns = np.nonzero(empty)
    depth[empty] = filled[empty]
    # Depth D at u, v is the point (u D / f, v D / f, -D); the normal is the cross product of its derivatives.
    along_u, along_v = rightwards[empty], -downwards[empty]
    normals = np.stack(
        [focal * along_u, focal * along_v, depth[empty] + u[columns] * along_u + v[rows] * along_v], axis=-1
    )
    part.normal[empty] = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
