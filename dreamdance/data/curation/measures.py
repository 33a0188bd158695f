"""Measures the scores of a clip whose definition is not a module of its own; `scores` lists all of them."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD

# Higher frames are reduced to this height before sharpness is measured, so that a video's size matters less.
SHARPNESS_HEIGHT = 512
# A number of people that is seen in fewer of the frames than this is a false detection.
_LEAST_PEOPLE_SHARE = 0.05
# Pixels at the outline of the body, which show an edge however blurred the body is.
_OUTLINE_PIXELS = 2


def measure_cut(probabilities: NDArray[np.floating[Any]]) -> float | None:
    """The score `cut` from the probabilities of a clip's frames, `(f,)`: that of its last frame lies at its end."""
    inside = np.asarray(probabilities)[:-1]
    return float(inside.max()) if len(inside) else None


def measure_sharpness(rgb: NDArray[np.uint8], mask: NDArray[Any]) -> float | None:
    """The score `sharpness`: the median over the frames.

    Args:
        rgb: `(f, H, W, 3)` uint8.
        mask: `(f, H, W)`, more than 0.5 on the body (or bool).

    Returns:
        The variance; None if no frame shows the body's inside.
    """
    values = [_frame_sharpness(frame, inside) for frame, inside in zip(rgb, mask, strict=True)]
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _frame_sharpness(frame: NDArray[np.uint8], mask: NDArray[Any]) -> float | None:
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32)
    body = (np.asarray(mask) > 0.5).astype(np.uint8)
    if grey.shape[0] > SHARPNESS_HEIGHT:
        size = (max(1, round(grey.shape[1] * SHARPNESS_HEIGHT / grey.shape[0])), SHARPNESS_HEIGHT)
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), dtype=np.float32)
        body = np.asarray(cv2.resize(body, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    kernel = np.ones((2 * _OUTLINE_PIXELS + 1,) * 2, np.uint8)
    inside = cv2.erode(body, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1).astype(bool)
    return float(cv2.Laplacian(grey, cv2.CV_32F)[inside].var()) if inside.any() else None


def measure_visible_joints(keypoints: NDArray[np.floating[Any]]) -> float | None:
    """The score `visible_joints` of key points `(f, 128, 3)`; a joint counts if its pose would be drawn."""
    body = keypoints[:, BODY]
    inside = ((body[..., :2] >= 0) & (body[..., :2] <= 1)).all(axis=-1)
    return float((inside & (body[..., 2] >= CONFIDENCE_THRESHOLD)).mean()) if len(body) else None


def measure_people(counts: Sequence[int]) -> int | None:
    """The score `people`: the largest number of people in one frame that is seen in at least 5 % of the frames.

    Args:
        counts: the number of people in each frame of the clip.
    """
    if not len(counts):
        return None
    ordered = np.sort(np.asarray(counts, np.int64))[::-1]
    return int(ordered[math.ceil(_LEAST_PEOPLE_SHARE * len(ordered)) - 1])
