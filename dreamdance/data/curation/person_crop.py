"""Chooses the part of the frames that a clip keeps: around its person, one crop for all frames of the clip."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.cropping import Crop, centred_crop
from dreamdance.media.keypoints import CONFIDENCE_THRESHOLD

# Free space around the person, as a share of the height of the box that holds the person in all frames.
DEFAULT_MARGIN = 0.1


@dataclass(frozen=True)
class PersonCrop:
    """The crop of a clip.

    Attributes:
        crop: the same for all frames.
        follows: whether it holds the person in every frame; if not, it is the largest centred one.
    """

    crop: Crop
    follows: bool


def crop_person(
    keypoints: NDArray[np.floating[Any]],
    mask: NDArray[np.floating[Any]] | NDArray[np.bool_] | None = None,
    *,
    width: int,
    height: int,
    to_width: int,
    to_height: int,
    margin: float = DEFAULT_MARGIN,
) -> PersonCrop:
    """Finds the smallest crop of the stored frames' aspect that holds the person in all frames of a clip.

    It has at least the size of the stored frames where the video is large enough, so that nothing is enlarged. If the
    margin does not fit, it is smaller; if the person does not fit, the crop is the largest centred one.

    Args:
        keypoints: `(f, 128, 3)`, x and y in [0,1] of the frame. No point of confidence 0.3 or more is cut, except those
            that the frame itself cuts.
        mask: `(f, H, W)`, more than 0.5 on the person: the hair above and the feet below the key points. Optional.
        width, height: size of the frames in pixels.
        to_width, to_height: size of the stored frames in pixels.
        margin: free space, as a share of the height of the person's box; not negative.

    Returns:
        The crop. Its aspect is that of the stored frames to a pixel.

    Raises:
        ValueError: a size or the margin is out of its range.
    """
    if min(width, height, to_width, to_height) < 1 or margin < 0.0:
        raise ValueError(f"cannot crop {width}x{height} to {to_width}x{to_height} with a margin of {margin:g}")
    largest = centred_crop(width, height, to_width=to_width, to_height=to_height)
    joints = _joint_box(keypoints, width, height)
    if joints is None:
        return PersonCrop(largest, follows=False)
    person = _united(joints, _mask_box(mask, width, height))
    space = margin * (person[3] - person[1])
    wanted = (person[0] - space, person[1] - space, person[2] + space, person[3] + space)
    for box in (wanted, person, joints):
        crop = _smallest_crop(_within_frame(box, width, height), largest, width, height, (to_width, to_height))
        if _holds(crop, joints):
            return PersonCrop(crop, follows=True)
    return PersonCrop(largest, follows=False)


def holds_joints(crop: Crop, keypoints: NDArray[np.floating[Any]], frame: Crop) -> bool:
    """Whether a crop cuts no visible joint off; also true if none is visible.

    Args:
        crop: a part of the frame.
        keypoints: `(f, 128, 3)`, x and y in [0,1] of the frame.
        frame: its size counts.
    """
    joints = _joint_box(keypoints, frame.width, frame.height)
    return joints is None or _holds(crop, joints)


# Left, top, right, bottom in pixels.
_Box = tuple[float, float, float, float]


def _joint_box(keypoints: NDArray[np.floating[Any]], width: int, height: int) -> _Box | None:
    """The box of all visible points within the frame; None without any."""
    x, y = keypoints[..., 0] * width, keypoints[..., 1] * height
    visible = keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    visible &= (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    if not visible.any():
        return None
    x, y = x[visible], y[visible]
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def _mask_box(mask: NDArray[np.floating[Any]] | NDArray[np.bool_] | None, width: int, height: int) -> _Box | None:
    if mask is None or not (covered := (np.asarray(mask) > 0.5).any(axis=0)).any():
        return None
    down, right = height / covered.shape[0], width / covered.shape[1]
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    return columns[0] * right, rows[0] * down, (columns[-1] + 1) * right, (rows[-1] + 1) * down


def _united(box: _Box, other: _Box | None) -> _Box:
    if other is None:
        return box
    return min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])


def _within_frame(box: _Box, width: int, height: int) -> _Box:
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))


def _smallest_crop(box: _Box, largest: Crop, width: int, height: int, to_size: tuple[int, int]) -> Crop:
    """The crop around the middle of a box, moved into the frame; at most the largest one of that aspect."""
    to_width, to_height = to_size
    needed = max(box[2] - box[0], (box[3] - box[1]) * to_width / to_height, float(to_width))
    if needed >= largest.width:
        crop_width, crop_height = largest.width, largest.height
    else:
        crop_width = int(np.ceil(needed))
        crop_height = min(largest.height, round(crop_width * to_height / to_width))
    left = round((box[0] + box[2] - crop_width) / 2)
    top = round((box[1] + box[3] - crop_height) / 2)
    return Crop(
        left=min(max(left, 0), width - crop_width),
        top=min(max(top, 0), height - crop_height),
        width=crop_width,
        height=crop_height,
    )


def _holds(crop: Crop, box: _Box) -> bool:
    return (
        crop.left <= box[0]
        and crop.top <= box[1]
        and crop.left + crop.width >= box[2]
        and crop.top + crop.height >= box[3]
    )
