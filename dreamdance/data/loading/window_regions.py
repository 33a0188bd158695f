"""The boxes of face and hands in a training window."""

import torch
from torch import Tensor

from dreamdance.data.loading.clip_frames import shown_part
from dreamdance.data.loading.stored_clip import StoredClip, Window
from dreamdance.data.shards.tracks import Subject
from dreamdance.media.cropping import PartialCrop
from dreamdance.media.keypoint_regions import REGIONS, UNKNOWN, boxes_within, region_boxes
from dreamdance.media.keypoints import flip_keypoints


def window_regions(clip: StoredClip, window: Window, *, width: int, height: int) -> Tensor:
    """The boxes in the shown part of each frame, `f 3 5` (`ClipBatch.regions`); unknown ones without key points.

    If `window.reference_first`, those of the reference come first, in its own crop.

    Args:
        clip: the window's clip.
        window: frames, whether they are mirrored, and their crop.
        width, height: the size of the returned frames, whose aspect decides what is shown.

    Raises:
        ShardError: the key points are damaged.
    """
    number, subject = window.reference.number, window.reference.subject
    first = [(subject, [number], window.reference_crop)] if window.reference_first else []
    parts = [*first, ("clip", window.frames, window.crop)]
    return torch.cat([_regions(clip, *part, flip=window.flip, size=(width, height)) for part in parts])


def _regions(
    clip: StoredClip,
    subject: Subject,
    frames: list[int],
    crop: PartialCrop | None,
    *,
    flip: bool,
    size: tuple[int, int],
) -> Tensor:
    if not clip.has_keypoints_of(subject):
        return torch.tensor([0.0, 0.0, 0.0, 0.0, UNKNOWN]).repeat(len(frames), len(REGIONS), 1)
    keypoints = clip.keypoints_of(frames, subject=subject)
    boxes = region_boxes(flip_keypoints(keypoints) if flip else keypoints)
    frame = clip.width, clip.height
    return torch.from_numpy(boxes_within(boxes, frame, shown_part(frame, size, crop)))
