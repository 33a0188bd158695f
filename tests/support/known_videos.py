"""Videos of known content, written and decoded by the ffmpeg program: a reference that shares no code with ours.

A frame has quadrants in four colours (for orientation and colours), a grey disc (for the aspect of pixels) and an 8-bit
counter at the bottom (for the number of the frame).
"""

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

REQUIRED = "DREAMDANCE_FFMPEG_REQUIRED"
WIDTH, HEIGHT = 64, 96
CORNERS = {
    "top left": (220, 30, 30),
    "top right": (30, 200, 40),
    "bottom left": (30, 40, 220),
    "bottom right": (220, 210, 30),
}


def require_ffmpeg() -> None:
    """Skips the test if ffmpeg is missing; if ffmpeg is required, the test fails."""
    missing = [program for program in ("ffmpeg", "ffprobe") if shutil.which(program) is None]
    if missing:
        reason = f"no {' and no '.join(missing)} here (Debian: apt-get install ffmpeg)"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


def known_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[Any]:
    """Frame `number` of 0..255, `(H, W, 3)` uint8."""
    frame = np.zeros((height, width, 3), np.uint8)
    middle, centre = height // 2, width // 2
    frame[:middle, :centre], frame[:middle, centre:] = CORNERS["top left"], CORNERS["top right"]
    frame[middle:, :centre], frame[middle:, centre:] = CORNERS["bottom left"], CORNERS["bottom right"]
    rows, columns = np.mgrid[:height, :width]
    frame[np.hypot(columns - centre + 0.5, rows - middle + 0.5) < 0.22 * width] = 128
    for bit in range(8):
        left = round(width * (0.04 + 0.115 * bit))
        frame[round(height * 0.85) : round(height * 0.98), left : left + round(width * 0.095)] = 255 * (
            number >> bit & 1
        )
    return frame


def known_frames(num_frames: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[Any]:
    return np.stack([known_frame(number, width, height) for number in range(num_frames)])


def counters(frames: NDArray[Any]) -> list[int]:
    """The values of the counters of upright frames `(f, H, W, 3)`."""
    height, width = frames.shape[1:3]
    row = round(height * 0.915)
    columns = [round(width * (0.04 + 0.115 * bit)) + round(width * 0.0475) for bit in range(8)]
    return [
        sum(
            (
                int(frame[row - 1 : row + 2, column - 1 : column + 2].mean() > 128) << bit
                for bit, column in enumerate(columns)
            )
        )
        for frame in frames
    ]


def corners(frame: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The mean colours of a frame's quadrants, away from the edges; the lower ones above the counter."""
    height, width = frame.shape[:2]
    places = {
        "top left": (0.12, 0.12),
        "top right": (0.12, 0.88),
        "bottom left": (0.72, 0.12),
        "bottom right": (0.72, 0.88),
    }
    return {
        name: frame[round(height * y) - 2 : round(height * y) + 3, round(width * x) - 2 : round(width * x) + 3].mean(
            (0, 1)
        )
        for name, (y, x) in places.items()
    }


def write_by_ffmpeg(path: Path, frames: NDArray[Any], options: str, *, fps: int = 10) -> Path:
    """Encodes `(f, H, W, 3)` uint8 with the options of ffmpeg's command line."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    run_ffmpeg([*source, *options.split(), str(path)], frames.tobytes())
    return path


def write_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Writes a display matrix into the track header of an mp4, like phones."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    a, b, c, d = (round(entry * (1 << 16)) for entry in matrix)
    content[start : start + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(bytes(content))


def run_ffmpeg(arguments: Sequence[str], content: bytes = b"") -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *arguments]
    return subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout


def decode_by_ffmpeg(path: Path, *, width: int, height: int, filters: str = "null") -> NDArray[Any]:
    """All frames as ffmpeg shows them by default, `(f, H, W, 3)` uint8: turned and mirrored, pixels not made square."""
    form = ["-vf", filters, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(run_ffmpeg(["-i", str(path), *form]), np.uint8).reshape(-1, height, width, 3)


def describe_stream(path: Path) -> dict[str, Any]:
    """The fields of the video stream in the output of ffprobe."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_streams", "-of", "json", str(path)]
    stream: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["streams"][
        0
    ]
    return stream
