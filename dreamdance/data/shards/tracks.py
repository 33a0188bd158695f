"""Schema 2 of a stored clip: a head that lists tracks of frames, and the bytes of those frames.

A track is one map, or the key points, of a clip or of its references, at one size. The head contains the size and the
CRC-32 of each frame of each track, so that a reader finds and checks single frames without the others, and needs no
hash of the whole shard. Only this module knows the layout of the head (contract C9). Its input may be damaged or
hostile: sizes are checked before memory is allocated, and nothing is unpickled.
"""

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.frame_codecs import CODECS, FLOAT_CODECS, MAX_FRAME_PIXELS, FrameFormat, decode_frame
from dreamdance.errors import ShardError
from dreamdance.media.keypoints import NUM_KEYPOINTS

# Column name -> MDS encoding. `clip` is the head; `clip_id` repeats its name for other readers of MDS. The library
# stores columns in the order of their names, after the uint32 sizes of those whose width is not fixed, so that the
# head lies at the beginning of a sample.
TRACK_COLUMNS: dict[str, str] = {"clip": "bytes", "clip_id": "str", "frames": "bytes", "schema_version": "int"}

MAX_FRAMES = 100_000
MAX_TRACKS = 1000
MAX_FLOAT_CHANNELS = 1 << 16
# More than enough for the tables of 100,000 frames of ten tracks; a head is read into memory as a whole.
MAX_HEAD_BYTES = 32 << 20
KEYPOINTS = "keypoints"

Subject = Literal["clip", "references"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)
# Reads byte ranges of the column `frames` and checks each against its CRC-32.
ReadExtents = Callable[[Sequence["Extent"]], list[bytes]]

_MAGIC = b"DDC2"
_HEADER = struct.Struct("<4sIII")  # magic, CRC-32 of all that follows it, size of the JSON text, number of table rows
_ROW = np.dtype([("size", "<u4"), ("checksum", "<u4")])
_KEYPOINT_BYTES = NUM_KEYPOINTS * 3 * 4


@dataclass(frozen=True)
class Extent:
    """A range of bytes in the column `frames`, its CRC-32, and its name in messages."""

    start: int
    size: int
    checksum: int
    name: str


@dataclass(frozen=True)
class Track:
    """The frames of one map, or the key points of each frame, of a clip or of its references.

    Attributes:
        name: a modality, or `keypoints`.
        subject: whether the frames are the clip's or its references'.
        kind: number, size and codec of the frames; None for key points, which are 128 x 3 little-endian float32.
        rows: size and checksum of each frame.
        start: where the first frame begins in the column `frames`; frames follow one another without gaps.
    """

    name: str
    subject: Subject
    kind: FrameFormat | None
    rows: NDArray[Any]
    start: int

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each frame begins, and where the last one ends."""
        sizes = self.rows["size"].astype(np.int64)
        return self.start + np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def extent(self, index: int) -> Extent:
        """The bytes of one frame.

        Raises:
            IndexError: there is no frame of that number.
        """
        if not 0 <= index < len(self.rows):
            raise IndexError(f"frame {index} of {len(self.rows)}")
        name = f"{self.name}: {'frame' if self.subject == 'clip' else 'reference'} {index}"
        return Extent(int(self.starts[index]), int(self.rows["size"][index]), int(self.rows["checksum"][index]), name)

    def to_json(self) -> dict[str, Any]:
        """The entry of the track in the head."""
        entry: dict[str, Any] = {"name": self.name, "subject": self.subject, "num_frames": len(self.rows)}
        if self.kind is not None:
            entry |= {
                "width": self.kind.width,
                "height": self.kind.height,
                "channels": self.kind.channels,
                "bits": self.kind.dtype.itemsize * 8,
                "codec": self.kind.codec,
            }
        return entry


@dataclass(frozen=True)
class ClipHead:
    """All that is known of a stored clip without its frames.

    Attributes:
        clip_id, num_frames, fps, metadata: see `writing.shard_parts.ClipRecord`.
        tracks: the tracks in the order of their bytes.
        reference_positions: for each reference, its number in the source minus that of the clip's first frame, so that
            it may be negative; counted in the frames of the source.
        frame_step: frames of the source from one frame of the clip to the next.
    """

    clip_id: str
    num_frames: int
    fps: float
    metadata: dict[str, Any]
    tracks: tuple[Track, ...]
    reference_positions: tuple[int, ...] = ()
    frame_step: int = 1

    @property
    def frames_bytes(self) -> int:
        """The size of the column `frames`."""
        return int(self.tracks[-1].starts[-1]) if self.tracks else 0

    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (width, height) at which the clip is stored, in the order of their tracks."""
        return list(dict.fromkeys((t.kind.width, t.kind.height) for t in self.tracks if t.kind is not None))


@dataclass
class TrackWriter:
    """Collects the tracks of a clip and their bytes."""

    tracks: list[Track] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)

    def add(self, name: str, subject: Subject, kind: FrameFormat | None, payloads: Sequence[bytes]) -> None:
        """Adds a track; `payloads` are its encoded frames."""
        rows = np.array([(len(payload), zlib.crc32(payload)) for payload in payloads], dtype=_ROW)
        start = int(self.tracks[-1].starts[-1]) if self.tracks else 0
        self.tracks.append(Track(name, subject, kind, rows, start))
        self.payloads += payloads

    def add_keypoints(self, subject: Subject, keypoints: NDArray[Any]) -> None:
        """Adds key points `(f, 128, 3)`.

        Raises:
            ValueError: the key points have another shape.
        """
        if keypoints.ndim != 3 or keypoints.shape[1:] != (NUM_KEYPOINTS, 3):
            raise ValueError(f"key points of shape {keypoints.shape}; expected (frames, {NUM_KEYPOINTS}, 3)")
        self.add(KEYPOINTS, subject, None, [points.astype("<f4").tobytes() for points in keypoints])

    def sample(self, head: ClipHead) -> dict[str, Any]:
        """The columns of a shard; the head's own tracks are replaced by those of this writer."""
        text = json.dumps(
            {
                "clip_id": head.clip_id,
                "num_frames": head.num_frames,
                "fps": float(head.fps),
                "metadata": head.metadata,
                "reference_positions": list(head.reference_positions),
                "frame_step": head.frame_step,
                "tracks": [track.to_json() for track in self.tracks],
            },
            sort_keys=True,
        ).encode()
        rows = np.concatenate([track.rows for track in self.tracks])
        rest = _HEADER.pack(_MAGIC, 0, len(text), len(rows))[8:] + text + rows.tobytes()
        data = _MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest
        if len(data) > MAX_HEAD_BYTES:
            raise ValueError(f"clip '{head.clip_id}' has {len(rows)} frames in all its tracks; store shorter clips")
        return {"clip": data, "clip_id": head.clip_id, "frames": b"".join(self.payloads), "schema_version": 2}


def read_head(data: bytes, *, frames_bytes: int, where: str) -> ClipHead:
    """Reads and checks a head.

    Args:
        data: the column `clip`.
        frames_bytes: the size of the column `frames`.
        where: the shard and the sample's place in it, for error texts.

    Raises:
        ShardError: the head is damaged, or contradicts itself or the size of the frames.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise ShardError(f"{where}: the data begins with {data[:4]!r}, expected is {_MAGIC!r}; the shard is damaged")
    _, checksum, text_bytes, num_rows = _HEADER.unpack_from(data)
    if zlib.crc32(data[8:]) != checksum:
        raise ShardError(f"{where}: the head does not match its checksum; the shard is damaged")
    if len(data) != _HEADER.size + text_bytes + num_rows * _ROW.itemsize:
        raise ShardError(f"{where}: the head has {len(data)} bytes, its header lists another size")
    try:
        content = json.loads(data[_HEADER.size : _HEADER.size + text_bytes].decode())
        head = _parse(content, np.frombuffer(data, _ROW, num_rows, _HEADER.size + text_bytes), where)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{where}: the head cannot be read ({error!r}); the shard is damaged") from error
    if head.frames_bytes != frames_bytes:
        raise ShardError(
            f"{where} (clip '{head.clip_id}'): its frames have {frames_bytes} bytes, its tracks list "
            f"{head.frames_bytes}; the shard is damaged"
        )
    return head


def _parse(content: Any, rows: NDArray[Any], where: str) -> ClipHead:
    if not isinstance(content, dict) or not isinstance(content["metadata"], dict):
        raise ShardError(f"{where}: the head or its metadata is not a JSON object; the shard is damaged")
    num_frames, fps = _whole(content["num_frames"], 1, MAX_FRAMES), float(content["fps"])
    where = f"{where} (clip '{content['clip_id']}')"
    if not (math.isfinite(fps) and fps > 0):
        raise ShardError(f"{where}: the frame rate is {fps}; the shard is damaged")
    positions = tuple(_whole(value, -(1 << 40), 1 << 40) for value in content["reference_positions"])
    lengths: dict[str, int] = {"clip": num_frames, "references": len(positions)}
    entries, tracks, used = list(content["tracks"]), list[Track](), 0
    found = set[tuple[Any, ...]]()
    if len(entries) > MAX_TRACKS:
        raise ShardError(f"{where}: {len(entries)} tracks; accepted are up to {MAX_TRACKS}")
    for entry in entries:
        count = _whole(entry["num_frames"], 1, MAX_FRAMES)
        if lengths[entry["subject"]] != count:
            raise ShardError(f"{where}: {entry['name']} has {count} frames, expected are {lengths[entry['subject']]}")
        kind = None if entry["name"] == KEYPOINTS else _parse_kind(entry, count, where)
        known = (entry["name"], entry["subject"], None if kind is None else (kind.width, kind.height))
        if known in found:
            raise ShardError(f"{where}: its head lists two tracks of {entry['name']} of one size; the shard is damaged")
        found.add(known)
        part = rows[used : used + count]
        if kind is None and (part["size"] != _KEYPOINT_BYTES).any():
            raise ShardError(f"{where}: its key points have another size than {NUM_KEYPOINTS} x 3 float32")
        start = int(tracks[-1].starts[-1]) if tracks else 0
        tracks.append(Track(str(entry["name"]), entry["subject"], kind, part, start))
        used += count
    if used != len(rows):
        raise ShardError(f"{where}: the tracks have {used} frames, the table lists {len(rows)}; the shard is damaged")
    return ClipHead(
        clip_id=str(content["clip_id"]),
        num_frames=num_frames,
        fps=fps,
        metadata=content["metadata"],
        tracks=tuple(tracks),
        reference_positions=positions,
        frame_step=_whole(content["frame_step"], 1, MAX_FRAMES),
    )


def _parse_kind(entry: Mapping[str, Any], num_frames: int, where: str) -> FrameFormat:
    width, height, channels, bits = (entry[key] for key in ("width", "height", "channels", "bits"))
    if entry["codec"] in FLOAT_CODECS:
        channels, bits = _whole(channels, 1, MAX_FLOAT_CHANNELS), 32
    elif channels not in (1, 3) or bits not in (8, 16) or entry["codec"] not in CODECS:
        raise ShardError(
            f"{where}, {entry['name']}: frames of {bits} bits and {channels} channels as {entry['codec']!r}; accepted "
            f"are 8 or 16 bits, 1 or 3 channels, {', '.join(CODECS)}"
        )
    width, height = _whole(width, 1, MAX_FRAME_PIXELS), _whole(height, 1, MAX_FRAME_PIXELS)
    if width * height > MAX_FRAME_PIXELS:
        raise ShardError(
            f"{where}, {entry['name']}: the head claims frames of {width}x{height}; accepted are up to "
            f"{MAX_FRAME_PIXELS} pixels"
        )
    dtype = np.dtype(np.float32) if bits == 32 else np.dtype(f"u{bits // 8}")
    return FrameFormat(num_frames, height, width, channels, dtype, entry["codec"])


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
    return value


class TrackClip:
    """A clip of schema 2, at one of its sizes; reads frames when they are asked for."""

    def __init__(
        self,
        head: ClipHead,
        read: ReadExtents,
        *,
        size: tuple[int, int] | None,
        where: str,
        map_sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Chooses the size; reads nothing yet.

        Args:
            head: the head of the clip.
            read: reads ranges of the column `frames`.
            size: the size (width, height) to which frames will be brought; None means the largest one stored.
            where: the shard and the sample's place in it, for error texts.
            map_sizes: the same for maps that will be brought to another size than the others.

        Raises:
            ShardError: the clip has no pictures.
        """
        self.where = f"{where} (clip '{head.clip_id}')"
        self.clip_id, self.num_frames, self.fps, self.metadata = head.clip_id, head.num_frames, head.fps, head.metadata
        self.reference_positions, self.frame_step = head.reference_positions, head.frame_step
        self._read = read
        sizes = head.sizes()
        if not sizes:
            raise ShardError(f"{self.where} has no rgb frames; the shard is damaged")
        self.width, self.height = choose_size(sizes, size)
        chosen = {name: choose_size(sizes, wanted) for name, wanted in (map_sizes or {}).items()}
        self._tracks: dict[tuple[str, str], Track] = {
            (track.subject, track.name): track
            for track in head.tracks
            if track.kind is None
            or (track.kind.width, track.kind.height) == chosen.get(track.name, (self.width, self.height))
        }
        if ("clip", "rgb") not in self._tracks:
            raise ShardError(f"{self.where} has no rgb frames of {self.width}x{self.height}; the shard is damaged")

    def names(self, subject: Subject = "clip") -> list[str]:
        """The maps that the clip, or its references, have."""
        return [name for of, name in self._tracks if of == subject and name != KEYPOINTS]

    def decoded_bytes(self, name: str, subject: Subject = "clip") -> int:
        """The size of all decoded frames of a map."""
        kind = self._tracks[subject, name].kind
        return 0 if kind is None else kind.decoded_bytes

    def frames(self, name: str, indices: Sequence[int], subject: Subject = "clip") -> NDArray[Any]:
        """Reads, checks and decodes frames, `(n, H, W)` or `(n, H, W, 3)`.

        Raises:
            ShardError: a frame is damaged.
            KeyError: there is no such map.
        """
        track = self._tracks[subject, name]
        assert track.kind is not None, "key points are read by `keypoints`"
        extents = [track.extent(index) for index in indices]
        frames = np.empty((len(extents), *track.kind.frame_shape), dtype=track.kind.dtype)
        for row, (extent, payload) in enumerate(zip(extents, self._read(extents), strict=True)):
            frames[row] = decode_frame(payload, track.kind, where=f"{self.where}, {extent.name}")
        return frames

    def has_keypoints(self, subject: Subject = "clip") -> bool:
        """Whether there are key points."""
        return (subject, KEYPOINTS) in self._tracks

    def keypoints(self, indices: Sequence[int], subject: Subject = "clip") -> NDArray[np.float32]:
        """Reads and checks the key points of frames, `(n, 128, 3)`.

        Raises:
            ShardError: they are damaged.
            KeyError: there are none.
        """
        track = self._tracks[subject, KEYPOINTS]
        data = b"".join(self._read([track.extent(index) for index in indices]))
        points = np.frombuffer(data, "<f4").reshape(-1, NUM_KEYPOINTS, 3).astype(np.float32)
        if not np.isfinite(points).all():
            raise ShardError(f"{self.where}: the key points contain values that are not finite; the shard is damaged")
        return points


def choose_size(sizes: Sequence[tuple[int, int]], wanted: tuple[int, int] | None) -> tuple[int, int]:
    """The smallest stored size that has at least the wanted number of pixels in both directions, else the largest."""
    enough = [size for size in sizes if wanted is not None and size[0] >= wanted[0] and size[1] >= wanted[1]]
    return min(enough, key=math.prod) if enough else max(sizes, key=math.prod)
