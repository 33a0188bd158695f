"""Key points of one person: their order, how they mirror, and the key-point file (JSON), an input of `animate`.

128 points of (x, y, confidence): 18 of the body in OpenPose's order, 21 of the left hand, 21 of the right hand and 68
of the face (iBUG order). x and y are in [0,1] of the frame: x = 0 and x = 1 are its left and right *edges*, so that
the centre of pixel column i is (i + 0.5) / width. Left and right are the person's own.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import UserError

KEYPOINT_FILE_VERSION = 1
NUM_KEYPOINTS = 128
BODY = slice(0, 18)
LEFT_HAND = slice(18, 39)
RIGHT_HAND = slice(39, 60)
FACE = slice(60, 128)
# Points of lower confidence count as not seen, and are not drawn; the value is DWPose's.
CONFIDENCE_THRESHOLD = 0.3

BODY_NAMES = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip

_BODY_MIRROR = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
_FACE_MIRROR = (
    *range(16, -1, -1),  # jaw
    *range(26, 16, -1),  # brows
    *range(27, 31),  # bridge of the nose
    *range(35, 30, -1),  # nostrils
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,  # eyes
    *range(54, 47, -1), *range(59, 54, -1),  # outer lips
    *range(64, 59, -1), *range(67, 64, -1),  # inner lips
)  # fmt: skip
# `MIRROR[i]` is the point that takes place i when a picture is flipped from left to right.
MIRROR = np.array(
    [
        *_BODY_MIRROR,
        *range(RIGHT_HAND.start, RIGHT_HAND.stop),
        *range(LEFT_HAND.start, LEFT_HAND.stop),
        *(FACE.start + index for index in _FACE_MIRROR),
    ]
)

MAX_FILE_BYTES = 1 << 28
MAX_FILE_FRAMES = 50_000
_COORDINATE_RANGE = (-1.0, 2.0)


class KeypointFileError(UserError):
    """A key-point file cannot be used. The message names the file, the frame and the field."""


@dataclass(frozen=True)
class KeypointSequence:
    """Key points of a clip: `keypoints` `(f, 128, 3)` float32, and the frame size and rate they were taken at."""

    keypoints: NDArray[np.float32]
    width: int
    height: int
    fps: float


def flip_keypoints(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mirrors key points `(..., 128, 3)` from left to right: x becomes 1 - x, left and right change places."""
    flipped = keypoints[..., MIRROR, :].copy()
    flipped[..., 0] = 1.0 - flipped[..., 0]
    return flipped


def write_keypoint_file(path: Path | str, sequence: KeypointSequence) -> None:
    """Writes a key-point file; coordinates are rounded to a millionth of the frame.

    Raises:
        ValueError: `read_keypoint_file` would not accept these key points.
    """
    points = np.asarray(sequence.keypoints, dtype=np.float64)
    if points.ndim != 3 or points.shape[1:] != (NUM_KEYPOINTS, 3) or len(points) == 0 or not np.isfinite(points).all():
        raise ValueError(f"key points must be finite, of shape (frames, {NUM_KEYPOINTS}, 3); got {points.shape}")
    content = {
        "schema_version": KEYPOINT_FILE_VERSION,
        "width": int(sequence.width),
        "height": int(sequence.height),
        "fps": float(sequence.fps),
        "frames": [{"keypoints": frame.round(6).tolist()} for frame in points],
    }
    parse_keypoints(content, Path(path))
    Path(path).write_text(json.dumps(content, separators=(",", ":")))


def read_keypoint_file(path: Path | str) -> KeypointSequence:
    """Reads and checks a key-point file of this project; `media.keypoint_formats` also reads those of others.

    Raises:
        KeypointFileError: the file is missing, too large, not JSON or not of this schema; names frame and field.
    """
    return parse_keypoints(load_json(path), Path(path))


def load_json(path: Path | str) -> Any:
    """Reads a JSON file of limited size.

    Raises:
        KeypointFileError: the file is missing, too large or not JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise KeypointFileError(f"{path}: {size} bytes; key-point files up to {MAX_FILE_BYTES} are read")
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise KeypointFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise KeypointFileError(f"{path}: nested too deeply for a key-point file") from error
    except KeypointFileError:
        raise
    except ValueError as error:
        raise KeypointFileError(f"{path}: not valid JSON: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def parse_keypoints(content: Any, path: Path) -> KeypointSequence:
    """Checks the content of a key-point file of this project.

    Raises:
        KeypointFileError: the content is not of this schema; names `path`, frame and field.
    """
    fields = {"schema_version", "width", "height", "fps", "frames"}
    if not isinstance(content, dict) or set(content) != fields:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise KeypointFileError(f"{path}: expected an object with {sorted(fields)}; found {found}")
    if content["schema_version"] != KEYPOINT_FILE_VERSION:
        raise KeypointFileError(
            f"{path}: schema_version is {content['schema_version']!r}; this code reads {KEYPOINT_FILE_VERSION}"
        )
    for field in ("width", "height"):
        if type(content[field]) is not int or not 0 < content[field] <= 65536:
            raise KeypointFileError(
                f"{path}: {field} is {content[field]!r}; a whole number from 1 to 65536 is accepted"
            )
    if not _is_number(content["fps"]) or not 0.0 < content["fps"] <= 1000.0:
        raise KeypointFileError(f"{path}: fps is {content['fps']!r}; a number above 0 up to 1000 is accepted")
    frames = content["frames"]
    if not isinstance(frames, list) or not 0 < len(frames) <= MAX_FILE_FRAMES:
        found = f"{len(frames)} frames" if isinstance(frames, list) else type(frames).__name__
        raise KeypointFileError(f"{path}: frames is {found}; a list of 1 to {MAX_FILE_FRAMES} is accepted")
    keypoints = np.stack([_parse_frame(frame, f"{path}: frame {index}") for index, frame in enumerate(frames)])
    return KeypointSequence(keypoints, content["width"], content["height"], float(content["fps"]))


def _parse_frame(frame: Any, where: str) -> NDArray[np.float32]:
    if not isinstance(frame, dict) or set(frame) != {"keypoints"}:
        raise KeypointFileError(f"{where}: expected an object with the one field 'keypoints'")
    points = frame["keypoints"]
    if not isinstance(points, list) or len(points) != NUM_KEYPOINTS:
        found = f"{len(points)} points" if isinstance(points, list) else type(points).__name__
        raise KeypointFileError(f"{where}: keypoints is {found}; a list of {NUM_KEYPOINTS} is accepted")
    for index, point in enumerate(points):
        if not isinstance(point, list) or len(point) != 3 or not all(_is_number(value) for value in point):
            raise KeypointFileError(f"{where}: keypoints[{index}] is not three finite numbers [x, y, confidence]")
        low, high = _COORDINATE_RANGE
        if not (low <= point[0] <= high and low <= point[1] <= high and 0.0 <= point[2] <= 1.0):
            raise KeypointFileError(
                f"{where}: keypoints[{index}] is {point}; x and y are fractions of the frame (from {low:g} to {high:g} "
                "for points beyond its edges), confidence is from 0 to 1"
            )
    return np.array(points, dtype=np.float32)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)
