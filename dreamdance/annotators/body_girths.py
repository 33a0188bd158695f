"""How thick a body is: radii of limbs and trunk, constant over a clip, fitted to the width of its mask.

The width is read across each bone, at several places in every frame. Where a limb lies before the trunk or beside
another limb, the width is too large: so a low quantile over all frames and both sides counts.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.body_chords import PLACES, bone_chords, find_chords, project
from dreamdance.annotators.body_skeleton import SeenBody
from dreamdance.dancers.body import Girths
from dreamdance.dancers.landmarks import FINGER_RADIUS

_Array = NDArray[np.floating[Any]]
_Bone = tuple[_Array, _Array]

_QUANTILE = 0.35
# Arms hang beside the trunk more often than not.
_TRUNK_QUANTILE = 0.2
# Where the trunk's width is read, as weights of pelvis, waist and chest: between the hips' joints and the shoulders.
_TRUNK_LEVELS = ((0.6, 0.4, 0.0), (0.3, 0.7, 0.0), (0.0, 1.0, 0.0), (0.0, 0.7, 0.3), (0.0, 0.45, 0.55))
_MIN_SAMPLES = 4
# Weight of the usual shape against that of all measured places of a limb.
_PRIOR_WEIGHT = 0.3
_LIMB_RANGE, _TRUNK_RANGE = (0.6, 1.7), (0.7, 1.45)


def usual_girths(seen: SeenBody) -> Girths:
    """The girths of an average body with the given proportions."""
    size = seen.proportions
    hips, chest = size.hip_width + 0.068, 0.80 * size.shoulder_width
    return Girths(
        hips=hips, waist=0.43 * (hips + chest), chest=chest, trunk_depth=0.70, yoke=0.060, neck=0.055,
        arm=(0.057, 0.044, 0.032), leg=(0.088, 0.062, 0.038), cuff=0.042, finger=FINGER_RADIUS * size.hand,
    )  # fmt: skip


def fit_girths(seen: SeenBody, mask: NDArray[np.bool_]) -> Girths:
    """Fits the girths of a body to its mask `(f, H, W)`."""
    usual, skeleton = usual_girths(seen), seen.skeleton
    arms, legs = (
        tuple((starts[side], ends[side]) for starts, ends in pairs for side in (0, 1))
        for pairs in (
            ((skeleton.shoulders, skeleton.elbows), (skeleton.elbows, skeleton.wrists)),
            ((skeleton.hips, skeleton.knees), (skeleton.knees, skeleton.ankles)),
        )
    )
    arm = _fit_limb(seen, mask, arms, usual.arm)
    leg = _fit_limb(seen, mask, legs, (*usual.leg[:2], usual.cuff))
    hips, waist, chest = _fit_trunk(seen, mask, usual)
    return replace(
        usual, hips=hips, waist=waist, chest=chest, arm=arm, leg=(leg[0], leg[1], usual.leg[2]), cuff=leg[2],
        yoke=usual.yoke * float(np.clip(arm[0] / usual.arm[0], 0.9, 1.3)),
    )  # fmt: skip


def _fit_limb(
    seen: SeenBody, mask: NDArray[np.bool_], bones: tuple[_Bone, ...], usual: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Radii at the three joints of a limb; `bones` are left and right upper, left and right lower."""
    rows: list[list[float]] = []
    values: list[float] = []
    for part in (0, 1):
        radii = usual[part] + (usual[part + 1] - usual[part]) * PLACES
        found = []
        for bone in bones[2 * part : 2 * part + 2]:
            found.append(bone_chords(seen, mask, *bone, radii).radii)
        stacked = np.concatenate(found)
        for place, share in enumerate(PLACES):
            column = stacked[np.isfinite(stacked[:, place]), place]
            if len(column) >= _MIN_SAMPLES:
                rows.append([0.0] * part + [1.0 - share, share] + [0.0] * (1 - part))
                values.append(float(np.quantile(column, _QUANTILE)))
    return _solve(rows, values, usual, _LIMB_RANGE)


def _solve(
    rows: list[list[float]], values: list[float], usual: tuple[float, float, float], limits: tuple[float, float]
) -> tuple[float, float, float]:
    """Three radii whose weighted sums are closest to measured ones.

    Args:
        rows: weights of the radii in each measurement.
        values: the measurements.
        usual: the result's factors on these radii are held near one common factor.
        limits: of the factors.
    """
    if not rows:
        return usual
    unit = float(np.mean(usual))
    matrix = np.array(rows) * np.array(usual) / unit
    target = np.array(values) / unit
    common = float(np.median(target / matrix.sum(axis=1)))
    matrix = np.concatenate([matrix, _PRIOR_WEIGHT * np.eye(3)])
    target = np.concatenate([target, np.full(3, _PRIOR_WEIGHT * common)])
    factors = np.linalg.lstsq(matrix, target, rcond=None)[0].clip(*limits)
    first, second, third = (float(factor * radius) for factor, radius in zip(factors, usual, strict=True))
    return first, second, third


def _fit_trunk(seen: SeenBody, mask: NDArray[np.bool_], usual: Girths) -> tuple[float, float, float]:
    """Half widths of hips, waist and chest."""
    skeleton = seen.skeleton
    radii = (usual.hips, usual.waist, usual.chest)
    low, high = project(skeleton.pelvis, seen.focal), project(skeleton.neck, seen.focal)
    along = high - low
    across = np.stack([along[:, 1], -along[:, 0]], axis=-1)
    across = across / np.maximum(np.linalg.norm(along, axis=-1), 1e-6)[:, None]
    rows: list[list[float]] = []
    values: list[float] = []
    for weights in _TRUNK_LEVELS:
        centre = weights[0] * skeleton.pelvis + weights[1] * skeleton.waist + weights[2] * skeleton.chest
        frame = skeleton.pelvis_frame if weights[0] else skeleton.chest_frame
        # The half width of an elliptic cylinder of half width 1, seen along z.
        left = (frame[:, :2, 0] * across).sum(axis=-1)
        ahead = (frame[:, :2, 2] * across).sum(axis=-1)
        shown = np.maximum(np.sqrt(left**2 + (usual.trunk_depth * ahead) ** 2), 0.1)
        expected = shown * float(np.dot(weights, radii))
        chords = find_chords(seen, mask, centre[:, None], across[:, None], expected[:, None])
        radius = chords.radii[:, 0] / shown
        radius = radius[np.isfinite(radius)]
        if len(radius) >= _MIN_SAMPLES:
            rows.append(list(weights))
            values.append(float(np.quantile(radius, _TRUNK_QUANTILE)))
    return _solve(rows, values, radii, _TRUNK_RANGE)
