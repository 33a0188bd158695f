"""Result folders: their files, the check whether a result is complete, atomic writing, and the note of all results."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dreamdance.inference.entry_inputs import read_entry_states
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.inference.stages import Stages
from dreamdance.media.grids import GridRow, draw_grid
from dreamdance.media.sound import copy_sound
from dreamdance.media.transforms import encode_normals, resize_images, resize_map, tensor_to_pictures
from dreamdance.media.video import VideoError, VideoInfo, write_video
from dreamdance.modalities import MODALITIES
from dreamdance.runs.file_notes import Expectation, forget_note, of_content, write_note
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import replace_atomically, write_atomically
from dreamdance.runs.folder_lock import OutputError
from dreamdance.runs.layout import ARRAYS_FILE, ENTRIES_FILE, POSE_VIDEO, RESULT_FILE
from dreamdance.runs.provenance import code_version, package_versions

logger = logging.getLogger(__name__)

VIDEO_FILE = "video.mp4"
SIDE_BY_SIDE_FILE = "side_by_side.mp4"
CONTACT_SHEET_FILE = "contact_sheet.png"

SMALLEST_WIDTH = 128
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class ClipResult:
    """The output of the pipelines for one entry.

    Attributes:
        reference: `3 H W` in [0, 1].
        poses: `f 3 H W` in [0, 1].
        frames: `f 3 H W` in [0, 1].
        normals: `f 3 h w` unit vectors in the size of stage 1, or None without stage 1.
        depths: `f 1 h w` disparity in [0, 1], or None without stage 1.
        fps: frames per second.
        driving_video: the video whose sound the result gets, or None.
    """

    reference: Tensor
    poses: Tensor
    frames: Tensor
    normals: Tensor | None
    depths: Tensor | None
    fps: float
    driving_video: VideoInfo | None = None


def is_done(folder: Path, request: dict[str, Any]) -> bool:
    """Whether a folder contains the complete result of exactly this request (inputs, seed, settings, weights)."""
    try:
        found = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("request") != json.loads(json.dumps(request)):
            return False
        return bool(found["sizes"]) and found["sizes"] == _sizes(folder)
    except (OSError, ValueError, KeyError, RecursionError):
        return False


def known_states(folder: Path) -> dict[Path, FileState]:
    """The recorded states of the files that a result was made from, by absolute path; empty without a result."""
    try:
        files = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))["files"].values()
        noted = {Path(file.pop("path")).absolute(): FileState.from_json(file) for file in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {path: state for path, state in noted.items() if state is not None}


def list_entries(entries: Sequence[ManifestEntry], output: Path) -> None:
    """Lists in the output folder what is to be made, so that `evaluate` notices what is missing until all is made.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    try:
        write_atomically(output / ENTRIES_FILE, json.dumps([entry.id for entry in entries]) + "\n")
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}; give another `output`") from error


def write_result(folder: Path, result: ClipResult, *, request: dict[str, Any], details: dict[str, Any]) -> None:
    """Writes a result folder atomically; it replaces a result of another request.

    Args:
        folder: `<output>/<id>`.
        result: the pictures.
        request: everything that determines the result; `is_done` compares it.
        details: further information for `result.json`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    try:
        with replace_atomically(folder, is_only_writer=True) as temporary:
            temporary.mkdir(parents=True)
            _write_files(temporary, result, request=request, details=details)
    except (OSError, VideoError) as error:
        raise OutputError(
            f"the result of '{folder.name}' cannot be written: {error}; free disk space or give another `output`, "
            "the same command then continues"
        ) from error


def note_results(
    entries: Sequence[ManifestEntry],
    output: Path,
    stages: Stages,
    run_folder: Path,
    before_entry: Callable[[str], None],
) -> None:
    """Notes all input and result files, so that the launcher need not start a finished run again.

    Every entry must have its result.

    Args:
        entries: all entries of the manifest.
        output: the folder of the results.
        stages: the exports that were used.
        run_folder: the folder that gets the note.
        before_entry: called with the id of each entry.

    Raises:
        UserError: an input file does not exist any more.
    """
    files: dict[Path, Expectation] = {path: of_content(state) for path, state in stages.files.items()}
    for entry in entries:
        before_entry(entry.id)
        folder = output / entry.id
        states = read_entry_states(entry, known_states(folder))
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if result["request"]["inputs"] != {name: state.sha256 for name, state in states.items()}:
            logger.warning("a file of '%s' was replaced after it was read; run the same command again", entry.id)
            forget_note(run_folder)
            return
        files |= {entry.files[name].absolute(): of_content(state) for name, state in states.items()}
        files |= {folder / name: {"size": size} for name, size in result["sizes"].items()}
        if (described := read_state(folder / RESULT_FILE)) is not None:
            files[folder / RESULT_FILE] = of_content(described)
    write_note(run_folder, files)


def _write_files(folder: Path, result: ClipResult, *, request: dict[str, Any], details: dict[str, Any]) -> None:
    arrays = {"frames": tensor_to_pictures(result.frames)}
    if result.normals is not None and result.depths is not None:
        arrays["normals"] = np.moveaxis(result.normals.numpy(), 1, -1).astype(np.float16)
        arrays["depths"] = result.depths[:, 0].numpy().astype(np.float16)
    np.savez_compressed(folder / ARRAYS_FILE, **arrays)
    write_video(folder / VIDEO_FILE, arrays["frames"], fps=result.fps)
    sound = _copy_sound(folder / VIDEO_FILE, result)
    columns = _columns(result)
    write_video(folder / POSE_VIDEO, columns["pose"], fps=result.fps)
    write_video(folder / SIDE_BY_SIDE_FILE, _side_by_side(columns), fps=result.fps)
    Image.fromarray(_contact_sheet(columns)).save(folder / CONTACT_SHEET_FILE)
    content = {"request": request, "num_frames": len(result.frames), "fps": result.fps, **sound, **details}
    content["sizes"] = _sizes(folder)
    (folder / RESULT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_sound(path: Path, result: ClipResult) -> dict[str, str]:
    """Adds the driving video's sound; returns how it was done, for the result's description.

    Sound that cannot be read is reported and left out: the pictures are worth more than it.
    """
    if result.driving_video is None:
        return {}
    try:
        done = copy_sound(path, result.driving_video, seconds=len(result.frames) / result.fps)
    except VideoError as error:
        if isinstance(error.__cause__, OSError):  # of the storage: the same command tries again
            raise
        logger.warning("the result has no sound: %s", error)
        return {"sound": f"none: {error}"}
    return {"sound": done or "none: the driving video has no sound"}


def _sizes(folder: Path) -> dict[str, int]:
    """The sizes in bytes of all files in the folder except the result's description."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != RESULT_FILE}


def installed_versions() -> dict[str, str]:
    """Versions of this package and of the packages that it computes with, and the commit of a source checkout."""
    return {**package_versions(), "commit": code_version()["commit"]}


def _columns(result: ClipResult) -> dict[str, NDArray[np.uint8]]:
    """Pictures `f H W 3` uint8 in the size of the result, by title."""
    height, width = result.frames.shape[-2:]
    reference = resize_images(result.reference, height, width).clamp(0, 1)
    columns = {
        "reference": reference.expand(len(result.frames), -1, -1, -1),
        "pose": resize_images(result.poses, height, width),
    }
    if result.normals is not None and result.depths is not None:
        made = {"normal": encode_normals(result.normals), "depth": result.depths.expand(-1, 3, -1, -1)}
        columns |= {name: resize_map(maps, height, width, kind=MODALITIES[name].kind) for name, maps in made.items()}
    columns["result"] = result.frames
    return {title: tensor_to_pictures(frames) for title, frames in columns.items()}


def _side_by_side(columns: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    titles = list(columns)
    return [
        draw_grid([GridRow("", pictures)], titles=titles, smallest_width=SMALLEST_WIDTH)
        for pictures in zip(*columns.values(), strict=True)
    ]


def _contact_sheet(columns: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """A grid with one row for each kind of picture and one column for each shown frame."""
    num_frames = len(columns["result"])
    shown = [int(i) for i in np.linspace(0, num_frames - 1, min(num_frames, SHEET_COLUMNS)).round()]
    rows = [GridRow(title, _chosen(frames, shown)) for title, frames in columns.items() if title != "reference"]
    rows = [
        GridRow(row.label, [columns["reference"][0] if i == 0 else None, *row.pictures]) for i, row in enumerate(rows)
    ]
    titles = ["reference", *(f"frame {i}" for i in shown)]
    return draw_grid(rows, titles=titles, smallest_width=SMALLEST_WIDTH)


def _chosen(frames: NDArray[np.uint8], shown: Sequence[int]) -> list[NDArray[np.uint8]]:
    return [frames[i] for i in shown]
