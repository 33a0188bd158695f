"""Moves the joints of a body in the picture so that its bones lie in the middle of the limbs that the mask shows.

A joint that is off by a few hundredths of the trunk's length leaves one side of a limb without surface.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.body_chords import PLACES, bone_chords, find_chords, project
from dreamdance.annotators.body_skeleton import SeenBody
from dreamdance.dancers.body import Girths

_Array = NDArray[np.floating[Any]]

# The joints that move, by the numbers of their landmarks: shoulders, elbows, wrists, hips, knees, ankles.
_JOINTS = (11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
# Landmarks that move with a joint.
_ATTACHED = {15: (17, 19, 21), 16: (18, 20, 22), 27: (29, 31), 28: (30, 32)}
# Only chords that are about as wide as the limb say where its middle is: the others cross two parts of the body.
_LIKE_THE_LIMB = (0.65, 1.35)
# Weight of staying in place, against one for each chord.
_PRIOR_WEIGHT = 0.15


def centre_joints(
    landmarks: NDArray[np.float32], seen: SeenBody, girths: Girths, mask: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Moves joints towards the middle of their limbs.

    Args:
        landmarks: `(f, 33, 4)` of `PersonPoses`.
        seen: the body that they give.
        girths: its girths.
        mask: `(f, H, W)`.

    Returns:
        Landmarks whose x and y are corrected.
    """
    num_frames, height, width = mask.shape
    matrix = np.zeros((num_frames, 24, 24)) + _PRIOR_WEIGHT * np.eye(24)
    target = np.zeros((num_frames, 24))
    for ends, weights, across, offsets in _equations(seen, girths, mask):
        # The moved joints' mean, along `across`, shall be the chord's middle.
        row = np.zeros((num_frames, 24))
        for end, weight in zip(ends, weights, strict=True):
            place = 2 * _JOINTS.index(end)
            row[:, place : place + 2] = weight * across
        known = np.isfinite(offsets)
        row[~known] = 0.0
        matrix += row[:, :, None] * row[:, None, :]
        target += row * np.where(known, offsets, 0.0)[:, None]
    moves = np.linalg.solve(matrix, target[..., None]).reshape(num_frames, 12, 2)
    moved = landmarks.copy()
    for joint, move in zip(_JOINTS, np.moveaxis(moves, 1, 0), strict=True):
        for point in (joint, *_ATTACHED.get(joint, ())):
            moved[:, point, :2] += (move * (1.0 / width, -1.0 / height)).astype(np.float32)
    return moved


_Equation = tuple[tuple[int, ...], tuple[float, ...], _Array, _Array]


def _equations(seen: SeenBody, girths: Girths, mask: NDArray[np.bool_]) -> list[_Equation]:
    """For each chord: joints, their weights, direction `(f, 2)`, and by how many pixels they shall move along it."""
    skeleton = seen.skeleton
    equations: list[_Equation] = []
    leg = (*girths.leg[:2], girths.cuff)
    for side in (0, 1):
        for joints, first, radii in (
            ((skeleton.shoulders, skeleton.elbows, skeleton.wrists), 11, girths.arm),
            ((skeleton.hips, skeleton.knees, skeleton.ankles), 23, leg),
        ):
            for part in (0, 1):
                expected = radii[part] + (radii[part + 1] - radii[part]) * PLACES
                chords = bone_chords(seen, mask, joints[part][side], joints[part + 1][side], expected)
                ends = (first + 2 * part + side, first + 2 * part + 2 + side)
                offsets = _believed(chords.offsets, chords.radii / expected) * chords.scales
                for place, share in enumerate(PLACES.tolist()):
                    equations.append((ends, (1.0 - share, share), chords.across[:, place], offsets[:, place]))
    low, high = project(skeleton.pelvis, seen.focal), project(skeleton.neck, seen.focal)
    along = high - low
    across = np.stack([along[:, 1], -along[:, 0]], axis=-1)
    across = across / np.maximum(np.linalg.norm(along, axis=-1), 1e-6)[:, None]
    radius = np.full((len(mask), 1), girths.waist)
    chords = find_chords(seen, mask, skeleton.waist[:, None], across[:, None], radius)
    offsets = _believed(chords.offsets, chords.radii / radius) * chords.scales
    equations.append(((11, 12, 23, 24), (0.18, 0.18, 0.32, 0.32), across, offsets[:, 0]))
    return equations


def _believed(offsets: _Array, ratio: _Array) -> _Array:
    low, high = _LIKE_THE_LIMB
    with np.errstate(invalid="ignore"):
        return np.where((ratio > low) & (ratio < high), offsets, np.nan)
