"""A clip of the report's page: one small video with all its pictures as cells, and the curves of its scores.

All cells of a clip lie in one video, so that they cannot play out of step; the page cuts them apart.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, fixed_reference, own_frame
from dreamdance.evaluation.clips import Prediction, Result, ResultError, Size, read_result, read_truth
from dreamdance.evaluation.frame_curves import CURVES, frame_curves, truth_curves
from dreamdance.evaluation.scores import as_bytes
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW
from dreamdance.evaluation.times import pair_frames
from dreamdance.evaluation.trivial import REPEATED_REFERENCE, trivial_answers
from dreamdance.media.video import probe_video, read_frames
from dreamdance.media.video_writing import write_video
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import POSE_VIDEO

# Cells narrower than this are enlarged by a whole factor, those higher than that are reduced.
SMALLEST_WIDTH, LARGEST_HEIGHT = 128, 384
_VIDEO_WIDTH = 2048  # of all cells of a line
_VIDEO_CRF = 16


@dataclass(frozen=True)
class Cell:
    """The pictures of one cell.

    Attributes:
        row: `RESULT_ROW`, the name of another result, or `TRUTH_ROW`; empty for the reference and the pose.
        kind: `reference`, `pose`, `normals`, `depth` or `frames`.
        pictures: `f h w 3` or `f h w`, uint8, no larger than they are shown. One frame stands for all.
    """

    row: str
    kind: str
    pictures: NDArray[np.uint8]

    @classmethod
    def of(cls, row: str, kind: str, pictures: NDArray[Any], size: Size) -> "Cell":
        """A cell of pictures of any size: uint8, or floats in [0, 1], normals in [-1, 1].

        They become bytes, and are reduced to `size`, at once: of several results of a long clip, one is in memory.
        """
        return cls(row, kind, np.stack([_reduced(picture, kind, size) for picture in pictures]))

    def draw(self, frame: int, size: Size) -> NDArray[np.uint8]:
        """A frame in colours, enlarged to a size in pixels."""
        picture = self.pictures[frame if len(self.pictures) > 1 else 0]
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=-1)
        return np.asarray(cv2.resize(picture, size[::-1], interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


class CellFrames(Sequence[NDArray[np.uint8]]):
    """The frames of the video; each is drawn when it is asked for, so that long clips need no memory for them."""

    def __init__(self, cells: Sequence[Cell], num_frames: int, size: Size) -> None:
        """Places the cells.

        Args:
            cells: line by line.
            num_frames: length of the video.
            size: height and width of a cell.
        """
        self.columns = max(1, min(len(cells), _VIDEO_WIDTH // size[1]))
        self._cells, self._num_frames, self._size = cells, num_frames, size

    def __len__(self) -> int:
        return self._num_frames

    @overload
    def __getitem__(self, number: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[NDArray[np.uint8]]: ...
    def __getitem__(self, number: int | slice) -> NDArray[np.uint8] | Sequence[NDArray[np.uint8]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        height, width = self._size
        lines = math.ceil(len(self._cells) / self.columns)
        canvas = np.zeros((lines * height, self.columns * width, 3), np.uint8)
        for place, cell in enumerate(self._cells):
            line, column = divmod(place, self.columns)
            top, left = line * height, column * width
            canvas[top : top + height, left : left + width] = cell.draw(number, self._size)
        return canvas


def is_shown(folder: Path, clip_id: str) -> bool:
    """Whether the folder has the video and the description of a clip."""
    return all((folder / f"{clip_id}{suffix}").is_file() for suffix in (".mp4", ".json"))


def show_clip(folder: Path, clip: StoredClip, results: Mapping[str, Path], *, map_size: Size) -> None:
    """Writes `<id>.mp4` and its description `<id>.json`.

    Args:
        folder: for both files.
        clip: the true clip.
        results: row of the table -> result folder; the own one first.
        map_size: size of the maps.

    Raises:
        ResultError: a result is damaged, or lacks frames that the own one has.
        VideoError: the video cannot be written, such as on a full disk.
    """
    own = read_result(results[RESULT_ROW])
    pairs = pair_frames(own, num_frames=clip.num_frames, fps=clip.fps)
    shown, size = [true_frame for _, true_frame in pairs], cell_size(own.frame_size)
    truth = read_truth(clip, frame_size=own.frame_size, map_size=map_size, frames=shown)
    chosen = fixed_reference(clip) if own.reference_frame is None else ReferenceFrame(own.reference_frame)
    sizes = {"frame_size": own.frame_size, "map_size": map_size}
    reference = read_truth(clip, frames=[chosen.number], subject=chosen.subject, **sizes)
    skipped = shown.index(same) if (same := own_frame(clip, chosen)) in shown else None
    pose = _read_pose(results[RESULT_ROW] / POSE_VIDEO, [frame for frame, _ in pairs])
    poses = clip.frames("pose", shown) if pose is None and clip.has("pose") else pose
    cells = [Cell.of("", "reference", reference.pictures.given_frames, size)]
    cells += [] if poses is None else [Cell.of("", "pose", poses, size)]
    repeated = trivial_answers(reference, len(shown), None)[REPEATED_REFERENCE]
    compared = [number for number in range(len(shown)) if number != skipped]
    true_part = truth.at(compared)

    def curves_of(prediction: Prediction) -> dict[str, list[float | None]]:
        return _by_frame(frame_curves(prediction.at(compared), true_part), compared, len(shown))

    curves = {REPEATED_REFERENCE: curves_of(repeated)}
    for row, path in results.items():
        result = own if row == RESULT_ROW else read_result(path)
        prediction = result.prediction.at(_frames_at(shown, result, row, clip))
        cells += _cells_of(row, prediction, size)
        curves[row] = curves_of(prediction)
    cells += _cells_of(TRUTH_ROW, truth.pictures, size)
    curves[TRUTH_ROW] = _by_frame(truth_curves(true_part), compared, len(shown))
    frames = CellFrames(cells, len(shown), size)
    write_video(folder / f"{clip.clip_id}.mp4", frames, fps=own.fps, crf=_VIDEO_CRF)
    content = {
        "id": clip.clip_id,
        "fps": own.fps,
        "width": size[1],
        "height": size[0],
        "columns": frames.columns,
        "cells": [{"row": cell.row, "kind": cell.kind} for cell in cells],
        "frames": shown,
        "reference": skipped,
        "pose_is_true": pose is None,
        "curves": {key: {row: of_row[key] for row, of_row in curves.items() if key in of_row} for key in CURVES},
    }
    write_atomically(folder / f"{clip.clip_id}.json", json.dumps(content, allow_nan=False))


def _frames_at(shown: Sequence[int], result: Result, row: str, clip: StoredClip) -> list[int]:
    """The numbers of the result's frames that show the same moments as frames of the clip."""
    by_time = {true: own for own, true in pair_frames(result, num_frames=clip.num_frames, fps=clip.fps)}
    if missing := [number for number in shown if number not in by_time]:
        raise ResultError(
            f"result '{clip.clip_id}' of '{row}' lacks {len(missing)} of the {len(shown)} frames that the one of "
            "`results` has: they cannot be compared (key: compare)"
        )
    return [by_time[number] for number in shown]


def _read_pose(path: Path, frames: Sequence[int]) -> NDArray[np.uint8] | None:
    """Frames of the poses that drove a result; None if `animate` was of a version that did not write them."""
    return read_frames(probe_video(path), frames) if path.is_file() else None


def _reduced(picture: NDArray[Any], kind: str, size: Size) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8:
        picture = as_bytes((picture + 1) / 2 if kind == "normals" else picture)
    if size[0] < picture.shape[0]:
        picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(picture, dtype=np.uint8)


def _cells_of(row: str, pictures: Prediction, size: Size) -> list[Cell]:
    parts = {"normals": pictures.normals, "depth": pictures.disparity, "frames": pictures.frames}
    return [Cell.of(row, kind, part, size) for kind, part in parts.items() if part is not None]


def cell_size(frame_size: Size) -> Size:
    """Height and width of a cell in the video, both even."""
    height, width = frame_size
    factor = float(max(1, math.ceil(SMALLEST_WIDTH / width)))
    if height * factor > LARGEST_HEIGHT:
        factor = max(1.0, math.floor(LARGEST_HEIGHT / height)) if height <= LARGEST_HEIGHT else LARGEST_HEIGHT / height
    return 2 * round(height * factor / 2), 2 * round(width * factor / 2)


def _by_frame(
    curves: Mapping[str, Sequence[float]], compared: Sequence[int], num_frames: int
) -> dict[str, list[float | None]]:
    """Curve -> a value for each shown frame; None for the reference itself, which is not compared."""
    placed = {}
    for key, values in curves.items():
        by_frame = dict(zip(compared, values, strict=True))
        curve = [by_frame.get(number, math.nan) for number in range(num_frames)]
        placed[key] = [None if math.isnan(value) else float(f"{value:.5g}") for value in curve]
    return placed
