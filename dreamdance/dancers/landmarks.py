"""A dancer's 128 key points in space: joints of the body, fingers, and 68 points on the face.

It also holds the measures of face and hands. The shapes use them too, so that points and shapes agree.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.motion import Proportions, Skeleton

_Array = NDArray[np.floating[Any]]

# Measures of a head in its own frame (left, up, forward), in metres, for a head factor of 1.
SKULL, SKULL_RADIUS = np.array([0.0, 0.022, 0.0]), 0.084
CHIN, CHIN_RADIUS = np.array([0.0, -0.066, 0.029]), 0.045
HEAD_STRETCH = np.array([0.89, 1.0, 1.06])
NOSE = (np.array([0.0, 0.000, 0.080]), np.array([0.0, -0.034, 0.092]))
NOSE_RADII = (0.007, 0.012)
EAR = np.array([0.076, -0.008, -0.008])

# Roots of the fingers, thumb first: (towards the thumb's side, along the hand), in hand lengths from the wrist.
FINGER_ROOTS = np.array([[0.30, 0.16], [0.24, 0.50], [0.08, 0.52], [-0.08, 0.49], [-0.22, 0.44]])

_FINGER_SPREAD = np.array([0.75, 0.16, 0.03, -0.09, -0.24])
_FINGER_BONES = np.array(
    [[0.20, 0.16, 0.13], [0.22, 0.13, 0.10], [0.24, 0.14, 0.11], [0.22, 0.13, 0.10], [0.17, 0.10, 0.09]]
)
# Radius of a finger, in hand lengths.
FINGER_RADIUS = 0.045


@dataclass(frozen=True)
class Landmarks:
    """Key points `(f, 128, 3)` in world space, metres, and how deep below the skin each may lie, `(128,)` metres."""

    points: _Array
    skin_depths: _Array


def find_landmarks(skeleton: Skeleton, body: Proportions) -> Landmarks:
    """Collects the key points in their order (`media.keypoints`)."""
    face = face_points() * body.head
    face = skeleton.head[:, None] + np.einsum("fij,pj->fpi", skeleton.head_frame, face)
    eyes_and_ears = np.stack(
        [
            _on_face(-0.031, 0.004), _on_face(0.031, 0.004),
            EAR * (-1.0, 1.0, 1.0), EAR,
        ]
    ) * body.head  # fmt: skip
    eyes_and_ears = skeleton.head[:, None] + np.einsum("fij,pj->fpi", skeleton.head_frame, eyes_and_ears)
    nose = face[:, 30]
    (left_arm, right_arm), (left_leg, right_leg) = (
        [np.stack([part[side] for part in parts], axis=1) for side in (0, 1)]
        for parts in (
            (skeleton.shoulders, skeleton.elbows, skeleton.wrists),
            (skeleton.hips, skeleton.knees, skeleton.ankles),
        )
    )
    neck = 0.5 * (skeleton.shoulders[0] + skeleton.shoulders[1])
    trunk = np.stack([nose, neck], axis=1)
    hands = [hand_points(skeleton, body, side) for side in (0, 1)]
    points = np.concatenate([trunk, right_arm, left_arm, right_leg, left_leg, eyes_and_ears, *hands, face], axis=1)
    arm, leg = [0.10, 0.07, 0.05], [0.16, 0.09, 0.08]
    depths = [0.016, 0.12, *arm, *arm, *leg, *leg, 0.016, 0.016, 0.03, 0.03, *[0.022] * 42, *[0.016] * 68]
    scale = np.full(128, body.head)
    scale[1:14] = body.girth
    return Landmarks(points, np.array(depths) * scale)


def hand_points(skeleton: Skeleton, body: Proportions, side: int) -> _Array:
    """The 21 points of a hand `(f, 21, 3)`: the wrist, then four of each finger from root to tip, thumb first."""
    frame, curls = skeleton.hand_frames[side], skeleton.finger_curls[side]
    points = [np.zeros((len(curls), 3))]
    for finger in range(5):
        spread, bones, curl = _FINGER_SPREAD[finger], _FINGER_BONES[finger], curls[:, finger]
        across, along = np.sin(spread), np.cos(spread)
        bend = curl * (0.7 if finger == 0 else 1.35)
        turn = bend + curl * (0.6 if finger == 0 else 1.5)
        root = np.array([*FINGER_ROOTS[finger], 0.0])
        first = np.stack([np.cos(bend) * across, np.cos(bend) * along, np.sin(bend)], axis=-1)
        # The last two bones lie in one line: their shapes are one cone, and its middle point is the joint's.
        second = np.stack([np.cos(turn) * across, np.cos(turn) * along, np.sin(turn)], axis=-1)
        joint = root + bones[0] * first
        points += [np.broadcast_to(root, joint.shape), joint, joint + bones[1] * second]
        points += [joint + (bones[1] + bones[2]) * second]
    local = np.stack(points, axis=1) * body.hand
    return skeleton.wrists[side][:, None] + np.einsum("fij,fpj->fpi", frame, local)


@dataclass(frozen=True)
class Foot:
    """A foot in its own frame, origin at the ankle: centres `(3,)` and radii of heel and ball, in metres."""

    heel: _Array
    ball: _Array
    heel_radius: float
    ball_radius: float


def find_foot(body: Proportions) -> Foot:
    """The foot of a body."""
    sole = 0.036 * body.height / 1.72
    return Foot(
        heel=np.array([0.0, sole - body.ankle, -0.035]),
        ball=np.array([0.0, sole * 0.86 - body.ankle, 0.075 * body.height]),
        heel_radius=sole,
        ball_radius=sole * 0.86,
    )


def foot_points(skeleton: Skeleton, body: Proportions) -> _Array:
    """Centres of the heels and tips of the toes `(f, 4, 3)`: left heel, right heel, left toes, right toes."""
    foot = find_foot(body)
    tip = foot.ball + np.array([0.0, 0.0, foot.ball_radius])
    return np.stack(
        [
            ankle + frame @ point
            for point in (foot.heel, tip)
            for ankle, frame in zip(skeleton.ankles, skeleton.foot_frames, strict=True)
        ],
        axis=1,
    )


def _on_face(x: float, y: float) -> _Array:
    """Finds the point of the head's front surface at x, y of its frame; the head is the hull of skull and chin.

    The hull is the union of all spheres between its two ends. This function samples the spheres so finely that the
    error is below a tenth of a millimetre. Outside of the outline the point has the outline's depth.
    """
    shares = np.linspace(0.0, 1.0, 257)[:, None]
    centres = SKULL + (CHIN - SKULL) * shares
    radii = SKULL_RADIUS + (CHIN_RADIUS - SKULL_RADIUS) * shares[:, 0]
    inside = radii**2 - (x / HEAD_STRETCH[0] - centres[:, 0]) ** 2 - (y / HEAD_STRETCH[1] - centres[:, 1]) ** 2
    fronts = centres[:, 2] + np.sqrt(np.maximum(inside, 0.0))
    front = float(fronts[inside > 0].max()) if (inside > 0).any() else float(fronts[np.argmax(inside)])
    return np.array([x, y, front * HEAD_STRETCH[2]])


@cache
def face_points() -> _Array:
    """The 68 points `(68, 3)` in iBUG order in the head's frame, for a head factor of 1; the first is at its right."""
    angles = np.linspace(0.0, np.pi, 17)
    jaw = [(-0.0645 * np.cos(a) * (1 - 0.30 * np.sin(a) ** 2), -0.107 * np.sin(a) ** 0.9) for a in angles]
    brow = [(0.050, 0.023), (0.043, 0.029), (0.034, 0.031), (0.024, 0.030), (0.014, 0.027)]
    eye = [(0.044, 0.004), (0.036, 0.0095), (0.027, 0.0095), (0.019, 0.003), (0.027, -0.001), (0.036, -0.001)]
    upper_lip = [(0.024, -0.0645), (0.015, -0.062), (0.006, -0.0595), (0.0, -0.061)]
    lower_lip = [(0.015, -0.073), (0.007, -0.0765), (0.0, -0.0775)]
    inner_lip = [(0.019, -0.0655), (0.007, -0.065), (0.0, -0.0655)]

    def mirrored(half: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(-x, y) for x, y in half]

    mouth = mirrored(upper_lip) + upper_lip[2::-1] + lower_lip + mirrored(lower_lip[1::-1])
    inner = mirrored(inner_lip) + inner_lip[1::-1] + [(0.007, -0.0695), (0.0, -0.0705), (-0.007, -0.0695)]
    left_eye = [eye[3], eye[2], eye[1], eye[0], eye[5], eye[4]]
    flat = jaw + mirrored(brow) + brow[::-1]
    on_skin = np.stack([_on_face(x, y) for x, y in flat])
    bridge = [
        NOSE[0] + (NOSE[1] - NOSE[0]) * part + (0, 0, NOSE_RADII[0] + 0.005 * part) for part in (0, 1 / 3, 2 / 3, 1)
    ]
    nostrils = [
        np.array([x, -0.044 - 0.003 * (x == 0), 0.100 - 0.9 * abs(x)]) for x in (-0.014, -0.007, 0.0, 0.007, 0.014)
    ]
    rest = np.stack([_on_face(x, y) for x, y in mirrored(eye) + left_eye + mouth + inner])
    return np.concatenate([on_skin, np.stack(bridge), np.stack(nostrils), rest])
