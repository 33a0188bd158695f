"""Reads what `evaluate` compares: results of `animate`, and the true clips of the same ids, resized to their sizes."""

import json
import logging
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.columns import metric_disparity
from dreamdance.data.shards.tracks import Subject
from dreamdance.errors import MissingInputError, UserError
from dreamdance.media.cropping import centred_crop
from dreamdance.media.surfaces import PinholeCamera
from dreamdance.media.transforms import decode_normals, pictures_to_tensor, resize_map
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards
from dreamdance.runs.layout import ARRAYS_FILE, ENTRIES_FILE, RESULT_FILE
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

# (height, width) in pixels.
Size = tuple[int, int]

# The largest array that is read, in bytes.
MAX_ARRAY_BYTES = 1 << 33
# Type and number of dimensions of each array in a result.
_ARRAYS = {"frames": (np.dtype(np.uint8), 4), "normals": (np.dtype(np.float16), 4), "depths": (np.dtype(np.float16), 3)}


class ResultError(UserError):
    """A result folder is damaged, or does not match the true clip."""


@dataclass(frozen=True)
class Prediction:
    """Frames and maps of one clip, from a result, from the truth or from a trivial answer.

    Attributes:
        frames: `f H W 3` float32 in [0, 1], or None.
        normals: `f h w 3` unit vectors, or None.
        disparity: `f h w`, up to scale and shift, or None.
    """

    frames: NDArray[np.float32] | None = None
    normals: NDArray[np.float32] | None = None
    disparity: NDArray[np.float32] | None = None

    @property
    def given_frames(self) -> NDArray[np.float32]:
        """The frames `f H W 3` in [0, 1] of a result or of a stored clip, which always have them."""
        assert self.frames is not None
        return self.frames

    def at(self, indices: list[int]) -> "Prediction":
        """Returns the frames with these numbers."""
        parts = (self.frames, self.normals, self.disparity)
        return Prediction(*(None if part is None else part[indices] for part in parts))


@dataclass(frozen=True)
class Truth:
    """A true clip at the sizes of a result; parts that the shards do not hold are None.

    Attributes:
        pictures: frames, normals and disparity; disparity is normalised over the clip to [0, 1].
        frame_mask: `f H W`, the body mask at the frames' size.
        map_mask: `f h w`, the body mask at the maps' size.
        depth_range: smallest and largest disparity of the clip in 1/metre.
        camera: intrinsics at the maps' size.
    """

    pictures: Prediction
    frame_mask: NDArray[np.bool_] | None
    map_mask: NDArray[np.bool_] | None
    depth_range: tuple[float, float] | None
    camera: PinholeCamera | None

    @property
    def metric_disparity(self) -> NDArray[np.float64] | None:
        """The disparity `f h w` in 1/metre."""
        if self.pictures.disparity is None or self.depth_range is None:
            return None
        return metric_disparity(self.pictures.disparity, self.depth_range)

    def at(self, indices: list[int]) -> "Truth":
        """Returns the frames with these numbers."""
        return replace(
            self,
            pictures=self.pictures.at(indices),
            frame_mask=None if self.frame_mask is None else self.frame_mask[indices],
            map_mask=None if self.map_mask is None else self.map_mask[indices],
        )


@dataclass(frozen=True)
class Result:
    """The content of one result folder of an `animate` run.

    Attributes:
        id: the clip's id.
        prediction: frames and maps.
        fps: frames per second.
        reference_frame: number of the reference frame in the clip; None if the manifest did not contain it.
        window_starts: the frames with which the windows of stage 2 began; empty if the result does not name them.
    """

    id: str
    prediction: Prediction
    fps: float
    reference_frame: int | None
    window_starts: tuple[int, ...] = ()

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def frames(self) -> NDArray[np.float32]:
        assert self.prediction.frames is not None, "read_result reads the frames of every result"
        return self.prediction.frames

    @property
    def frame_size(self) -> Size:
        return self.frames.shape[1], self.frames.shape[2]

    @property
    def map_size(self) -> Size:
        """Size of the maps; the frames' size if there are no maps."""
        maps = self.prediction.normals
        return self.frame_size if maps is None else (maps.shape[1], maps.shape[2])


def find_results(folder: Path) -> list[Path]:
    """The complete result folders in `folder`, sorted by name.

    Raises:
        MissingInputError: there is no such folder.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{RESULT_FILE}") if not path.parent.name.startswith("."))
    if not found:
        raise MissingInputError(f"{folder} holds no results (key: results); run the animate recipe first")
    return found


def read_requested_ids(folder: Path) -> set[str]:
    """The ids of all clips that `animate` was asked for, until all have results; empty then.

    Raises:
        ResultError: the list is damaged.
    """
    path = folder / ENTRIES_FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise ValueError("it must be a list of ids")
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path} is damaged ({error}); give the command of animate again") from error
    return set(listed)


def read_result(folder: Path) -> Result:
    """Reads one result folder.

    Raises:
        ResultError: it is damaged, or `animate` did not write it.
    """
    try:
        details = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        arrays = _read_arrays(folder / ARRAYS_FILE)
        frames = arrays["frames"].astype(np.float32) / 255.0
        maps = {name: arrays[name].astype(np.float32) for name in ("normals", "depths") if name in arrays}
        reference_frame = details.get("reference_frame")
        if reference_frame is not None and (type(reference_frame) is not int or reference_frame < 0):
            raise ValueError(f"reference_frame {reference_frame!r} is not the number of a frame")
        starts = details.get("window_starts", [])
        if not isinstance(starts, list) or not all(type(start) is int for start in starts):
            raise ValueError(f"window_starts {starts!r} are not numbers of frames")
        fps = details.get("fps")
        if type(fps) not in (int, float) or not 0 < fps < math.inf:
            raise ValueError(f"fps {fps!r} is not a positive number")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise ResultError(f"result {folder} is damaged ({error}); delete it and run animate again") from error
    prediction = Prediction(frames, maps.get("normals"), maps.get("depths"))
    return Result(folder.name, prediction, float(fps), reference_frame, tuple(starts))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Reads the arrays of a result. Each header is checked before memory is allocated for its array.

    Raises:
        ValueError: an array has another type or number of dimensions, is larger than `MAX_ARRAY_BYTES`, or has more or
            fewer bytes than its shape needs.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name, (kind, dimensions) in _ARRAYS.items():
            if f"{name}.npy" not in archive.namelist():
                continue
            with archive.open(f"{name}.npy") as stored:
                if np.lib.format.read_magic(stored) != (1, 0):
                    raise ValueError(f"'{name}' is not in version 1.0 of the npy format")
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stored)
                num_bytes = math.prod(shape) * dtype.itemsize
                if dtype != kind or len(shape) != dimensions:
                    raise ValueError(f"'{name}' is {dtype} {shape}; it must be {kind} of {dimensions} dimensions")
                if num_bytes > MAX_ARRAY_BYTES:
                    raise ValueError(f"'{name}' would take {num_bytes} bytes; up to {MAX_ARRAY_BYTES} are read")
                held = archive.getinfo(f"{name}.npy").file_size - stored.tell()
                if held != num_bytes:
                    raise ValueError(f"'{name}' holds {held} bytes, but its shape {shape} needs {num_bytes}")
                arrays[name] = np.frombuffer(stored.read(num_bytes), dtype).reshape(
                    shape, order="F" if fortran_order else "C"
                )
    return arrays


def open_clips(shards: Shards, *, before_shard: Callable[[str], None] | None = None) -> StoredClips:
    """Opens and checks the stored clips of a set, for this process alone.

    Args:
        shards: the set.
        before_shard: called before each shard is checked, with a text that contains its number.
    """
    return StoredClips(shards, ranks=Ranks(), before_shard=before_shard)


def read_truth(
    clip: StoredClip, *, frame_size: Size, map_size: Size, frames: list[int] | None = None, subject: Subject = "clip"
) -> Truth:
    """Reads a stored clip, crops it to the result's aspect ratio, and resizes it as in training.

    Args:
        clip: a clip of the truth shards.
        frame_size: size of the result's frames.
        map_size: size of the result's maps.
        frames: numbers of the frames to read; all by default.
        subject: whether to read frames of the clip or its stored references.
    """
    read = partial(_read, clip, frames=frames, subject=subject)
    rgb = read("rgb", frame_size)
    normals = read("normal", map_size) if clip.has("normal", subject) else None
    disparity = read("depth", map_size) if clip.has("depth", subject) else None
    has_mask = clip.has("mask", subject)
    depth_range = clip.metadata.get("depth_range")
    return Truth(
        pictures=Prediction(
            frames=_as_array(rgb),
            normals=None if normals is None else _as_array(decode_normals(normals)),
            disparity=None if disparity is None else _as_array(disparity)[..., 0],
        ),
        frame_mask=read("mask", frame_size)[:, 0].bool().numpy() if has_mask else None,
        map_mask=read("mask", map_size)[:, 0].bool().numpy() if has_mask else None,
        depth_range=None if depth_range is None else (float(depth_range[0]), float(depth_range[1])),
        camera=_read_camera(clip, map_size),
    )


def _read(clip: StoredClip, name: str, size: Size, *, frames: list[int] | None, subject: Subject) -> Tensor:
    """The pictures of one column, `f c H W` in [0, 1]."""
    crop = centred_crop(clip.width, clip.height, to_width=size[1], to_height=size[0])
    pictures = crop.cut(clip.pictures(name, frames, subject=subject))
    return resize_map(pictures_to_tensor(pictures), *size, kind=MODALITIES[name].kind)


def _read_camera(clip: StoredClip, size: Size) -> PinholeCamera | None:
    """Intrinsics at `size`. Stored intrinsics have pixel centres at half numbers, ours at whole numbers."""
    matrix: Any = clip.metadata.get("intrinsics")
    if matrix is None:
        return None
    crop = centred_crop(clip.width, clip.height, to_width=size[1], to_height=size[0])
    camera = PinholeCamera(
        focal_x=float(matrix[0][0]),
        focal_y=float(matrix[1][1]),
        centre_x=float(matrix[0][2]) - 0.5 - crop.left,
        centre_y=float(matrix[1][2]) - 0.5 - crop.top,
    )
    return camera.resized((crop.height, crop.width), size)


def _as_array(pictures: Tensor) -> NDArray[np.float32]:
    """Turns `f c H W` into `f H W c`."""
    return torch.movedim(pictures, 1, -1).contiguous().numpy()
