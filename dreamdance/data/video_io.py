"""Reads videos frame by frame, by their time stamps, and writes them: H.264 for looking at, FFV1 without loss.

Frames are uint8 arrays `(H, W, 3)`, red, green, blue, upright. A file may be hostile: only plain video files are opened
(FFmpeg also runs lists that name other files, or addresses), and what they claim is bounded before memory is taken.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from dreamdance.errors import UserError

LOSSLESS_SUFFIX = ".mkv"
MAX_FRAME_PIXELS = 1 << 26
MAX_VIDEO_FRAMES = 1_000_000
MAX_FRAME_RATE = 1000.0
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


class VideoError(UserError):
    """A video file that cannot be read or written; the text names it."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds.

    Attributes:
        width, height: of the upright frames, in pixels.
        fps: mean number of frames per second.
        stamps: the frames' time stamps in units of `time_base` seconds, rising: frame i is the one shown i-th.
    """

    path: Path
    width: int
    height: int
    fps: float
    stamps: tuple[int, ...]
    time_base: Fraction

    @property
    def num_frames(self) -> int:
        return len(self.stamps)

    def times(self, frames: Sequence[int]) -> list[float]:
        """When the given frames are shown, in seconds after the first."""
        return [float((self.stamps[frame] - self.stamps[0]) * self.time_base) for frame in frames]

    def frames_at(self, seconds: Sequence[float]) -> list[int]:
        """For each time, in seconds after the first frame, the number of the frame nearest to it; the earlier of two.

        Aligned videos may have stamps of their own, one a constant rate and the other a varying one. Taken at equal
        times they show the same moments, by equal numbers they do not.
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

        Phones record at a varying rate; motion read off their frame numbers would be uneven.
        """
        last = self.times([self.num_frames - 1])[0]
        return self.frames_at(np.linspace(0.0, last, self.num_frames).tolist())


def probe_video(path: Path | str) -> VideoInfo:
    """Reads sizes, rate and time stamps without decoding more than one frame.

    Raises:
        VideoError: no such file, or no video in it that can be decoded.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        packets = (packet for packet in container.demux(stream) if not packet.is_discard)
        found = (packet.pts for packet in packets if packet.pts is not None)
        stamps = sorted(islice(found, MAX_VIDEO_FRAMES + 1))
        if len(stamps) > MAX_VIDEO_FRAMES:
            raise VideoError(f"{path} has more than {MAX_VIDEO_FRAMES} frames; cut it into shorter videos")
        if not stamps or stream.time_base is None:
            raise VideoError(f"{path} holds no frames with time stamps")
        container.seek(0, stream=stream)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{path} holds no frame that can be decoded")
        height, width = _upright(first).shape[:2]
        duration = float((stamps[-1] - stamps[0]) * stream.time_base)
        rate = (len(stamps) - 1) / duration if duration > 0 else float(stream.average_rate or 1)
        if not 0.0 < rate <= MAX_FRAME_RATE:
            raise VideoError(f"{path} has {rate:g} frames per second; above 0 up to {MAX_FRAME_RATE:g} are accepted")
        return VideoInfo(path, width, height, rate, tuple(stamps), stream.time_base)


def iterate_frames(video: VideoInfo, frames: Sequence[int] | None = None) -> Iterator[np.ndarray]:
    """Decodes the chosen frames one after the other, beginning at the key frame before the first of them.

    Args:
        video: from `probe_video`.
        frames: frame numbers, not falling, repeats allowed; None means all.

    Yields:
        `(H, W, 3)` uint8.

    Raises:
        VideoError: a chosen frame is damaged.
    """
    wanted = [video.stamps[frame] for frame in (range(video.num_frames) if frames is None else frames)]
    if not wanted:
        return
    if sorted(wanted) != wanted:
        raise ValueError("frames are decoded in the order of the video; their numbers may not fall")
    position = 0
    with _opened(video.path) as (container, stream):
        container.seek(wanted[0], stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < wanted[position]:
                continue
            if frame.pts > wanted[position]:
                break
            picture = _upright(frame)
            while position < len(wanted) and wanted[position] == frame.pts:
                yield picture
                position += 1
            if position == len(wanted):
                return
    raise VideoError(
        f"{video.path}: frame {video.stamps.index(wanted[position])} of {video.num_frames} cannot be decoded"
    )


def read_frames(video: VideoInfo | Path | str, frames: Sequence[int] | None = None) -> np.ndarray:
    """Decodes the chosen frames into one array `(f, H, W, 3)` uint8; see `iterate_frames`.

    Raises:
        VideoError: the video, or one of the frames, cannot be decoded.
    """
    info = video if isinstance(video, VideoInfo) else probe_video(video)
    return np.stack(list(iterate_frames(info, frames)))


def write_video(
    path: Path | str, frames: Sequence[np.ndarray] | np.ndarray, *, fps: float, lossless: bool = False, crf: int = 18
) -> None:
    """Writes a video; it appears under its name when it is complete.

    Args:
        path: `.mp4`, or `.mkv` for a lossless one.
        frames: `(H, W, 3)` uint8 each. H.264 wants even sizes: an odd one grows by repeating its last row or column.
        fps: frames per second.
        lossless: FFV1 in RGB instead, which gives back exactly these frames (of any size).
        crf: H.264's quality, smaller is better; 18 looks like the original.

    Raises:
        VideoError: no frames, of mixed or other shapes, a name that does not end as it should, or a full disk.
    """
    path = Path(path)
    suffix = LOSSLESS_SUFFIX if lossless else ".mp4"
    if path.suffix != suffix:
        raise VideoError(f"{path}: the name of {'a lossless' if lossless else 'an H.264'} video ends in {suffix}")
    if len(frames) == 0:
        raise VideoError(f"{path}: there are no frames to write")
    first = np.asarray(frames[0])
    incoming = path.with_name(f".{path.stem}.incoming{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(incoming), "w") as container:
            stream = container.add_stream(
                "ffv1" if lossless else "libx264", rate=Fraction(fps).limit_denominator(1 << 16)
            )
            stream.height, stream.width = (size + (0 if lossless else size % 2) for size in first.shape[:2])
            stream.pix_fmt = "bgr0" if lossless else "yuv420p"
            if not lossless:
                stream.options = {"crf": str(crf), "preset": "medium"}
            for number, frame in enumerate(frames):
                picture = _check_frame(np.asarray(frame), first.shape, where=f"{path}: frame {number}")
                if not lossless:
                    picture = np.pad(picture, [(0, size % 2) for size in picture.shape[:2]] + [(0, 0)], mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(incoming, path)
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        incoming.unlink(missing_ok=True)


def _check_frame(frame: np.ndarray, shape: tuple[int, ...], *, where: str) -> np.ndarray:
    if frame.shape != shape or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise VideoError(f"{where} is {frame.shape} {frame.dtype}; expected (H, W, 3) uint8 like the first, {shape}")
    return np.ascontiguousarray(frame)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    limits = {"max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        with av.open(
            str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file", **limits}
        ) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.codec_context.options = limits  # a later frame may be larger than the first
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be read: {error.strerror} (mp4, mov, mkv, webm and avi with frames of up to "
            f"{MAX_FRAME_PIXELS} pixels are)"
        ) from error


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The frame as it is meant to be seen: phones store theirs lying and note the rotation, counterclockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4))
