"""Boxes of face and hands from key points."""

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.cropping import Crop
from dreamdance.media.keypoints import CONFIDENCE_THRESHOLD, FACE, LEFT_HAND, RIGHT_HAND

# The regions of `region_boxes`, in its order. Each belongs to a key of `objective.region_weights`.
REGIONS = (("face", FACE), ("hands", LEFT_HAND), ("hands", RIGHT_HAND))
# The confidence of a region in frames whose key points are not known at all.
UNKNOWN = -1.0

# With fewer certain points a region's extent is not known.
_FEWEST_POINTS = 4
# Key points of a face end at the brows, those of a hand are on its bones: the box is wider by this share of its size on
# each side.
_MARGIN = 0.25


def region_boxes(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """The boxes of face, left hand and right hand in each frame.

    Args:
        keypoints: `(f, 128, 3)`, see `media.keypoints`.

    Returns:
        `(f, 3, 5)`: left, top, right and bottom as fractions of the frame, with a margin, and the mean confidence of
        the points inside, 0 where fewer than 4 points are certain enough to be drawn.
    """
    boxes = np.zeros((len(keypoints), len(REGIONS), 5), np.float32)
    for frame, points in enumerate(keypoints):
        for number, (_, members) in enumerate(REGIONS):
            certain = points[members][points[members, 2] >= CONFIDENCE_THRESHOLD]
            if len(certain) < _FEWEST_POINTS:
                continue
            low, high = certain[:, :2].min(axis=0), certain[:, :2].max(axis=0)
            margin = _MARGIN * (high - low)
            boxes[frame, number] = [*(low - margin), *(high + margin), certain[:, 2].mean()]
    return boxes


def boxes_within(boxes: NDArray[np.float32], frame: tuple[int, int], part: Crop) -> NDArray[np.float32]:
    """The same boxes as fractions of a part of the frame; they may reach beyond it.

    Args:
        boxes: as `region_boxes` gives them.
        frame: width and height in pixels.
        part: the part, in pixels.
    """
    scale = np.array([frame[0] / part.width, frame[1] / part.height] * 2, np.float32)
    offset = np.array([part.left / part.width, part.top / part.height] * 2, np.float32)
    return np.concatenate([boxes[..., :4] * scale - offset, boxes[..., 4:]], axis=-1)
