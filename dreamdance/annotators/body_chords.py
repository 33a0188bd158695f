"""Where lines across a bone enter and leave the mask of a body."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.body_skeleton import SeenBody

_Array = NDArray[np.floating[Any]]

# Where chords are taken, as shares of a bone.
PLACES = np.array([0.15, 0.3, 0.5, 0.7, 0.85])
# Chords are searched up to this multiple of the expected radius on both sides.
_REACH = 2.2
# Steps of the search on each side.
_STEPS = 40
# A bone that is foreshortened more than this has no chords.
_MIN_FORESHORTENING = 0.5


@dataclass(frozen=True)
class Chords:
    """Chords of a mask, in metres at the depth of their places. NaN where none was found.

    Attributes:
        radii: `(f, p)` half the lengths.
        offsets: `(f, p)` from the place to the chord's middle, along `across`.
        across: `(f, p, 2)` the directions in the picture, x right and y up.
        scales: `(f, p)` pixels per metre.
    """

    radii: _Array
    offsets: _Array
    across: _Array
    scales: _Array


def bone_chords(seen: SeenBody, mask: NDArray[np.bool_], start: _Array, end: _Array, radii: _Array) -> Chords:
    """Chords across a bone at `PLACES`.

    Args:
        seen: the camera.
        mask: `(f, H, W)`.
        start, end: `(f, 3)` in camera space.
        radii: `(p,)` expected radii in metres.
    """
    points = start[:, None] + (end - start)[:, None] * PLACES[:, None]
    along = project(end, seen.focal) - project(start, seen.focal)
    length = np.linalg.norm(along, axis=-1)
    across = np.stack([-along[:, 1], along[:, 0]], axis=-1) / np.maximum(length, 1e-6)[:, None]
    across = np.broadcast_to(across[:, None], (*points.shape[:2], 2))
    chords = find_chords(seen, mask, points, across, np.broadcast_to(radii, points.shape[:2]))
    whole = np.linalg.norm(end - start, axis=-1) * chords.scales.mean(axis=1)
    short = length < _MIN_FORESHORTENING * whole
    chords.radii[short] = np.nan
    return chords


def project(points: _Array, focal: float) -> _Array:
    """Where points `(..., 3)` are seen: pixels right of and above the picture's centre, `(..., 2)`."""
    return points[..., :2] * (focal / -points[..., 2:])


def find_chords(seen: SeenBody, mask: NDArray[np.bool_], points: _Array, across: _Array, radii: _Array) -> Chords:
    """The chord nearest to each point.

    Args:
        seen: the camera.
        mask: `(f, H, W)`.
        points: `(f, p, 3)` in camera space.
        across: `(f, p, 2)` unit vectors in the picture.
        radii: `(f, p)` expected radii in metres.
    """
    height, width = mask.shape[1:]
    scales = seen.focal / -points[..., 2]
    step = _REACH * radii / _STEPS
    numbers = np.arange(-_STEPS, _STEPS + 1)
    middle = project(points, seen.focal)
    sampled = middle[:, :, None] + across[:, :, None] * ((step * scales)[..., None] * numbers)[..., None]
    columns = np.floor(sampled[..., 0] + width / 2).astype(int)
    rows = np.floor(height / 2 - sampled[..., 1]).astype(int)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    covered = mask[np.arange(len(mask))[:, None, None], rows.clip(0, height - 1), columns.clip(0, width - 1)] & inside
    nearest = np.where(covered, np.abs(numbers), 2 * _STEPS).argmin(axis=-1)[..., None] - _STEPS
    # An edge at the picture's border is not the body's.
    before = np.where(~covered & (numbers < nearest), numbers, -2 * _STEPS).max(axis=-1)
    after = np.where(~covered & (numbers > nearest), numbers, 2 * _STEPS).min(axis=-1)
    found = covered.any(axis=-1) & (before >= -_STEPS) & (after <= _STEPS)
    for edge in (before, after):
        place = (edge + _STEPS).clip(0, 2 * _STEPS)[..., None]
        found &= np.take_along_axis(inside, place, axis=-1)[..., 0]
    return Chords(
        radii=np.where(found, 0.5 * (after - before - 1) * step, np.nan),
        offsets=np.where(found, 0.5 * (after + before) * step, np.nan),
        across=across,
        scales=scales,
    )
