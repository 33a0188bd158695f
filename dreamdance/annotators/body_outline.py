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
# A surface that turns away more than this is not followed in changes of direction: cosine between normal and view.
_LEAST_FACING = 0.05


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
    for frame, (depth, normal, inside) in enumerate(zip(depths, normals, mask, strict=True)):
        depth[~np.isfinite(surface.depths[frame])] = np.inf
        if not (inside & np.isfinite(depth)).any():  # nobody: a flat figure where the mask is
            depth[inside], normal[inside] = hips[frame], (0.0, 0.0, 1.0)
            continue
        scale = focal / float(hips[frame])
        _move(depth, normal, inside, focal=focal, band=_BAND * scale)
        _fill(depth, normal, inside, focal=focal, smoothing=_FILL_SMOOTHING * scale)
    depths[~mask] = depths[mask].max() if mask.any() else hips.max()
    normals[~mask] = (0.0, 0.0, 1.0)
    return Surface(depths, normals)


def _signed_distance(region: _Mask) -> _Map:
    """Distance of each pixel's centre to a region's outline, positive inside, in pixels."""
    inside = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.where(region, inside - 0.5, 0.5 - outside).astype(np.float32)


def _move(depth: _Map, normal: _Map, mask: _Mask, *, focal: float, band: float) -> None:
    """Moves the shapes' surface to the mask's outline, in place."""
    height, width = depth.shape
    covered = np.isfinite(depth)
    to_mask, to_shapes = _signed_distance(mask), _signed_distance(covered)
    smooth = cv2.GaussianBlur(to_shapes, (0, 0), _DIRECTION_SMOOTHING)
    inwards = np.stack([cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)], axis=-1)
    inwards /= np.maximum(np.linalg.norm(inwards, axis=-1, keepdims=True), 1e-6)
    limit = _LARGEST_MOVE * band
    gap = np.clip(to_mask - to_shapes, -limit, limit)
    move = np.where(mask, gap * np.clip(1.0 - to_mask / band, 0.0, 1.0), 0.0)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    from_columns, from_rows = columns + move * inwards[..., 0], rows + move * inwards[..., 1]

    def sample(values: _Map) -> _Map:
        return cv2.remap(values, from_columns, from_rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    cover = sample(covered.astype(np.float32))
    moved = mask & (np.abs(move) >= _LEAST_MOVE) & (cover >= _LEAST_COVER)
    share = np.where(moved, cover, 1.0)
    new_depth = sample(np.where(covered, depth, 0.0)) / share
    new_normal = sample(np.where(covered[..., None], normal, 0.0))
    new_normal /= np.maximum(np.linalg.norm(new_normal, axis=-1, keepdims=True), 1e-6)
    u, v = from_columns + 0.5 - width / 2, height / 2 - 0.5 - from_rows
    along_u, along_v = _slopes(new_depth, new_normal, u, v, focal)
    # The slopes change with the moves, by the chain rule.
    u_row, u_column = np.gradient(u)
    v_row, v_column = np.gradient(v)
    slopes = (along_u * u_column + along_v * v_column, -(along_u * u_row + along_v * v_row))
    turned = _normals(new_depth, *slopes, columns + 0.5 - width / 2, height / 2 - 0.5 - rows, focal)
    depth[moved], normal[moved] = new_depth[moved], new_normal[moved]


def _slopes(depth: _Map, normal: _Map, u: _Map, v: _Map, focal: float) -> tuple[_Map, _Map]:
    """How fast depth changes per pixel to the right and upwards on a surface with these normals.

    u, v: pixels right of and above the picture's centre.
    """
    facing = normal[..., 2] - (u * normal[..., 0] + v * normal[..., 1]) / focal
    factor = depth / np.maximum(facing, _LEAST_FACING) / focal
    return factor * normal[..., 0], factor * normal[..., 1]


def _normals(depth: _Map, along_u: _Map, along_v: _Map, u: _Map, v: _Map, focal: float) -> _Map:
    """Unit normals of a surface whose depth changes so per pixel to the right and upwards."""
    normals = np.stack([focal * along_u, focal * along_v, depth + u * along_u + v * along_v], axis=-1)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)


def _fill(depth: _Map, normal: _Map, mask: _Mask, *, focal: float, smoothing: float) -> None:
    """Fills the pixels of the mask that show nothing, in place: a smooth continuation, and its own normals."""
    height, width = depth.shape
    empty = mask & ~np.isfinite(depth)
    if not empty.any():
        return
    known = mask & ~empty
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    values = np.zeros(labels.max() + 1, dtype=np.float32)
    values[labels[known]] = depth[known]
    filled = np.where(known, depth, values[labels])
    weight = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), smoothing)
    for _ in range(3):
        blurred = cv2.GaussianBlur(np.where(mask, filled, 0.0).astype(np.float32), (0, 0), smoothing)
        filled = np.where(empty, blurred / np.maximum(weight, 1e-6), filled)
    filled = filled.astype(np.float32)
    rows, columns = np.gradient(np.where(mask, filled, values[labels]))
    v, u = np.meshgrid(height / 2 - 0.5 - np.arange(height), np.arange(width) + 0.5 - width / 2, indexing="ij")
    turned = _normals(filled, columns, -rows, u, v, focal)
    depth[empty], normal[empty] = filled[empty], turned[empty]
