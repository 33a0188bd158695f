"""A first look at a video for a plan: its size and length by its header and first frame, without reading the file."""

from dataclasses import dataclass
from pathlib import Path

import av

from dreamdance.media.video_container import Damage, VideoError, decoded_frames, opened_video
from dreamdance.media.video_display import Display


@dataclass(frozen=True)
class Glance:
    """What a header states.

    Attributes:
        width, height: of the frames as a player shows them.
        fps: the average frame rate, 0 if it is not stated.
        seconds: the length; None if the header does not state it.
    """

    width: int
    height: int
    fps: float
    seconds: float | None


def glance_at(path: Path) -> Glance:
    """Opens a video and decodes its first frame.

    Raises:
        VideoError: the file cannot be read.
    """
    with opened_video(path) as (container, stream):
        first = next((frame for frame in decoded_frames(container, stream) if not isinstance(frame, Damage)), None)
        if first is None:
            raise VideoError(f"{path} holds no frame that can be decoded")
        width, height = Display.of(first, stream, path).size
        seconds = None if container.duration is None else container.duration / av.time_base
        return Glance(width, height, float(stream.average_rate or 0), seconds)
