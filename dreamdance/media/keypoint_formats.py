"""Reads key-point files of other programs into our 128 points: OpenPose, and DWPose as ControlNet's tools save it.

* OpenPose writes one JSON object per frame, in a folder or as one file: `people`, each with `pose_keypoints_2d` (25
  points, or 18 in COCO's order), `face_keypoints_2d` (70) and `hand_left_keypoints_2d`, `hand_right_keypoints_2d` (21),
  as flat lists of x, y, confidence. The object contains neither the size of the frame nor the rate.
* ControlNet's preprocessors (DWPose, OpenPose) save one list of such objects with `canvas_width` and `canvas_height`.

Coordinates are pixels, or fractions of the frame if none in the whole clip is above 2. (Networks that read pixels count
from the middle of the first pixel or from its edge; half a pixel is less than their error.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.keypoints import (
    BODY,
    FACE,
    LEFT_HAND,
    MAX_FILE_BYTES,
    MAX_FILE_FRAMES,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    KeypointFileError,
    KeypointSequence,
    load_json,
    parse_keypoints,
)
from dreamdance.runtime.warnings_once import warn_once

# Our 18 points of the body among OpenPose's 25, which have the middle of the hips at place 8 and feet at the end.
_OF_BODY_25 = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
# Field -> our points, and how many points are accepted. OpenPose's face has 68 in iBUG order and then the two pupils.
_FIELDS = {
    "pose_keypoints_2d": (BODY, (18, 25)),
    "hand_left_keypoints_2d": (LEFT_HAND, (21,)),
    "hand_right_keypoints_2d": (RIGHT_HAND, (21,)),
    "face_keypoints_2d": (FACE, (68, 70)),
}
_LARGEST_FRACTION = 2.0
# Some networks return confidences that are a little above 1.
_LARGEST_CONFIDENCE = 1.5
_FRAME_NUMBER = re.compile(r"(\d+)(?:_keypoints)?\.json$")
# A person goes on as the nearest one, unless the joints are farther away on average than this part of the body's size.
_LARGEST_STEP = 0.5
_COORDINATE_RANGE = (-1.0, 2.0)


@dataclass(frozen=True)
class _Frame:
    people: list[NDArray[np.float64]]  # (128, 3) each, coordinates as in the file
    canvas: tuple[int, int] | None


def read_any_keypoints(
    path: Path | str,
    *,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    person: int | None = None,
) -> KeypointSequence:
    """Reads a key-point file of this project, OpenPose or ControlNet's DWPose, or OpenPose's folder of files.

    Args:
        path: the file; or a folder with one file per frame, which are sorted by the number at the end of their names.
        size: width and height of the frames in pixels; needed where the file contains none (OpenPose).
        fps: frames per second; needed for files of other programs, which contain none.
        person: who to read where there are several: the place in the list of the first frame that shows people. None
            takes the person who is largest in any frame. Either is followed through the clip by the nearest joints.

    Returns:
        `(f, 128, 3)` key points with size and rate; a frame without the person has confidence 0.

    Raises:
        KeypointFileError: the file or an argument cannot be used; names file, frame and field.
    """
    path = Path(path)
    if path.is_dir():
        files = _frame_files(path)
        contents = [(load_json(file), str(file)) for file in files]
    else:
        content = load_json(path)
        if isinstance(content, dict) and "schema_version" in content:
            if person not in (None, 0):
                raise KeypointFileError(f"{path}: person {person}: a file of this kind has one person, number 0")
            return parse_keypoints(content, path)
        if not isinstance(content, list) and not (isinstance(content, dict) and "people" in content):
            found = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
            raise KeypointFileError(
                f"{path}: no key-point file of a known kind: expected is an object with 'schema_version' (this "
                f"project) or 'people' (OpenPose), or a list of objects with 'people' (DWPose); found {found}"
            )
        items = content if isinstance(content, list) else [content]
        contents = [(item, f"{path}: frame {number}") for number, item in enumerate(items)]
    if not 0 < len(contents) <= MAX_FILE_FRAMES:
        raise KeypointFileError(f"{path}: {len(contents)} frames; 1 to {MAX_FILE_FRAMES} are accepted")
    frames = [_parse_frame(item, where) for item, where in contents]
    width, height = _frame_size([frame.canvas for frame in frames], size, path)
    if fps is None:
        raise KeypointFileError(f"{path}: files of this kind contain no frame rate; give it, in a manifest as 'fps'")
    keypoints = _follow([frame.people for frame in frames], person, path)
    return KeypointSequence(_to_fractions(keypoints, width, height, path), width, height, float(fps))


def _frame_files(folder: Path) -> list[Path]:
    """OpenPose's files of a folder by frame number; no number between the first and the last may be missing."""
    numbered: dict[int, Path] = {}
    for file in folder.glob("*.json"):
        if file.name.startswith("."):
            continue
        found = _FRAME_NUMBER.search(file.name)
        if found is None:
            raise KeypointFileError(
                f"{file}: the name has no frame number at its end, as in name_000012_keypoints.json"
            )
        number = int(found[1])
        if number in numbered:
            raise KeypointFileError(f"{file} and {numbered[number].name} have the same frame number")
        numbered[number] = file
    if not numbered:
        raise KeypointFileError(f"{folder}: the folder contains no *.json, one for each frame")
    missing = sorted(set(range(min(numbered), max(numbered) + 1)) - set(numbered))
    if missing:
        raise KeypointFileError(f"{folder}: the file of frame {missing[0]} is missing ({len(missing)} in all)")
    files = [numbered[number] for number in sorted(numbered)]
    if (size := sum(file.stat().st_size for file in files)) > MAX_FILE_BYTES:
        raise KeypointFileError(f"{folder}: {size} bytes; up to {MAX_FILE_BYTES} are read")
    return files


def _parse_frame(content: Any, where: str) -> _Frame:
    if not isinstance(content, dict) or not isinstance(content.get("people"), list):
        raise KeypointFileError(f"{where}: expected an object with 'people', a list of persons")
    people = [_parse_person(one, f"{where}: people[{number}]") for number, one in enumerate(content["people"])]
    names = ("canvas_width", "canvas_height")
    if not any(name in content for name in names):
        return _Frame(people, None)
    for name in names:
        value = content.get(name)
        if type(value) is not int or not 0 < value <= 65536:
            raise KeypointFileError(f"{where}: {name} is {value!r}; a whole number from 1 to 65536 is accepted")
    return _Frame(people, (content["canvas_width"], content["canvas_height"]))


def _parse_person(content: Any, where: str) -> NDArray[np.float64]:
    if not isinstance(content, dict) or content.get("pose_keypoints_2d") is None:
        raise KeypointFileError(f"{where}: expected an object with 'pose_keypoints_2d'")
    result = np.zeros((NUM_KEYPOINTS, 3))
    for field, (place, counts) in _FIELDS.items():
        values = content.get(field)
        if values is None or values == []:  # not detected, or not asked for
            continue
        if not isinstance(values, list) or len(values) not in [3 * count for count in counts]:
            found = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
            accepted = " or ".join(f"{3 * count}, {count} points of x, y, confidence" for count in counts)
            raise KeypointFileError(f"{where}.{field}: {found}; accepted are {accepted}")
        for index, value in enumerate(values):
            if type(value) not in (int, float) or not abs(value) < 1e9:
                raise KeypointFileError(f"{where}.{field}[{index}] is {value!r}, not a finite number")
        points = np.array(values, dtype=np.float64).reshape(-1, 3)
        bad = np.flatnonzero((points[:, 2] < 0) | (points[:, 2] > _LARGEST_CONFIDENCE))
        if len(bad):
            raise KeypointFileError(
                f"{where}.{field}[{3 * bad[0] + 2}] is {points[bad[0], 2]:g}; a confidence from 0 to 1 is accepted"
            )
        points[:, 2] = points[:, 2].clip(0, 1)
        points[points[:, 2] == 0] = 0.0
        result[place] = points[_OF_BODY_25] if len(points) == 25 else points[: place.stop - place.start]
    return result


def _frame_size(
    canvases: Sequence[tuple[int, int] | None], size: tuple[int, int] | None, path: Path
) -> tuple[int, int]:
    """The size that the file states; else the given one."""
    stated = {canvas for canvas in canvases if canvas is not None}
    if len(stated) > 1:
        raise KeypointFileError(f"{path}: the frames have canvases of different sizes: {sorted(stated)[:4]}")
    if stated:
        return stated.pop()
    if size is None:
        raise KeypointFileError(
            f"{path}: files of this kind contain no size of the frame; give its width and height in pixels, in "
            "a manifest as 'keypoints_size'"
        )
    return size


def _to_fractions(points: NDArray[np.float64], width: int, height: int, path: Path) -> NDArray[np.float32]:
    seen = points[..., 2] > 0
    result = points.copy()
    if np.abs(points[seen][:, :2]).max() > _LARGEST_FRACTION:
        result[..., :2] /= [width, height]
    places = result[seen][:, :2]
    outside = ((places < 0) | (places > 1)).any(axis=1)
    low, high = _COORDINATE_RANGE
    if 2 * outside.sum() > len(outside) or places.min() < low or places.max() > high:
        raise KeypointFileError(
            f"{path}: {outside.sum()} of {len(outside)} points lie outside of the frame of {width}x{height}; "
            "coordinates are pixels of this frame, or fractions of it. Is its size right?"
        )
    return result.astype(np.float32)


def _follow(frames: Sequence[list[NDArray[np.float64]]], person: int | None, path: Path) -> NDArray[np.float64]:
    """One person's points `(f, 128, 3)`; zeros where the person is missing."""
    shown = [number for number, people in enumerate(frames) if any(_size(one) > 0 for one in people)]
    if not shown:
        raise KeypointFileError(f"{path}: no frame shows a person")
    if person is not None:
        start = shown[0]
        if not 0 <= person < len(frames[start]) or _size(frames[start][person]) == 0:
            raise KeypointFileError(
                f"{path}: person {person}: the first frame that shows people, {start}, has {len(frames[start])}, "
                "numbered from 0"
            )
    else:
        _, start, person = max(
            (_size(one), -number, -place) for number in shown for place, one in enumerate(frames[number])
        )
        start, person = -start, -person
    result = np.zeros((len(frames), NUM_KEYPOINTS, 3))
    for numbers in (range(start, len(frames)), range(start, -1, -1)):
        last = frames[start][person]
        for number in numbers:
            found = last if number == start else _nearest(frames[number], last)
            if found is not None:
                result[number] = last = found
    missing = len(frames) - int((result[..., 2] > 0).any(axis=1).sum())
    if missing:
        warn_once(f"{path}: the person who is followed is missing in {missing} of {len(frames)} frames")
    return result


def _size(points: NDArray[np.float64]) -> float:
    """The diagonal of the box around the body's points; 0 if there are fewer than two."""
    body = points[BODY]
    seen = body[body[:, 2] > 0, :2]
    return float(np.linalg.norm(np.ptp(seen, axis=0))) if len(seen) > 1 else 0.0


def _nearest(people: list[NDArray[np.float64]], last: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The person whose joints are nearest to the last known ones; None if everybody is far away."""
    best, smallest = None, _LARGEST_STEP * _size(last)
    for one in people:
        shared = (one[BODY, 2] > 0) & (last[BODY, 2] > 0)
        if not shared.any():
            continue
        distance = float(np.linalg.norm((one - last)[BODY, :2][shared], axis=-1).mean())
        if distance < smallest:
            best, smallest = one, distance
    return best
