"""Reads videos frame by frame, by their time stamps. All code that reads a video uses this module.

Frames are uint8 arrays `(H, W, 3)`, red, green, blue, as a player shows them; or, if asked for, uint16 `(H, W)` as a
video of 16-bit grey stores them. Frame k alone equals frame k of the whole
video: decoding starts at a key frame before frame k, or further back if that start does not give the frame.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dreamdance.media.video_container import (
    Damage,
    PacketList,
    VideoError,
    decoded_frames,
    list_packets,
    opened_video,
)
from dreamdance.media.video_display import Display, FrameConverter
from dreamdance.media.video_writing import write_video

__all__ = ["VideoError", "VideoInfo", "iterate_frames", "iterate_grey16", "probe_video", "read_frames", "write_video"]

MAX_FRAME_RATE = 1000.0


@dataclass(frozen=True)
class VideoInfo:
    """A video file: its size, rate and time stamps.

    Attributes:
        width, height: size of the frames as a player shows them, in pixels.
        fps: mean number of frames per second.
        stamps: the frames' time stamps in units of `time_base` seconds, rising: frame i is the one shown i-th.
        key_stamps: time stamps of the key frames.
        reach: for each frame, the latest stamp among the frames from which it may be predicted.
        counted: whether the stored frames have no usable stamps, so that they are counted from the beginning.
        display: the conversion of a stored frame to the shown one.
        codec: FFmpeg's name of the codec.
    """

    path: Path
    width: int
    height: int
    fps: float
    stamps: tuple[int, ...]
    time_base: Fraction
    key_stamps: tuple[int, ...] = field(repr=False)
    reach: tuple[int, ...] = field(repr=False)
    counted: bool
    display: Display = field(repr=False)
    codec: str = ""

    @property
    def num_frames(self) -> int:
        return len(self.stamps)

    def times(self, frames: Sequence[int]) -> list[float]:
        """Times at which a player shows the given frames, in seconds after the first."""
        return [float((self.stamps[frame] - self.stamps[0]) * self.time_base) for frame in frames]

    def frames_at(self, seconds: Sequence[float]) -> list[int]:
        """For each time, in seconds after the first frame, the number of the frame nearest to it; the earlier of two.

        Two aligned videos may have different stamps, for example one a constant rate and the other a varying rate.
        Frames at equal times show the same moment; frames with equal numbers do not.
        """
        stamps = np.array(self.times(range(self.num_frames)))
        wanted = np.asarray(seconds, dtype=np.float64)
        after = np.searchsorted(stamps, wanted).clip(0, len(stamps) - 1)
        before = np.maximum(after - 1, 0)
        slack = 1e-9 * max(1.0, float(stamps[-1]))  # half-way between two frames, rounding does not choose
        earlier = wanted - stamps[before] <= stamps[after] - wanted + slack
        return [int(frame) for frame in np.where(earlier, before, after)]

    def constant_rate_frames(self) -> list[int]:
        """For each tick of a constant rate, the number of the frame nearest to it; 0, 1, 2, ... in most videos.

        Phones record at a varying rate; frames taken by their numbers would show uneven motion.
        """
        last = self.times([self.num_frames - 1])[0]
        return self.frames_at(np.linspace(0.0, last, self.num_frames).tolist())


def probe_video(path: Path | str) -> VideoInfo:
    """Reads sizes, rate and time stamps; decodes one frame only, but all of an avi, whose stamps do not name frames.

    Raises:
        VideoError: the file does not exist, holds no video that can be decoded, or one that cannot be shown faithfully.
    """
    path = Path(path)
    packets = list_packets(path)
    with opened_video(path) as (container, stream):
        decoded = decoded_frames(container, stream)
        damage, first = _first_frame(decoded)
        if first is None or stream.time_base is None:
            raise VideoError(f"{path} holds no frame that can be decoded")
        display = Display.of(first, stream, path)
        stamps, reach = packets.stamps, packets.reach
        if not packets.ordered:
            stamps = reach = _counted_stamps(packets, [first.pts], decoded, stream)
        elif not damage and first.pts is not None and bisect_left(packets.key_stamps, first.pts) == 0:
            # The first frames of a cut video may depend on frames that were cut away; players skip them too.
            # (A key frame that cannot be decoded is damage.)
            missing = bisect_left(stamps, first.pts)
            stamps, reach = stamps[missing:], reach[missing:]
        duration = float((stamps[-1] - stamps[0]) * stream.time_base)
        rate = (len(stamps) - 1) / duration if duration > 0 else float(stream.average_rate or 1)
        if not 0.0 < rate <= MAX_FRAME_RATE:
            raise VideoError(f"{path} has {rate:g} frames per second; above 0 up to {MAX_FRAME_RATE:g} are accepted")
        keys = packets.key_stamps
        codec, counted = stream.codec_context.name, not packets.ordered
        return VideoInfo(path, *display.size, rate, stamps, stream.time_base, keys, reach, counted, display, codec)


def iterate_frames(video: VideoInfo, frames: Sequence[int] | None = None) -> Iterator[NDArray[np.uint8]]:
    """Decodes the chosen frames one after the other, beginning at the key frame before the first of them.

    Args:
        video: the result of `probe_video`.
        frames: frame numbers in rising order, repeats allowed; None means all.

    Yields:
        `(H, W, 3)` uint8.

    Raises:
        VideoError: a chosen frame, or one from which it is predicted, is damaged.
    """
    return _iterate(video, frames, as_grey16=False)


def iterate_grey16(video: VideoInfo, frames: Sequence[int] | None = None) -> Iterator[NDArray[np.uint16]]:
    """Decodes frames of 16-bit grey, `(H, W)` uint16, exactly as they were written; see `iterate_frames`.

    Raises:
        VideoError: the video stores no 16-bit grey (`display.is_grey16`), or a frame is damaged.
    """
    if not video.display.is_grey16:
        raise VideoError(
            f"{video.path} is no video of 16-bit grey; write one with: -c:v ffv1 -pix_fmt gray16le OUT.mkv"
        )
    return _iterate(video, frames, as_grey16=True)


def _iterate(video: VideoInfo, frames: Sequence[int] | None, *, as_grey16: bool) -> Iterator[NDArray[Any]]:
    wanted = list(range(video.num_frames) if frames is None else frames)
    if not wanted:
        return
    if wanted[0] < 0 or wanted[-1] >= video.num_frames:
        raise IndexError(f"{video.path} has {video.num_frames} frames; {wanted[0]} to {wanted[-1]} were asked for")
    if sorted(wanted) != wanted:
        raise ValueError("frames are decoded in the order of the video; frame numbers must not decrease")
    done = 0
    for start in (starts := _starts(video, wanted[0])):
        try:
            for picture in _decode_from(
                video, start, wanted[done:], FrameConverter(video.display, as_grey16=as_grey16)
            ):
                yield picture
                done += 1
            return
        except _LostFrameError as lost:
            if start is starts[-1]:
                raise VideoError(_damage_text(video.path, lost.number, video.num_frames)) from lost


def read_frames(video: VideoInfo | Path | str, frames: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Decodes the chosen frames into one array `(f, H, W, 3)` uint8; see `iterate_frames`.

    Raises:
        VideoError: the video, or one of the frames, cannot be decoded.
    """
    info = video if isinstance(video, VideoInfo) else probe_video(video)
    return np.stack(list(iterate_frames(info, frames)))


class _LostFrameError(Exception):
    """The decoder did not give a wanted frame whole; a start further back may give it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _first_frame(decoded: Iterator[av.VideoFrame | Damage]) -> tuple[bool, av.VideoFrame | None]:
    """Returns whether damage precedes the first decoded frame, and that frame."""
    damage = False
    for frame in decoded:
        if not isinstance(frame, Damage):
            return damage, frame
        damage = True
    return damage, None


def _counted_stamps(
    packets: PacketList, found: list[int | None], others: Iterator[av.VideoFrame | Damage], stream: VideoStream
) -> tuple[int, ...]:
    """The stamps of all frames of a video, in order; those of a constant rate if they are of no use.

    Args:
        packets: the file's packets; in a damaged file their number is the number of frames.
        found: the stamp of the first frame; the others' stamps are appended.
        others: the frames after it.
        stream: the stream that the frames come from.
    """
    for frame in others:
        if not isinstance(frame, Damage):
            found.append(frame.pts)
        elif len(packets.stamps) > len(found):
            return packets.stamps  # the later read reaches the damage and reports its place
    known = sorted({pts for pts in found if pts is not None})
    if len(known) == len(found):
        return tuple(known)
    step = max(1.0, 1 / float((stream.average_rate or 1) * (stream.time_base or 1)))
    return tuple(round(number * step) for number in range(len(found)))


def _starts(video: VideoInfo, first: int) -> list[int | None]:
    """Stamps to seek to, one after the other until it succeeds; None is the beginning, without seeking."""
    before = [] if video.counted else video.key_stamps[: bisect_right(video.key_stamps, video.stamps[first])]
    return [*reversed(before[1:][-2:]), None]


def _decode_from(
    video: VideoInfo, start: int | None, wanted: list[int], converter: FrameConverter
) -> Iterator[NDArray[Any]]:
    """Decodes from one start. A frame counts if it and all frames that it needs are whole and follow a key frame.

    Raises:
        _LostFrameError: a wanted frame does not count.
    """
    numbers: dict[int | None, int] = {stamp: number for number, stamp in enumerate(video.stamps)}
    repeats = Counter(wanted)
    ahead = deque(repeats)
    waiting: deque[tuple[int, av.VideoFrame]] = deque()  # frames may depend on frames that are shown after them
    entered, damaged, last = start is None, None, -1
    with opened_video(video.path) as (container, stream):
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        for count, frame in enumerate(decoded_frames(container, stream)):
            number = min(count, video.num_frames) if video.counted else numbers.get(frame.pts)
            if isinstance(frame, Damage) or frame.is_corrupt:
                damaged = (last + 1 if number is None else number) if damaged is None else damaged
            if waiting and (damaged is not None or (number is not None and number > last + 1)):
                raise _LostFrameError(last + 1 if damaged is None else damaged)
            if isinstance(frame, Damage) or number is None:
                continue
            last = number
            if frame.key_frame and not video.counted and (not ahead or number <= ahead[0]):
                entered = True
                damaged = None if damaged is None or damaged < number else damaged
            if ahead and number >= ahead[0]:
                if number > ahead[0] or not entered or damaged is not None:
                    raise _LostFrameError(ahead[0] if damaged is None else damaged)
                waiting.append((ahead.popleft(), frame))
            while waiting and video.reach[waiting[0][0]] <= video.stamps[last]:
                shown, whole = waiting.popleft()
                picture = converter.show(whole, number=shown)
                yield from (picture for _ in range(repeats[shown]))
            if not ahead and not waiting:
                return
    raise _LostFrameError(last + 1 if waiting or damaged is None else damaged)


def _damage_text(path: Path, number: int, num_frames: int) -> str:
    return (
        f"{path}: frame {number} of {num_frames} cannot be decoded: the file is damaged there; copy it or record it "
        "again, or leave it out"
    )
