"""Encodes and decodes single stored frames: PNG without loss, JPEG and WebP for pictures, plain numbers for latents.

The input of the decoder may be damaged or hostile: the picture's own header is compared before anything is inflated.
OpenCV is imported with the first frame: plans of a recipe read the index of shards where it is not installed.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dreamdance.errors import ShardError

Codec = Literal["png", "jpeg", "webp"]
CODECS: tuple[Codec, ...] = get_args(Codec)
# Numbers as they are, little-endian; bf16 is rounded to nearest even. Both are float32 when decoded.
FloatCodec = Literal["fp32", "bf16"]
FLOAT_CODECS: tuple[FloatCodec, ...] = get_args(FloatCodec)

MAX_FRAME_PIXELS = 1 << 26

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_LEVEL = 3  # measured on dancers: files of level 9 are 4 % smaller and take 5 times as long
_SUFFIXES: dict[Codec, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True)
class FrameFormat:
    """Number, size, type and codec of the frames of one map. Reading it decodes no frame."""

    num_frames: int
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    codec: Codec | FloatCodec = "png"

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """`(H, W)` for one channel, else `(H, W, channels)`."""
        return (self.height, self.width) if self.channels == 1 else (self.height, self.width, self.channels)

    @property
    def decoded_bytes(self) -> int:
        """The size of all decoded frames in bytes."""
        return self.num_frames * math.prod(self.frame_shape) * self.dtype.itemsize


def frame_format(frames: NDArray[Any], codec: Codec = "png") -> FrameFormat:
    """The format of frames that are to be stored.

    Args:
        frames: `(f, H, W)` or `(f, H, W, 3)` in the order red, green, blue; uint8 or uint16.
        codec: how each frame is to be encoded; JPEG and WebP take `(f, H, W, 3)` uint8 only.

    Raises:
        ValueError: there are no frames, or their shape or type is not supported.
    """
    shape, dtype = frames.shape, frames.dtype
    if len(frames) == 0:
        raise ValueError("a map that is stored needs at least one frame; leave an absent map out")
    if dtype not in (np.uint8, np.uint16) or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise ValueError(f"frames must be (f, H, W) or (f, H, W, 3), uint8 or uint16; got {shape} {dtype}")
    if codec != "png" and (len(shape) != 4 or dtype != np.uint8):
        raise ValueError(f"{codec} stores pictures (f, H, W, 3) of uint8; got {shape} {dtype}")
    return FrameFormat(len(frames), shape[1], shape[2], 1 if len(shape) == 3 else 3, dtype, codec)


def encode_frame(frame: NDArray[Any], codec: Codec = "png", *, quality: int = 95) -> bytes:
    """Encodes one frame `(H, W)` or `(H, W, 3)`.

    Args:
        frame: uint8 or uint16; colours in the order red, green, blue.
        codec: `png` loses nothing. `jpeg` keeps the colours at full resolution (4:4:4).
        quality: of JPEG and WebP, 1 to 100.
    """
    import cv2

    image = frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
    options: dict[Codec, list[int]] = {
        "png": [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL],
        # Measured on rendered dancers, 512x768: 4:4:4 costs a third more bytes than 4:2:0 and gains 5 dB.
        "jpeg": [
            *(cv2.IMWRITE_JPEG_QUALITY, quality),
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        ],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
    }
    done, encoded = cv2.imencode(_SUFFIXES[codec], image, options[codec])
    if not done:
        raise ValueError(f"OpenCV could not encode a frame of {frame.shape} {frame.dtype} as {codec}")
    return encoded.tobytes()


def decode_frame(payload: bytes, kind: FrameFormat, *, where: str) -> NDArray[Any]:
    """Compares a picture's own header with the expected size, then decodes it; so no decompression bomb is inflated.

    Args:
        payload: the encoded frame.
        kind: the expected size, type and codec.
        where: clip, map and number of the frame, for the error text.

    Raises:
        ShardError: the picture is damaged, or another than expected.
    """
    if not _has_size(payload, kind):
        raise ShardError(
            f"{where} is not the {kind.width}x{kind.height} {kind.codec.upper()} that its clip lists; the shard is "
            "damaged"
        )
    import cv2

    flags = cv2.IMREAD_UNCHANGED if kind.codec == "png" else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(payload, dtype=np.uint8), flags)
    except cv2.error as error:
        raise ShardError(f"{where} cannot be decoded: {error.err}") from error
    if image is None or image.shape != kind.frame_shape or image.dtype != kind.dtype:
        raise ShardError(f"{where} cannot be decoded; the shard is damaged")
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encode_floats(frame: NDArray[np.float32], codec: FloatCodec) -> bytes:
    """Encodes one array of float32."""
    if codec == "fp32":
        return frame.astype("<f4").tobytes()
    return torch.from_numpy(frame).to(torch.bfloat16).view(torch.uint16).numpy().astype("<u2").tobytes()


def decode_floats(payload: bytes, kind: FrameFormat, *, where: str) -> NDArray[np.float32]:
    """Decodes what `encode_floats` gave: `(H, W, channels)` float32.

    Raises:
        ShardError: the payload has another size than `kind`.
    """
    stored = np.frombuffer(payload, "<f4" if kind.codec == "fp32" else "<u2")
    shape = (kind.height, kind.width, kind.channels)
    if stored.size != math.prod(shape):
        raise ShardError(f"{where} has {len(payload)} bytes, expected are {shape} numbers; the shard is damaged")
    if kind.codec == "fp32":
        return stored.astype(np.float32).reshape(shape)
    return (stored.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def _has_size(payload: bytes, kind: FrameFormat) -> bool:
    """Whether the header of an encoded frame has the expected size and type."""
    if kind.codec == "png":
        expected = struct.pack(">II", kind.width, kind.height) + bytes(
            [kind.dtype.itemsize * 8, 0 if kind.channels == 1 else 2]
        )
        return payload[:8] == _PNG_SIGNATURE and payload[16:26] == expected
    try:
        with Image.open(io.BytesIO(payload), formats=[kind.codec.upper()]) as picture:
            return picture.size == (kind.width, kind.height) and picture.mode == "RGB"
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return False
