"""Compares the normals of a clip with its depth: a score for curators, and a check of the axes' signs.

Both need no truth: a wrong conversion of a network's axes makes its normals disagree with every depth.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.protocols import Depths
from dreamdance.errors import UserError
from dreamdance.media.surfaces import angles, check_shapes, erode, normals_from_relief

# A pixel belongs to the person if at least this share of it is covered.
MASK_THRESHOLD = 0.5
# Steeper pixels of the depth are left out: where an arm hides the trunk, a difference of depths is not a surface.
MAX_STEEPNESS_DEGREES = 75.0
# With fewer pixels there is no score.
MIN_PIXELS = 64
# Turned axes are reported if they agree better by more than this, and if they agree at all. On 12 rendered dancers
# (tools/measure_axes.py, table in README.md) right signs agreed to 2.7 degrees with the true depth and to 32.5 with a
# blurred one; the best wrong sign was worse by 9.5 degrees or more. A random depth came down to 39 degrees by chance.
MARGIN_DEGREES = 6.0
MAX_AGREEING_DEGREES = 36.0

# The signs of x, y and z; the given ones first.
_SIGNS = tuple(product((1, -1), repeat=3))
_NAMES = ("x (right)", "y (up)", "z (towards the camera)")


class AxesError(UserError):
    """The normals of a clip have another sign along some axis than its depth."""


def geometry_consistency(
    normals: NDArray[np.floating[Any]], depths: Depths, mask: NDArray[np.floating[Any]] | NDArray[np.bool_]
) -> float:
    """Mean angle in degrees between the normals of a clip and the normals of its own depth, inside the person.

    Neither the camera nor the scale of the depth is known. So the surface is taken to be seen in parallel projection,
    and one factor for the whole clip scales its relief, such that the median steepness of both is the same.

    Args:
        normals: `f H W 3`, x right, y up, z towards the camera, of any length.
        depths: `f H W`.
        mask: `f H W`, the share of each pixel that the person covers.

    Returns:
        The angle; NaN if the mask is (almost) empty, or the depth is flat where the normals are not.
    """
    compared = _compare(normals, depths, mask)
    return float("nan") if compared is None else float(angles(*compared).mean())


class AxesCheck:
    """Compares the normals of the first clips together with their depth, then stops.

    A wrong conversion shows in the first clips; a chance disagreement in one of thousands must not end a run.
    """

    def __init__(self, names: tuple[str, str], *, num_clips: int = 3) -> None:
        """Starts with no clip.

        Args:
            names: what made the normals and the depth, for the message.
            num_clips: the number of comparable clips after which nothing is checked any more.
        """
        self._names, self._left = names, num_clips
        self._sums, self._count = np.zeros(len(_SIGNS)), 0

    def add(
        self,
        normals: NDArray[np.floating[Any]],
        depths: Depths,
        mask: NDArray[np.floating[Any]] | NDArray[np.bool_],
    ) -> float:
        """Adds a clip and decides on all so far.

        Args:
            normals, depths, mask: as for `geometry_consistency`.

        Returns:
            The mean angle of all so far; NaN before the first comparable clip.

        Raises:
            AxesError: turned axes agree, and by more than `MARGIN_DEGREES` better; names the axes.
        """
        compared = _compare(normals, depths, mask) if self._left > 0 else None
        if compared is not None:
            given, expected = compared
            self._left -= 1
            self._sums += [float(angles(given * np.array(signs), expected).sum()) for signs in _SIGNS]
            self._count += len(given)
        if not self._count:
            return float("nan")
        means = (self._sums / self._count).tolist()
        angle, best = means[0], int(np.argmin(means))
        if angle - means[best] > MARGIN_DEGREES and means[best] <= MAX_AGREEING_DEGREES:
            raise AxesError(_message(self._names, _SIGNS[best], angle=angle, turned_angle=means[best]))
        return float(angle)


def check_axes(
    normals: NDArray[np.floating[Any]],
    depths: Depths,
    mask: NDArray[np.floating[Any]] | NDArray[np.bool_],
    *,
    names: tuple[str, str] = ("the normal annotator", "the depth annotator"),
) -> float:
    """Refuses normals that agree clearly better with the depth when some of their axes are turned round.

    Args:
        normals, depths, mask: as for `geometry_consistency`.
        names: what made the normals and the depth, for the message.

    Returns:
        The angle of `geometry_consistency`.

    Raises:
        AxesError: turned axes agree, and by more than `MARGIN_DEGREES` better; names the axes.
    """
    return AxesCheck(names).add(normals, depths, mask)


def _message(names: tuple[str, str], signs: Sequence[int], *, angle: float, turned_angle: float) -> str:
    turned = [name for name, sign in zip(_NAMES, signs, strict=True) if sign < 0]
    text = (
        f"the normals of {names[0]} disagree with the depth of {names[1]}: the angle between them is {angle:.1f} "
        f"degrees, but {turned_angle:.1f} with {' and '.join(turned)} of the normals negated; normals must have x to "
        "the right, y up and z towards the camera"
    )
    if tuple(signs) == (-1, -1, 1):
        text += "; a depth with near and far exchanged looks the same"
    return text


def _compare(
    normals: NDArray[np.floating[Any]], depths: Depths, mask: NDArray[np.floating[Any]] | NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The given normals and those of the depth, `n 3` each, at the pixels that count."""
    person = np.asarray(mask) >= MASK_THRESHOLD
    check_shapes(normals, normals, person, channels=3)
    check_shapes(depths.values, depths.values, person)
    inside = erode(person)
    if inside.sum() < MIN_PIXELS:
        return None
    height = _height(depths, person)
    given = np.asarray(normals, dtype=np.float64)[inside]
    relief = normals_from_relief(height)[inside]
    steepness = float(np.median(_steepness(relief)))
    if not steepness > np.finfo(np.float32).eps * float(np.abs(height[inside]).max()):
        return None
    factor = float(np.median(_steepness(given))) / steepness
    expected = relief * np.array([factor, factor, 1.0])
    counts = _steepness(expected) <= np.tan(np.radians(MAX_STEEPNESS_DEGREES))
    if counts.sum() < MIN_PIXELS:
        return None
    return given[counts], expected[counts]


def _height(depths: Depths, person: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A surface that rises towards the camera, `f H W`, up to scale; constant outside of the person.

    In a pinhole camera, a change of the logarithm of the depth is a change of height in units of the distance. A
    disparity has an unknown shift; over the depth of one body it changes as the height does.
    """
    values = np.where(person, depths.values, 1.0).astype(np.float64)
    if depths.kind == "disparity":
        return values
    if values.min() <= 0:
        raise ValueError(f"depth must be positive inside the mask, but reaches {values.min():.4g}")
    return -np.log(values)


def _steepness(normals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tangent of the angle between normals `... 3` and the direction to the camera."""
    steepness: NDArray[np.float64] = np.linalg.norm(normals[..., :2], axis=-1) / np.maximum(
        np.abs(normals[..., 2]), 1e-12
    )
    return steepness
