"""Driving videos: which frames are taken, and how the found key points become the skeleton that is drawn."""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.people import Box, check_choice
from dreamdance.errors import UserError
from dreamdance.media.alignment import align_keypoints
from dreamdance.media.keypoint_filter import filter_keypoints
from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD, KeypointSequence
from dreamdance.media.leg_sides import exchange_legs, find_exchanged_legs
from dreamdance.media.retargeting import retarget_bones
from dreamdance.media.video import VideoInfo

MAX_DRIVING_FRAMES = 50_000
# A video of 29.97 frames per second may be asked for 30.
_RATE_TOLERANCE = 1.01


class NobodyFoundError(UserError):
    """A picture or a video shows no person that the annotator finds; the text names it."""


def check_options(*, align: str | None, person: int | Box | None, fps: float | None) -> None:
    """Checks what a user asks for, before a long search.

    Args:
        align: `scale`, `bones` or None.
        person: whom to follow, see `people.follow_person`.
        fps: frames per second, or None.

    Raises:
        UserError: a value is not accepted.
    """
    if align not in (None, "scale", "bones"):
        raise UserError(f"align {align!r} must be 'scale' or 'bones', or None, which leaves the skeleton as it is")
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and fps > 0):
        raise UserError(f"fps {fps!r} must be a number above 0, or None, which keeps the video's")
    check_choice(person)


def choose_frames(video: VideoInfo, fps: float | None) -> list[int]:
    """The numbers of the frames that drive, at a constant rate.

    Args:
        video: the driving video.
        fps: their rate; None keeps the video's. The motion keeps its speed.

    Raises:
        UserError: the rate is higher than the video's, or there are too many frames.
    """
    if fps is None:
        frames = video.constant_rate_frames()
    elif fps > _RATE_TOLERANCE * video.fps:
        raise UserError(f"{video.path} has {video.fps:g} frames per second; fps {fps:g} must not be more")
    else:
        last = video.times([video.num_frames - 1])[0]
        frames = video.frames_at((np.arange(int(last * fps + 1e-6) + 1) / fps).tolist())
    if len(frames) > MAX_DRIVING_FRAMES:
        raise UserError(f"{video.path} gives {len(frames)} frames; accepted are up to {MAX_DRIVING_FRAMES}")
    return frames


def to_sequence(video: VideoInfo, keypoints: NDArray[np.float32], *, fps: float, smooth: bool) -> KeypointSequence:
    """The skeleton that drives.

    Args:
        video: the driving video.
        keypoints: `(f, 128, 3)`, as found.
        fps: their rate.
        smooth: whether to smooth them over time, to fill short gaps and to put exchanged legs right.

    Raises:
        NobodyFoundError: no joint of a body was found in any frame.
    """
    if not _shows_body(keypoints):
        raise NobodyFoundError(
            f"{video.path}: nobody was found in {len(keypoints)} frames; give a video that shows one whole person, or "
            "choose the person by 'person'"
        )
    sequence = KeypointSequence(keypoints, video.width, video.height, fps)
    if not smooth:
        return sequence
    legs = exchange_legs(keypoints, find_exchanged_legs(sequence))
    return replace(sequence, keypoints=filter_keypoints(replace(sequence, keypoints=legs)))


def to_reference(keypoints: NDArray[np.float32], *, width: int, height: int, where: str) -> KeypointSequence:
    """The body of the reference picture, to which a skeleton is fitted.

    Args:
        keypoints: `(1, 128, 3)`, as found.
        width, height: size of the picture in pixels.
        where: the picture's name, for the error.

    Raises:
        NobodyFoundError: no joint of a body was found.
    """
    if not _shows_body(keypoints):
        raise NobodyFoundError(
            f"{where}: nobody was found in the picture, so no skeleton can be fitted to its body; give its key points "
            "as 'reference_keypoints', or remove 'align'"
        )
    return KeypointSequence(keypoints, width, height, 1.0)


def fit_sequence(driving: KeypointSequence, reference: KeypointSequence, align: str) -> KeypointSequence:
    """A driving skeleton on the body of the reference, in the reference's frame.

    Args:
        driving: the driving skeleton.
        reference: the body of the reference picture.
        align: `scale` (`align_keypoints`) or `bones` (`retarget_bones`).

    Raises:
        UserError: the skeleton cannot be fitted.
    """
    keypoints = (retarget_bones if align == "bones" else align_keypoints)(driving, reference)
    return replace(driving, keypoints=keypoints, width=reference.width, height=reference.height)


def _shows_body(keypoints: NDArray[np.float32]) -> bool:
    return bool((keypoints[:, BODY, 2] >= CONFIDENCE_THRESHOLD).any())
