"""Opens video files and reads their packets: time stamps, key frames, and whether the file is whole.

A file may be hostile. This module opens plain video files alone (FFmpeg would also follow lists of other files or
addresses), and checks the sizes that a file declares before it allocates memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from dreamdance.errors import UserError

MAX_FRAME_PIXELS = 1 << 26
MAX_VIDEO_FRAMES = 1_000_000
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
# Decoders that report an error only if they are set to stop at it; others mark the frame as corrupt. (H.264's decoder,
# if set to stop, also stops at the first frames of undamaged files that were cut out of longer ones.)
STRICT_DECODERS = frozenset({"hevc", "mjpeg"})
# Decoders that check every slice of a frame and only log damage.
LOGGING_DECODERS = frozenset({"ffv1"})

EBML_HEADER, EBML_SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")


class VideoError(UserError):
    """A video file that cannot be read or written; the text names it."""


@dataclass(frozen=True)
class PacketList:
    """The packets of a video, read without decoding.

    Attributes:
        stamps: time stamps in the order in which frames are shown.
        key_stamps: time stamps of the key frames, rising.
        reach: for each frame, the latest stamp among itself and the frames that are stored before it: the frame may be
            predicted from any of them.
        ordered: whether frames carry these stamps. In avi files, for example, stamps only count packets.
    """

    stamps: tuple[int, ...]
    key_stamps: tuple[int, ...]
    reach: tuple[int, ...]
    ordered: bool


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first video stream of a file.

    Raises:
        VideoError: the file does not exist, holds no video, or exceeds the limits; also raised during later reads.
    """
    limits = {"max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        with av.open(
            str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file", **limits}
        ) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video")
            stream = container.streams.video[0]
            strict = {"err_detect": "crccheck+explode"} if stream.codec_context.name in STRICT_DECODERS else {}
            stream.codec_context.options = (
                limits | strict
            )  # limits for later frames, which may be larger than the first
            stream.codec_context.thread_count = 1  # with more, H.264's decoder does not mark corrupt frames
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be read: {error.strerror} (mp4, mov, mkv, webm and avi with frames of up to "
            f"{MAX_FRAME_PIXELS} pixels are)"
        ) from error


@dataclass(frozen=True)
class Damage:
    """A packet that the decoder rejected, with its time stamp; it takes the place of a frame."""

    pts: int | None


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame | Damage]:
    """Yields all decoded frames and rejected packets, in the order in which a player shows them."""
    logs = stream.codec_context.name in LOGGING_DECODERS
    for packet in container.demux(stream):
        try:
            frames, errors = _decode_and_listen(packet) if logs else (packet.decode(), False)
        except av.InvalidDataError:
            errors = True
        if errors:
            yield Damage(packet.pts)
        else:
            yield from frames


def _decode_and_listen(packet: "av.Packet[av.VideoStream]") -> tuple[list[av.VideoFrame], bool]:
    """Returns the frames, and whether the decoder logged an error."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture(local=True) as messages:
            frames = packet.decode()
        return frames, any(severity <= av.logging.ERROR for severity, _, _ in messages)
    finally:
        av.logging.set_level(level)


def list_packets(path: Path) -> PacketList:
    """Reads through a file without decoding it.

    Raises:
        VideoError: the file ends early, or has no frames with time stamps, or too many.
    """
    stamps: list[int] = []
    key_stamps = []
    num_packets, torn, without_stamp = 0, False, False
    with opened_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 and packet.dts is None:
                continue  # PyAV appends this empty packet, which asks the decoder for its last frames
            num_packets += 1
            torn |= packet.is_corrupt
            if packet.is_discard:
                continue
            if packet.pts is None:
                without_stamp = True
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe:
                key_stamps.append(packet.pts)
            if len(stamps) > MAX_VIDEO_FRAMES:
                raise VideoError(f"{path} has more than {MAX_VIDEO_FRAMES} frames; cut it into shorter videos")
        names = container.format.name.split(",")
        indexed = "mp4" in names or "avi" in names  # the index of a matroska file lists key frames
        torn |= indexed and num_packets < len(stream.index_entries)
        torn |= "matroska" in names and _ends_early(path)
        if torn:
            raise VideoError(f"{path} is not whole: it ends after {len(stamps)} frames; copy or record it again")
        if (not stamps and not without_stamp) or stream.time_base is None:
            raise VideoError(f"{path} holds no frames with time stamps")
    unique = len(set(stamps)) == len(stamps)
    ordered = unique and not without_stamp and "avi" not in names
    reach = dict(zip(stamps, accumulate(stamps, max), strict=True))
    shown = tuple(sorted(stamps))
    return PacketList(shown, tuple(sorted(key_stamps)), tuple(reach[stamp] for stamp in shown), ordered)


def _ends_early(path: Path) -> bool:
    """Returns whether a matroska file is shorter than its declared size; a file written to a pipe declares none."""
    with path.open("rb") as file:
        if file.read(4) != EBML_HEADER:
            return False
        file.seek(_element_end(file) or 0)
        if file.read(4) != EBML_SEGMENT:
            return False
        end = _element_end(file)
    return end is not None and path.stat().st_size < end


def _element_end(file: BinaryIO) -> int | None:
    """Returns the end of the element whose size field is next in the file; None if the size is unknown."""
    start = file.tell()
    field = file.read(8)
    if not field or field[0] == 0:
        return None
    length = 9 - field[0].bit_length()
    mask = (1 << 7 * length) - 1
    size = int.from_bytes(field[:length], "big") & mask
    return None if size == mask else start + length + size
