"""The files of a clip's maps beside its pictures, and how each kind of file becomes frames in the stored encoding.

A map is a video (mp4; mkv, without loss if FFV1) or an array (.npz). Depth in 16 bits and metric depth need the latter.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dreamdance.data.shards.columns import encode_disparity_values, encode_grey
from dreamdance.media.cropping import Crop
from dreamdance.media.map_arrays import ACCEPTED, MapArray, iterate_map_array, open_map_array
from dreamdance.media.transforms import encode_normals, pictures_to_tensor, resize_normals, tensor_to_pictures
from dreamdance.media.video import VideoInfo, iterate_frames, iterate_grey16, probe_video
from dreamdance.media.video_names import FILE_MODALITIES, VIDEO_SUFFIXES, files_of
from dreamdance.modalities import ALWAYS_READ, Modality

MapSource = VideoInfo | MapArray

LOSSLESS_CODECS = frozenset({"ffv1", "ffvhuff", "huffyuv", "png", "rawvideo", "utvideo"})


def candidate_files(folder: Path | str, name: str, *, plain: bool = False) -> dict[str, tuple[Path, ...]]:
    """For each modality the paths where a clip's map may be; none of them has to exist.

    Args:
        folder: the folder of the videos.
        name: of the clip.
        plain: whether the pictures may also be `<clip>.mp4`, or another kind of video.
    """
    files = {
        modality: files_of(folder, name, [f".{modality}{end}" for end in _suffixes(modality, plain=plain)])
        for modality in FILE_MODALITIES
    }
    if plain:
        files["rgb"] += files_of(folder, name, VIDEO_SUFFIXES)
    return files


def present_files(candidates: tuple[Path, ...]) -> list[Path]:
    """Those that exist, also as links to missing files."""
    return [path for path in candidates if os.path.lexists(path)]


def open_map(path: Path, modality: str) -> MapSource:
    """Opens the file of a map.

    Raises:
        VideoError: the file is damaged, or does not hold such a map.
    """
    return open_map_array(path, modality) if path.suffix.lower() == ".npz" else probe_video(path)


def as_video(source: MapSource) -> VideoInfo:
    """The source, which is known to be a video."""
    assert isinstance(source, VideoInfo), "pictures and poses are read from videos alone"
    return source


def lossy_reason(source: MapSource, modality: str) -> str | None:
    """Why depth or normals of a file are not exact; None if they are, or if it is another map."""
    if modality not in ("depth", "normal") or not isinstance(source, VideoInfo):
        return None
    if source.codec not in LOSSLESS_CODECS:
        return f"{source.codec} compresses with loss"
    return "8 bits per value" if modality == "depth" and not source.display.is_grey16 else None


@dataclass(frozen=True)
class ValueRange:
    """The smallest and the largest disparity of a whole array: one scale for all clips and references of a video."""

    ends: tuple[float, float]


def is_metric(source: MapSource | None) -> bool:
    """Whether a file holds distances."""
    return isinstance(source, MapArray) and source.key == "depth"


def disparity_range(source: MapSource) -> ValueRange | None:
    """Reads through an array of depth or disparity in floats and finds its range; None for all other files.

    Raises:
        VideoError: a value is wrong.
    """
    if not isinstance(source, MapArray) or source.key not in ("depth", "disparity") or source.dtype.kind != "f":
        return None
    low, high = np.inf, -np.inf
    for frame in iterate_map_array(source, range(source.num_frames)):
        values = _to_disparity(frame, source)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return ValueRange((low, high))


def read_map(
    modality: Modality,
    source: MapSource,
    frames: list[int],
    part: Crop,
    *,
    width: int,
    height: int,
    value_range: ValueRange | None = None,
) -> NDArray[Any]:
    """Reads frames of a map.

    Args:
        modality: the map.
        source: its file.
        frames: frame numbers, not decreasing.
        part: the part of each frame that is kept.
        width, height: size of the stored frames.
        value_range: what `disparity_range` found in the file.

    Returns:
        The frames in the stored encoding (C9).

    Raises:
        VideoError: a frame is damaged or has wrong values.
    """
    if modality.kind == "values" and _has_values(source):
        return _read_values(source, frames, part, width=width, height=height, value_range=value_range)
    if modality.kind == "normals":
        cuts = (_normals_to_tensor(_cut(frame, part)) for frame in _pictures(source, frames))
        return np.concatenate([tensor_to_pictures(resize_normals(cut[None], height, width)) for cut in cuts])
    pictures = np.stack([resize_picture(_cut(frame, part), width, height) for frame in _pictures(source, frames)])
    if modality.channels == 3:
        return pictures
    return encode_grey(pictures if pictures.ndim == 4 else pictures[..., None], modality)


def resize_picture(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resizes `(H, W, 3)` or `(H, W)` uint8: when shrinking by area averages, which skip no pixel; else bicubically."""
    if picture.shape[:2] == (height, width):
        return np.ascontiguousarray(picture)
    shrinks = height * width < picture.shape[0] * picture.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=method), dtype=np.uint8)


def _cut(frame: NDArray[Any], part: Crop) -> NDArray[Any]:
    """The kept part of a frame `(H, W, 3)` or `(H, W)`."""
    return part.cut(frame) if frame.ndim == 3 else part.cut(frame[..., None])[..., 0]


def _suffixes(modality: str, *, plain: bool) -> tuple[str, ...]:
    if modality == "rgb" and plain:
        return VIDEO_SUFFIXES
    if modality in ALWAYS_READ and not plain:
        return (".mp4",)
    return (".mp4", ".mkv", ".npz") if modality in ACCEPTED else (".mp4", ".mkv")


def _has_values(source: MapSource) -> bool:
    """Whether a file has numbers of more than 8 bits."""
    return isinstance(source, MapArray) or source.display.is_grey16


def _pictures(source: MapSource, frames: list[int]) -> Iterator[NDArray[Any]]:
    """Frames as pictures: uint8, or unit normals as floats."""
    if isinstance(source, VideoInfo):
        yield from iterate_frames(source, frames)
        return
    for frame in iterate_map_array(source, frames):
        yield frame.astype(np.uint8) * np.uint8(255) if frame.dtype == np.bool_ else frame


def _normals_to_tensor(normals: NDArray[Any]) -> torch.Tensor:
    """`3 H W` in [0,1]: (n+1)/2."""
    if normals.dtype == np.uint8:
        return pictures_to_tensor(normals)
    return encode_normals(torch.from_numpy(np.moveaxis(normals, -1, 0).astype(np.float32)))


def _read_values(
    source: MapSource, frames: list[int], part: Crop, *, width: int, height: int, value_range: ValueRange | None
) -> NDArray[np.uint16]:
    """16-bit disparity, near bright. 16-bit numbers stay as they are, floats are scaled by the range of the file."""
    if isinstance(source, MapArray) and source.dtype.kind == "f":
        assert value_range is not None, "the caller finds the range of every array of floats"
        disparities = (_to_disparity(_cut(frame, part), source) for frame in iterate_map_array(source, frames))
        resized = np.stack([_resize_values(one, width, height) for one in disparities])
        return encode_disparity_values(resized, value_range.ends)
    read = iterate_map_array(source, frames) if isinstance(source, MapArray) else iterate_grey16(source, frames)
    return np.stack([_resize_values(_cut(frame, part), width, height) for frame in read])


def _to_disparity(values: NDArray[Any], source: MapArray) -> NDArray[np.float32]:
    values = values.astype(np.float32)
    return 1 / values if source.key == "depth" else values


def _resize_values(values: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Resizes numbers `(H, W)` uint16 or float32 without leaving their range: area averages, or bilinear."""
    if values.shape == (height, width):
        return np.ascontiguousarray(values)
    shrinks = height * width < values.shape[0] * values.shape[1]
    return np.asarray(
        cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    )
