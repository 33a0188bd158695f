"""The skeleton of a body in camera space, from the 33 landmarks of a pose network.

Landmarks are a weak perspective view: x and y in the picture, z relative to the hips at the picture's scale there. A
pinhole camera of an assumed focal length turns them into points in metres of a body of standard height. This module
knows nothing of shapes and masks.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.protocols import LANDMARK_NAMES
from dreamdance.dancers.landmarks import EAR, FINGER_ROOTS, face_points
from dreamdance.dancers.motion import Proportions, Skeleton

_Array = NDArray[np.floating[Any]]
_Pair = tuple[_Array, _Array]

_INDEX = {name: number for number, name in enumerate(LANDMARK_NAMES)}

# The body that gives the unit of length: means of the dancers' proportions at a height of 1.70 m.
STANDARD = Proportions(
    height=1.70, girth=1.0, shoulder_width=0.182, hip_width=0.094, thigh=0.368, shin=0.368, spine=0.50, neck=0.088,
    upper_arm=0.28, forearm=0.245, hand=0.185, head=1.03,
)  # fmt: skip
_NECK_OVER_SHOULDERS = 0.035  # metres from the middle of the shoulders to the base of the neck
_PELVIS_OVER_HIPS = 0.03  # metres from the middle of the hips to the pelvis

# The bones whose lengths give the scale: (name without side of the one end, of the other, standard length in metres).
_BONES = (
    ("shoulder", "elbow", STANDARD.upper_arm),
    ("elbow", "wrist", STANDARD.forearm),
    ("hip", "knee", STANDARD.thigh),
    ("knee", "ankle", STANDARD.shin),
    ("shoulder", "hip", STANDARD.spine - _NECK_OVER_SHOULDERS + _PELVIS_OVER_HIPS),
)
# Bones with a less visible end do not count for the scale.
_VISIBLE = 0.5
# Standard deviation, in frames, of the filter that smooths the scale over time.
_SCALE_SMOOTHING = 4.0


@dataclass(frozen=True)
class SeenBody:
    """A skeleton as a pinhole camera sees it.

    Attributes:
        skeleton: joints and frames in camera space (x right, y up, z towards the camera, which is at the origin).
        proportions: sizes of the body, constant over the clip.
        focal: focal length in pixels; the principal point is the picture's centre.
        visibility: `(f, 33)` of the landmarks.
    """

    skeleton: Skeleton
    proportions: Proportions
    focal: float
    visibility: _Array


def find_skeleton(
    landmarks: NDArray[np.float32], *, width: int, height: int, focal: float, nearest: float
) -> SeenBody:  # fmt: skip
    """Turns landmarks into a skeleton.

    Args:
        landmarks: `(f, 33, 4)` of `PersonPoses`.
        width, height: the picture's size in pixels.
        focal: assumed focal length, in the longer sides of the picture.
        nearest: least distance of the hips in metres; a longer focal length is assumed where the body were nearer.
    """
    pixels = landmarks[..., :3].astype(np.float64) * (width, -height, width) + (-0.5 * width, 0.5 * height, 0.0)
    visibility = landmarks[..., 3].astype(np.float64)
    scale = _find_scale(*_bone_lengths(pixels, visibility))
    focal_pixels = max(focal * max(width, height), nearest * float(scale.max()))
    distance = focal_pixels / scale[:, None]
    depth = np.maximum(distance - pixels[..., 2] / scale[:, None], 0.4 * distance)
    points = np.concatenate([pixels[..., :2] * (depth / focal_pixels)[..., None], -depth[..., None]], axis=-1)
    skeleton, proportions = _build(points)
    return SeenBody(skeleton, proportions, focal_pixels, visibility)


def _bone_lengths(pixels: _Array, visibility: _Array) -> tuple[_Array, NDArray[np.bool_]]:
    """Logarithms of lengths of bones in pixels per metre of a standard body, `(f, n)`, and which of them are seen."""
    logs, seen = [], []
    for first, second, standard in _BONES:
        for side in ("left", "right"):
            ends = [_INDEX[f"{side}_{name}"] for name in (first, second)]
            length = np.linalg.norm(pixels[:, ends[0]] - pixels[:, ends[1]], axis=-1)
            logs.append(np.log(np.maximum(length, 1e-3) / standard))
            seen.append(visibility[:, ends].min(axis=-1) >= _VISIBLE)
    visible = np.stack(seen, axis=1)
    visible[~visible.any(axis=1)] = True
    return np.stack(logs, axis=1), visible


def _find_scale(logs: _Array, seen: NDArray[np.bool_]) -> _Array:
    """Pixels per metre in each frame `(f,)`, smoothed, from lengths of bones; each bone's own is fitted to the clip."""
    logs = np.where(seen, logs, np.nan)
    scale = np.nanmedian(logs, axis=1)
    own = [np.median(column[used]) if (used := np.isfinite(column)).any() else 0.0
           for column in (logs - scale[:, None]).T]  # fmt: skip
    scale = np.nanmedian(logs - np.array(own), axis=1)
    smooth = cv2.GaussianBlur(scale[None], (0, 0), _SCALE_SMOOTHING, borderType=cv2.BORDER_REPLICATE)
    result: _Array = np.exp(np.asarray(smooth, dtype=np.float64)[0])
    return result


def _unit(vectors: _Array, otherwise: _Array | tuple[float, float, float]) -> _Array:
    """Unit vectors; those that are nearly zero become `otherwise`."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    units: _Array = np.where(length > 1e-4, vectors / np.maximum(length, 1e-12), otherwise)
    return units


def _across(vectors: _Array, direction: _Array) -> _Array:
    """The parts of vectors that are perpendicular to unit vectors."""
    part: _Array = vectors - (vectors * direction).sum(axis=-1, keepdims=True) * direction
    return part


def _frame(left: _Array, up: _Array) -> _Array:
    """Frames `(f, 3, 3)` with the column y along `up` and x as near `left` as can be."""
    y = _unit(up, (0.0, 1.0, 0.0))
    x = _unit(_across(left, y), _unit(_across(np.array([1.0, 0.0, 0.0]), y), (0.0, 0.0, 1.0)))
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _build(points: _Array) -> tuple[Skeleton, Proportions]:
    def at(name: str) -> _Array:
        return points[:, _INDEX[name]]

    def pair(name: str) -> _Pair:
        return at(f"left_{name}"), at(f"right_{name}")

    hips, shoulders = pair("hip"), pair("shoulder")
    low, high = 0.5 * (hips[0] + hips[1]), 0.5 * (shoulders[0] + shoulders[1])
    up = _unit(high - low, (0.0, 1.0, 0.0))
    pelvis, neck = low + _PELVIS_OVER_HIPS * up, high + _NECK_OVER_SHOULDERS * up
    spine = neck - pelvis
    pelvis_frame, chest_frame = _frame(hips[0] - hips[1], up), _frame(shoulders[0] - shoulders[1], up)
    head, head_frame, head_size = _fit_head(points)
    wrists, elbows = pair("wrist"), pair("elbow")
    hand_frames, hand_length = _fit_hands(points, elbows, wrists)
    knees, ankles = pair("knee"), pair("ankle")
    foot_frames = (
        _fit_foot(at("left_heel"), at("left_foot_index"), ankles[0], knees[0]),
        _fit_foot(at("right_heel"), at("right_foot_index"), ankles[1], knees[1]),
    )
    curls = np.full((len(points), 5), 0.3)
    skeleton = Skeleton(
        pelvis=pelvis, waist=pelvis + 0.36 * spine, chest=pelvis + 0.66 * spine, neck=neck, head=head,
        pelvis_frame=pelvis_frame, chest_frame=chest_frame, head_frame=head_frame, shoulders=shoulders, elbows=elbows,
        wrists=wrists, hand_frames=hand_frames, finger_curls=(curls, curls), hips=hips, knees=knees, ankles=ankles,
        foot_frames=foot_frames,
    )  # fmt: skip

    def length(first: _Array, second: _Array) -> float:
        return float(np.median(np.linalg.norm(first - second, axis=-1)))

    proportions = Proportions(
        height=STANDARD.height,
        girth=1.0,
        shoulder_width=float(np.clip(length(*shoulders) / 2, 0.8 * STANDARD.shoulder_width, 0.24)),
        hip_width=float(np.clip(length(*hips) / 2, 0.8 * STANDARD.hip_width, 0.13)),
        thigh=length(hips[0], knees[0]),
        shin=length(knees[0], ankles[0]),
        spine=length(pelvis, neck),
        neck=STANDARD.neck,
        upper_arm=length(shoulders[0], elbows[0]),
        forearm=length(elbows[0], wrists[0]),
        hand=hand_length,
        head=head_size,
    )
    return skeleton, proportions


@cache
def _head_points() -> _Array:
    """The 11 landmarks of the head `(11, 3)` in its own frame, for a head factor of 1."""
    face = face_points()
    left, right = face[42:48].mean(axis=0), face[36:42].mean(axis=0)
    return np.stack(
        [
            face[30], face[42], left, face[45], face[39], right, face[36], EAR, EAR * (-1.0, 1.0, 1.0), face[54],
            face[48],
        ]
    )  # fmt: skip


def _fit_head(points: _Array) -> tuple[_Array, _Array, float]:
    """Centre, frame and size of the head: the rigid motion that brings its landmarks closest, by least squares."""
    known, seen = _head_points(), points[:, :11]
    middle = known.mean(axis=0)
    centre = seen.mean(axis=1)
    moment = np.einsum("fpi,pj->fij", seen - centre[:, None], known - middle)
    u, values, v = np.linalg.svd(moment)
    signs = np.ones((len(points), 3))
    signs[:, 2] = np.sign(np.linalg.det(u @ v))
    frame = (u * signs[:, None]) @ v
    size = float(np.clip(np.median((values * signs).sum(axis=-1) / ((known - middle) ** 2).sum()), 0.85, 1.3))
    return centre - frame @ (middle * size), frame, size


def _fit_hands(points: _Array, elbows: _Pair, wrists: _Pair) -> tuple[_Pair, float]:
    """Frames of both hands from the roots of index and little finger; and the length of a hand."""
    roots = 0.5 * (FINGER_ROOTS[1, 1] + FINGER_ROOTS[4, 1])
    frames, lengths = [], []
    for name, sign, elbow, wrist in zip(("left", "right"), (1.0, -1.0), elbows, wrists, strict=True):
        index, pinky = points[:, _INDEX[f"{name}_index"]], points[:, _INDEX[f"{name}_pinky"]]
        along = 0.5 * (index + pinky) - wrist
        lengths.append(np.linalg.norm(along, axis=-1) / roots)
        along = _unit(along, _unit(wrist - elbow, (0.0, -1.0, 0.0)))
        thumb = _unit(_across(index - pinky, along), _unit(_across(np.array([0.0, 0.0, 1.0]), along), (1.0, 0.0, 0.0)))
        frames.append(np.stack([thumb, along, np.cross(along, thumb) * sign], axis=-1))
    length = float(np.clip(np.median(np.concatenate(lengths)), 0.85 * STANDARD.hand, 1.2 * STANDARD.hand))
    return (frames[0], frames[1]), length


def _fit_foot(heel: _Array, toes: _Array, ankle: _Array, knee: _Array) -> _Array:
    """The frame of a foot `(f, 3, 3)`: forward from heel to toes, up towards the ankle."""
    forward = _unit(toes - heel, (0.0, 0.0, 1.0))
    up = _across(ankle - heel, forward)
    shin = _across(knee - ankle, forward)
    # A heel right below the ankle says little: the shin decides then.
    y = _unit(up + 0.2 * shin, _unit(_across(np.array([0.0, 1.0, 0.0]), forward), (1.0, 0.0, 0.0)))
    return np.stack([np.cross(y, forward), y, forward], axis=-1)
