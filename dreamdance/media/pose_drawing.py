"""Draws key points as a picture in the DWPose / OpenPose convention: coloured limbs, hands, white dots of the face.

DWPose draws in pixels that suit a short side of about 512; here every width is relative to the picture, and small
pictures are drawn larger and averaged down, so that a pose is readable, and moves smoothly, at 32x48 too.
"""

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD, FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND

_DESIGN_SIDE = 512
_SMALLEST_CANVAS = 192  # pixels of the short side below which a picture is drawn larger and averaged down
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_BODY_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
_LIMB_SHADE = 0.6
_HAND_EDGES = tuple(
    (0 if step == 0 else 4 * finger + step, 4 * finger + step + 1) for finger in range(5) for step in range(4)
)
_HAND_COLOURS = tuple(
    tuple(int(255 * part) for part in colorsys.hsv_to_rgb(edge / len(_HAND_EDGES), 1.0, 1.0))
    for edge in range(len(_HAND_EDGES))
)
_HAND_JOINT_COLOUR = (0, 0, 255)
_FACE_COLOUR = (255, 255, 255)
_UNIT_CIRCLE = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 24, False)), np.sin(np.linspace(0, 2 * np.pi, 24, False))], axis=-1
)
_SHIFT = 4  # fractional bits of OpenCV's coordinates


def draw_pose(
    keypoints: NDArray[np.floating[Any]], *, width: int, height: int, threshold: float = CONFIDENCE_THRESHOLD
) -> NDArray[np.uint8]:
    """Draws one person on black.

    Args:
        keypoints: `(128, 3)`: x, y in [0,1] of the frame, confidence (`media.keypoints`).
        width, height: size of the picture in pixels.
        threshold: points of lower confidence are not drawn, nor are limbs that end in one.

    Returns:
        `(height, width, 3)` uint8, red, green, blue.
    """
    if keypoints.shape != (NUM_KEYPOINTS, 3):
        raise ValueError(f"key points must be ({NUM_KEYPOINTS}, 3); got {keypoints.shape}")
    short_side = min(width, height)
    factor = max(1, math.ceil(_SMALLEST_CANVAS / short_side))
    canvas = np.zeros((height * factor, width * factor, 3), dtype=np.uint8)
    points = keypoints[:, :2].astype(np.float64) * (width * factor, height * factor)
    drawn = keypoints[:, 2] >= threshold
    widths = _Widths.for_side(short_side, factor)
    _draw_body(canvas, points[BODY], drawn[BODY], widths)
    for hand in (LEFT_HAND, RIGHT_HAND):
        _draw_hand(canvas, points[hand], drawn[hand], widths)
    for point in points[FACE][drawn[FACE]]:
        _draw_dot(canvas, point, widths.face_dot, _FACE_COLOUR)
    if factor == 1:
        return canvas
    return np.asarray(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def draw_poses(
    keypoints: NDArray[np.floating[Any]], *, width: int, height: int, threshold: float = CONFIDENCE_THRESHOLD
) -> NDArray[np.uint8]:
    """Draws a clip's key points `(f, 128, 3)`: `(f, height, width, 3)` uint8."""
    return np.stack([draw_pose(frame, width=width, height=height, threshold=threshold) for frame in keypoints])


@dataclass(frozen=True)
class _Widths:
    """Sizes in canvas pixels: half a limb's width, radii of joints and dots, and the width of hand edges."""

    limb: float
    joint: float
    hand_edge: float
    hand_joint: float
    face_dot: float

    @classmethod
    def for_side(cls, short_side: int, factor: int) -> "_Widths":
        """DWPose's 4, 4, 2, 4 and 3 pixels at 512, with a lower limit that keeps lines visible in small pictures."""
        scale = short_side / _DESIGN_SIDE
        return cls(
            limb=factor * max(4 * scale, 0.7),
            joint=factor * max(4 * scale, 0.7),
            hand_edge=factor * max(2 * scale, 0.5),
            hand_joint=factor * max(4 * scale, 0.35),
            face_dot=factor * max(3 * scale, 0.25),
        )


def _draw_body(
    canvas: NDArray[np.uint8], points: NDArray[np.floating[Any]], drawn: NDArray[np.bool_], widths: _Widths
) -> None:
    for (first, second), colour in zip(_LIMBS, _BODY_COLOURS, strict=False):
        if drawn[first] and drawn[second]:
            middle, half = (points[first] + points[second]) / 2, (points[second] - points[first]) / 2
            length = float(np.hypot(*half))
            along = half / length if length > 0 else np.array([1.0, 0.0])
            across = np.array([-along[1], along[0]])
            outline = (
                middle
                + np.outer(_UNIT_CIRCLE[:, 0] * length, along)
                + np.outer(_UNIT_CIRCLE[:, 1] * widths.limb, across)
            )
            shade = tuple(int(part * _LIMB_SHADE) for part in colour)
            cv2.fillConvexPoly(canvas, _fixed_point(outline), shade, cv2.LINE_8, _SHIFT)
    for point, visible, colour in zip(points, drawn, _BODY_COLOURS, strict=True):
        if visible:
            _draw_dot(canvas, point, widths.joint, colour)


def _draw_hand(
    canvas: NDArray[np.uint8], points: NDArray[np.floating[Any]], drawn: NDArray[np.bool_], widths: _Widths
) -> None:
    for (first, second), colour in zip(_HAND_EDGES, _HAND_COLOURS, strict=True):
        if drawn[first] and drawn[second]:
            ends = _fixed_point(points[[first, second]])
            thickness = max(1, round(widths.hand_edge))
            cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), colour, thickness, cv2.LINE_8, _SHIFT)
    for point in points[drawn]:
        _draw_dot(canvas, point, widths.hand_joint, _HAND_JOINT_COLOUR)


def _draw_dot(
    canvas: NDArray[np.uint8], point: NDArray[np.floating[Any]], radius: float, colour: tuple[int, ...]
) -> None:
    centre = _fixed_point(point)
    cv2.circle(canvas, centre.tolist(), round(radius * (1 << _SHIFT)), colour, -1, cv2.LINE_8, _SHIFT)


def _fixed_point(points: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
    """Converts coordinates with pixel centres at halves to OpenCV's fixed point, with centres at whole numbers."""
    limited = np.clip(points, -1e4, 1e4)
    fixed: NDArray[np.int32] = np.rint((limited - 0.5) * (1 << _SHIFT)).astype(np.int32)
    return fixed
