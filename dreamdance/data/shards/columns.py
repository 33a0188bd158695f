"""The columns of both schemas, the packed frames of schema 1, and the encodings of normals, depth and grey maps.

`tracks` knows the layout of schema 2, which `prepare` writes; schema 1 is only read (contract C9). The input may be
damaged or hostile: sizes are checked before memory is allocated, and nothing is unpickled.
"""

import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.frame_codecs import MAX_FRAME_PIXELS, FrameFormat, decode_frame
from dreamdance.data.shards.tracks import MAX_FRAMES, TRACK_COLUMNS, Subject
from dreamdance.errors import ShardError
from dreamdance.media.keypoints import NUM_KEYPOINTS
from dreamdance.modalities import MODALITIES, Modality

# The schema that this code writes.
SCHEMA_VERSION = 2

# Columns of schema 1: column name -> MDS encoding. The columns of modalities hold packed frames: rgb, pose, normal
# `(H, W, 3)` uint8; depth `(H, W)` uint16; mask `(H, W)` uint8, 0 or 255. Empty bytes mean that the clip lacks the
# modality; every clip has rgb.
COLUMNS: dict[str, str] = {
    "schema_version": "int",
    "clip_id": "str",
    "num_frames": "int",
    "width": "int",
    "height": "int",
    "fps": "float64",
    "metadata": "str",
    **dict.fromkeys(MODALITIES, "bytes"),
    "keypoints": "bytes",
}

# Every shard of schema 1 has a column for each of these modalities. It may lack the columns of those added later.
FIRST_MODALITIES = ("rgb", "pose", "normal", "depth", "mask")

_MAGIC = b"DDFR"
_HEADER = struct.Struct("<4sBBHIII")  # magic, bits per value, channels, reserved, height, width, number of frames
_ENTRY = struct.Struct("<II")  # size of a frame's PNG, its CRC-32


def read_frame_format(data: bytes, *, where: str = "packed frames") -> FrameFormat:
    """Reads and checks the header of packed frames.

    Args:
        data: a column of a modality.
        where: clip and column, for the error text.

    Raises:
        ShardError: the header is damaged, of another format, or claims more than `MAX_FRAMES` or `MAX_FRAME_PIXELS`.
    """
    if len(data) < _HEADER.size:
        raise ShardError(
            f"{where}: {len(data)} bytes are too few for a header; the shard is damaged, run `prepare` again"
        )
    magic, bits, channels, reserved, height, width, num_frames = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ShardError(
            f"{where}: the data begins with {magic!r}, expected is {_MAGIC!r}; it is damaged or of another format"
        )
    if bits not in (8, 16) or channels not in (1, 3) or reserved != 0:
        raise ShardError(
            f"{where}: frames of {bits} bits and {channels} channels; accepted are 8 or 16 bits and 1 or 3 channels"
        )
    if not 0 < num_frames <= MAX_FRAMES:
        raise ShardError(f"{where}: the header claims {num_frames} frames; accepted are 1 to {MAX_FRAMES}")
    if height < 1 or width < 1 or height * width > MAX_FRAME_PIXELS:
        raise ShardError(
            f"{where}: the header claims frames of {width}x{height}; accepted are up to {MAX_FRAME_PIXELS} pixels"
        )
    if len(data) < _HEADER.size + num_frames * _ENTRY.size:
        raise ShardError(
            f"{where}: {len(data)} bytes are too few for the table of {num_frames} frames; the data is truncated"
        )
    return FrameFormat(num_frames, height, width, channels, np.dtype(f"u{bits // 8}"))


def unpack_frames(data: bytes, indices: Sequence[int] | None = None, *, where: str = "packed frames") -> NDArray[Any]:
    """Decodes the chosen frames and no others.

    Args:
        data: a column of a modality.
        indices: the numbers of the frames, in any order, repeats allowed; None means all.
        where: clip and column, for the error text.

    Returns:
        `(n, H, W)` or `(n, H, W, 3)`, uint8 or uint16 as packed.

    Raises:
        ShardError: the bytes are damaged, truncated or of another format.
        IndexError: there is no frame of that number.
    """
    kind = read_frame_format(data, where=where)
    chosen = range(kind.num_frames) if indices is None else [int(index) for index in indices]
    table = np.frombuffer(data, dtype="<u4", count=2 * kind.num_frames, offset=_HEADER.size).reshape(-1, 2)
    ends = _HEADER.size + kind.num_frames * _ENTRY.size + np.cumsum(table[:, 0], dtype=np.int64)
    if ends[-1] != len(data):
        raise ShardError(
            f"{where}: the data has {len(data)} bytes, its table lists {ends[-1]}; it is truncated or damaged"
        )
    frames = np.empty((len(chosen), *kind.frame_shape), dtype=kind.dtype)
    for row, index in enumerate(chosen):
        if not 0 <= index < kind.num_frames:
            raise IndexError(f"{where}: frame {index} of {kind.num_frames}")
        payload = data[ends[index] - int(table[index, 0]) : ends[index]]
        if zlib.crc32(payload) != table[index, 1]:
            raise ShardError(f"{where}: frame {index} does not match its checksum; the shard is damaged")
        frames[row] = decode_frame(payload, kind, where=f"{where}: frame {index}")
    return frames


def unpack_keypoints(data: bytes, *, where: str = "keypoints") -> NDArray[np.float32]:
    """Reads the bytes of an .npy file: `(f, 128, 3)` float32, x and y in [0,1] of the frame, confidence in [0,1].

    The function neither allocates memory for a claimed shape before it is checked, nor unpickles anything.

    Raises:
        ShardError: the bytes are no such array.
    """
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        if version != (1, 0):
            raise ValueError(f"npy format {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except (ValueError, EOFError) as error:
        raise ShardError(f"{where}: the key points are not an .npy array ({error}); the shard is damaged") from error
    _check_keypoint_shape(shape, error=ShardError, where=where)
    body = memoryview(data)[buffer.tell() :]
    if dtype != np.dtype("<f4") or fortran_order or len(body) != 4 * int(np.prod(shape, dtype=np.int64)):
        raise ShardError(
            f"{where}: {len(body)} bytes of {dtype} are not an array {shape} of float32; the shard is damaged"
        )
    keypoints = np.frombuffer(body, dtype="<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(keypoints).all():
        raise ShardError(f"{where}: the key points contain values that are not finite; the shard is damaged")
    return keypoints


def _check_keypoint_shape(shape: tuple[int, ...], *, error: type[ValueError], where: str) -> None:
    if len(shape) != 3 or shape[1:] != (NUM_KEYPOINTS, 3) or not 0 < shape[0] <= MAX_FRAMES:
        raise error(f"{where}: key points of shape {shape}; expected (frames, {NUM_KEYPOINTS}, 3)")


def encode_normal(normal: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Encodes unit normals `(..., 3)` as uint8: (n+1)/2, so that a wall facing the camera is (128,128,255)."""
    scaled = np.floor((np.asarray(normal, dtype=np.float32) + 1.0) * 127.5 + 0.5)
    encoded: NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
    return encoded


def encode_grey(pictures: NDArray[np.uint8], modality: Modality) -> NDArray[Any]:
    """Encodes pictures `(f, H, W, 3)` uint8 of a modality with one value per pixel as its stored `(f, H, W)`.

    The value is the mean of the channels, scaled to the whole range of the stored type. For a region it becomes 255
    where the mean is at least 128, else 0.
    """
    means: NDArray[Any] = pictures.mean(axis=-1, dtype=np.float32).round().astype(np.dtype(f"u{modality.bits // 8}"))
    if modality.kind == "region":
        means = np.where(means >= 128, means.dtype.type(255), means.dtype.type(0))
    return means if modality.bits == 8 else means * 257


def encode_disparity(depth: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint16], tuple[float, float]]:
    """Encodes a clip's depth as 16-bit disparity, near points bright, normalised over the whole clip.

    Args:
        depth: `(f, H, W)`, metres, positive.

    Returns:
        The disparity `(f, H, W)`, uint16 over its full range, and (smallest, largest) disparity in 1/metre; the clip's
        metadata stores the pair as `depth_range`.

    Raises:
        ValueError: a depth is not positive or not finite.
    """
    if not (np.isfinite(depth).all() and (depth > 0).all()):
        raise ValueError("depth must be positive and finite everywhere; fill holes before storing a clip")
    disparity = 1.0 / depth.astype(np.float64)
    ends = float(disparity.min()), float(disparity.max())
    return encode_disparity_values(disparity, ends), ends


def encode_disparity_values(disparity: NDArray[np.floating[Any]], ends: tuple[float, float]) -> NDArray[np.uint16]:
    """Encodes disparity, in any unit, so that 16 bits reach from the first to the second of `ends`."""
    low, high = ends
    scale = 65535.0 / (high - low) if high > low else 0.0
    encoded: NDArray[np.uint16] = np.rint((disparity.astype(np.float64) - low) * scale).clip(0, 65535).astype(np.uint16)
    return encoded


def metric_disparity(disparity: NDArray[Any], depth_range: tuple[float, float]) -> NDArray[np.float64]:
    """Returns disparity in 1/metre, the inverse of depth.

    Args:
        disparity: disparity in [0,1], stored by `encode_disparity` or predicted.
        depth_range: the range that `encode_disparity` returned for the clip.
    """
    low, high = depth_range
    return low + (high - low) * disparity.astype(np.float64)


def schema_of(encodings: Mapping[str, str], *, where: str) -> int:
    """Returns the schema version of a shard with these columns; refuses columns that are not ours.

    Columns of modalities that were added to schema 1 later may be missing.

    Args:
        encodings: column name -> MDS encoding, as an index.json lists them.
        where: the folder or index, for the error text.

    Raises:
        ShardError: columns are missing, unknown or of another encoding; the error names them.
    """
    if "clip" in encodings:
        _compare_columns(
            encodings, TRACK_COLUMNS, frozenset(), where=f"{where}: the columns are not those of schema version 2"
        )
        return 2
    added_later = frozenset(MODALITIES).difference(FIRST_MODALITIES)
    _compare_columns(encodings, COLUMNS, added_later, where=f"{where}: the columns are not those of schema version 1")
    return 1


def _compare_columns(
    encodings: Mapping[str, str], columns: Mapping[str, str], optional: frozenset[str], *, where: str
) -> None:
    wrong = [f"{name} is missing" for name in columns if name not in encodings and name not in optional]
    wrong += [f"{name} is unknown" for name in encodings if name not in columns]
    wrong += [
        f"{name} is {encodings[name]}, not {kind}"
        for name, kind in columns.items()
        if encodings.get(name, kind) != kind
    ]
    if wrong:
        raise ShardError(f"{where}, which this code reads: {'; '.join(wrong)}")


def check_schema_version(version: int, *, where: str) -> None:
    """Refuses a clip that was written with an unknown version of the schema.

    Raises:
        ShardError: the version is unknown; the error names it.
    """
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ShardError(
            f"{where}: the shards have schema version {version}, this code reads 1 to {SCHEMA_VERSION}; run `prepare` "
            "again"
        )


class ColumnClip:
    """A clip of schema 1. Its frames are decoded when they are asked for; its columns are in memory."""

    def __init__(self, sample: Mapping[str, Any], *, where: str) -> None:
        """Checks the columns of a sample.

        Args:
            sample: the columns as the shard stores them.
            where: the shard and the sample's place in it, for error texts.

        Raises:
            ShardError: a column is damaged, or columns contradict one another.
        """
        check_schema_version(sample["schema_version"], where=where)
        self.clip_id = str(sample["clip_id"])
        self.where = f"{where} (clip '{self.clip_id}')"
        self.num_frames = int(sample["num_frames"])
        self.width, self.height = int(sample["width"]), int(sample["height"])
        self.fps = float(sample["fps"])
        self.metadata = self._parse_metadata(sample["metadata"])
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ShardError(f"{self.where}: the frame rate is {self.fps}; the shard is damaged")
        self._packed: dict[str, bytes] = {name: sample[name] for name in MODALITIES if sample.get(name)}
        self._kinds: dict[str, FrameFormat] = {}
        for name, data in self._packed.items():
            kind = self._kinds[name] = read_frame_format(data, where=f"{self.where}, {name}")
            if (kind.num_frames, kind.width, kind.height) != (self.num_frames, self.width, self.height):
                raise ShardError(
                    f"{self.where}: {name} has {kind.num_frames} frames of {kind.width}x{kind.height}, "
                    f"but the clip has {self.num_frames} of {self.width}x{self.height}"
                )
        if "rgb" not in self._packed:
            raise ShardError(f"{self.where} has no rgb frames; the shard is damaged")
        packed_keypoints = sample["keypoints"]
        self._keypoints = unpack_keypoints(packed_keypoints, where=self.where) if packed_keypoints else None
        if self._keypoints is not None and len(self._keypoints) != self.num_frames:
            raise ShardError(
                f"{self.where} has key points for {len(self._keypoints)} frames, but {self.num_frames} frames"
            )

    def drop_packed(self) -> None:
        """Frees the packed frames; none can be decoded afterwards."""
        self._packed = dict.fromkeys(self._packed, b"")

    def _parse_metadata(self, text: str) -> dict[str, Any]:
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self.where}: its metadata is not JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise ShardError(f"{self.where}: its metadata is not a JSON object")
        return metadata

    @property
    def reference_positions(self) -> tuple[int, ...]:
        """Schema 1 stores no references."""
        return ()

    @property
    def frame_step(self) -> int:
        """Schema 1 does not store it."""
        return 1

    def names(self, subject: Subject = "clip") -> list[str]:
        """The maps that the clip has."""
        return list(self._packed) if subject == "clip" else []

    def decoded_bytes(self, name: str, subject: Subject = "clip") -> int:
        """The size of all decoded frames of a map."""
        return self._kinds[name].decoded_bytes

    def frames(self, name: str, indices: Sequence[int], subject: Subject = "clip") -> NDArray[Any]:
        """Checks and decodes frames, `(n, H, W)` or `(n, H, W, 3)`.

        Raises:
            ShardError: a frame is damaged.
            KeyError: there is no such map.
        """
        if subject == "references":
            raise KeyError(subject)
        return unpack_frames(self._packed[name], indices, where=f"{self.where}, {name}")

    def has_keypoints(self, subject: Subject = "clip") -> bool:
        """Whether there are key points."""
        return subject == "clip" and self._keypoints is not None

    def keypoints(self, indices: Sequence[int], subject: Subject = "clip") -> NDArray[np.float32]:
        """The key points of frames, `(n, 128, 3)`.

        Raises:
            KeyError: there are none.
        """
        if subject == "references" or self._keypoints is None:
            raise KeyError(subject)
        return self._keypoints[list(indices)]
