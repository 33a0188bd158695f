"""The storage format of clips: shard columns, packed frames, encodings of normals and depth, packed key points.

Only this module knows byte layouts (contract C9). Its input may be damaged or hostile: it checks sizes before it
allocates memory, and it never unpickles anything.
"""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import ShardError
from dreamdance.media.keypoints import NUM_KEYPOINTS
from dreamdance.modalities import MODALITIES, Modality

SCHEMA_VERSION = 1

# Column name -> MDS encoding. The columns of modalities hold packed frames: rgb, pose, normal `(H, W, 3)` uint8; depth
# `(H, W)` uint16; mask `(H, W)` uint8, 0 or 255. Empty bytes mean that the clip lacks the modality; every clip has rgb.
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

# Every shard has a column for each of these modalities. A shard may lack the columns of modalities added later.
FIRST_MODALITIES = ("rgb", "pose", "normal", "depth", "mask")

MAX_FRAMES = 100_000
MAX_FRAME_PIXELS = 1 << 26

_MAGIC = b"DDFR"
_HEADER = struct.Struct("<4sBBHIII")  # magic, bits per value, channels, reserved, height, width, number of frames
_ENTRY = struct.Struct("<II")  # size of a frame's PNG, its CRC-32
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_LEVEL = 3  # measured on dancers: files of level 9 are 4 % smaller and take 5 times as long


@dataclass(frozen=True)
class FrameFormat:
    """The header of a packed column: number, size and type of its frames. Reading it decodes no frame."""

    num_frames: int
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """`(H, W)` for one channel, else `(H, W, channels)`."""
        return (self.height, self.width) if self.channels == 1 else (self.height, self.width, self.channels)


def pack_frames(frames: Sequence[NDArray[Any]]) -> bytes:
    """Packs frames losslessly, each compressed separately, so that a window of a clip decodes only its own frames.

    Args:
        frames: arrays of one shape, `(H, W)` or `(H, W, 3)` in the order red, green, blue; uint8 or uint16.

    Raises:
        ValueError: there are no frames, or their shapes or types differ or are not supported.
    """
    frames = [np.asarray(frame) for frame in frames]
    if not frames:
        raise ValueError("pack_frames needs at least one frame; an absent modality is stored as empty bytes instead")
    first = frames[0]
    if first.dtype not in (np.uint8, np.uint16) or not (first.ndim == 2 or (first.ndim == 3 and first.shape[2] == 3)):
        raise ValueError(f"frames must be (H, W) or (H, W, 3), uint8 or uint16; got {first.shape} {first.dtype}")
    for index, frame in enumerate(frames):
        if frame.shape != first.shape or frame.dtype != first.dtype:
            raise ValueError(f"frame {index} is {frame.shape} {frame.dtype}, frame 0 is {first.shape} {first.dtype}")
    payloads = [_encode_png(frame) for frame in frames]
    height, width = first.shape[:2]
    channels = 1 if first.ndim == 2 else 3
    header = _HEADER.pack(_MAGIC, first.dtype.itemsize * 8, channels, 0, height, width, len(frames))
    table = b"".join(_ENTRY.pack(len(payload), zlib.crc32(payload)) for payload in payloads)
    return b"".join([header, table, *payloads])


def read_frame_format(data: bytes, *, where: str = "packed frames") -> FrameFormat:
    """Reads and checks the header of packed frames.

    Args:
        data: the bytes that `pack_frames` returned.
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
        data: the bytes that `pack_frames` returned.
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
        frames[row] = _decode_png(payload, kind, where=f"{where}: frame {index}")
    return frames


def _encode_png(frame: NDArray[Any]) -> bytes:
    image = frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])
    if not done:
        raise ValueError(f"OpenCV could not encode a frame of {frame.shape} {frame.dtype} as PNG")
    return encoded.tobytes()


def _decode_png(payload: bytes, kind: FrameFormat, *, where: str) -> NDArray[Any]:
    """Compares a PNG's own header with the expected size, then decodes it; so no decompression bomb is inflated."""
    expected = struct.pack(">II", kind.width, kind.height) + bytes(
        [kind.dtype.itemsize * 8, 0 if kind.channels == 1 else 2]
    )
    if payload[:8] != _PNG_SIGNATURE or payload[16:26] != expected:
        raise ShardError(
            f"{where} is not the {kind.width}x{kind.height} PNG that its column's header claims; the shard is damaged"
        )
    try:
        image = cv2.imdecode(np.frombuffer(payload, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ShardError(f"{where} cannot be decoded: {error.err}") from error
    if image is None or image.shape != kind.frame_shape or image.dtype != kind.dtype:
        raise ShardError(f"{where} cannot be decoded; the shard is damaged")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def pack_keypoints(keypoints: NDArray[Any]) -> bytes:
    """Returns a clip's key points `(f, 128, 3)` as the bytes of an .npy file of little-endian float32."""
    keypoints = np.asarray(keypoints, dtype="<f4")
    _check_keypoint_shape(keypoints.shape, error=ValueError, where="pack_keypoints")
    buffer = io.BytesIO()
    np.save(buffer, keypoints, allow_pickle=False)
    return buffer.getvalue()


def unpack_keypoints(data: bytes, *, where: str = "keypoints") -> NDArray[np.float32]:
    """Reads the bytes of `pack_keypoints`: `(f, 128, 3)` float32, x and y in [0,1] of the frame, confidence in [0,1].

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
    low, high = float(disparity.min()), float(disparity.max())
    scale = 65535.0 / (high - low) if high > low else 0.0
    return np.rint((disparity - low) * scale).astype(np.uint16), (low, high)


def metric_disparity(disparity: NDArray[Any], depth_range: tuple[float, float]) -> NDArray[np.float64]:
    """Returns disparity in 1/metre, the inverse of depth.

    Args:
        disparity: disparity in [0,1], stored by `encode_disparity` or predicted.
        depth_range: the range that `encode_disparity` returned for the clip.
    """
    low, high = depth_range
    return low + (high - low) * disparity.astype(np.float64)


def check_columns(encodings: Mapping[str, str], *, where: str) -> None:
    """Refuses an index that does not have our columns; columns of modalities that were added later may be missing.

    Args:
        encodings: column name -> MDS encoding, as an index.json lists them.
        where: the folder or index, for the error text.

    Raises:
        ShardError: columns are missing, unknown or of another encoding; the error names them.
    """
    added_later = set(MODALITIES).difference(FIRST_MODALITIES)
    wrong = [f"{name} is missing" for name in COLUMNS if name not in encodings and name not in added_later]
    wrong += [f"{name} is unknown" for name in encodings if name not in COLUMNS]
    wrong += [
        f"{name} is {encodings[name]}, not {kind}"
        for name, kind in COLUMNS.items()
        if encodings.get(name, kind) != kind
    ]
    if wrong:
        raise ShardError(
            f"{where}: the columns are not those of schema version {SCHEMA_VERSION}, which this code reads: "
            f"{'; '.join(wrong)}"
        )


def check_schema_version(version: int, *, where: str) -> None:
    """Refuses a clip that was written with another version of the schema.

    Raises:
        ShardError: the versions differ; the error names both.
    """
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{where}: the shards have schema version {version}, this code reads {SCHEMA_VERSION}; run `prepare` again"
        )
