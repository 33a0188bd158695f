"""Opens the videos of clips and compares their headers, so that one error lists all problems before work begins."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.writing.given_files import GivenFiles
from dreamdance.data.writing.map_files import (
    MapSource,
    as_video,
    candidate_files,
    open_map,
    present_files,
)
from dreamdance.data.writing.picture_problem import picture_problem
from dreamdance.errors import is_transient
from dreamdance.media.keypoint_formats import read_any_keypoints
from dreamdance.media.keypoints import KeypointFileError, KeypointSequence
from dreamdance.media.map_arrays import MapArray
from dreamdance.media.video import VideoError, VideoInfo
from dreamdance.media.video_names import files_of, is_text, printable
from dreamdance.modalities import OPTIONAL
from dreamdance.recipe.schema import VideosSource
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

# Frames match if their times differ by at most this part of the time between two frames: half, and a rounding error.
_HALF_GAP = 0.51
# Key points belong to a video if their rate and aspect differ from the video's by at most this part: 23.976 and 24
# frames per second agree, and so do the sizes of a reduced video, which are rounded.
_TOLERANCE = 0.01


def open_videos(source: VideosSource, name: str) -> dict[str, MapSource]:
    """Opens a clip's videos, and its arrays of maps. With `videos.annotators` only the pictures are needed.

    Raises:
        VideoError: a file cannot be read, or is not aligned with the pictures; the error names all problems.
    """
    if not is_text(name):  # a stored clip contains the name as text
        raise VideoError(f"the name {name!r} is not text in UTF-8; rename the files")
    if (reason := picture_problem(source.folder, name)) is not None:
        raise VideoError(reason)
    videos: dict[str, MapSource] = {}
    problems: list[str] = []
    for modality, candidates in candidate_files(source.folder, name, plain=source.annotators is not None).items():
        found = present_files(candidates)
        if not found and (modality in OPTIONAL or (modality == "pose" and source.annotators is not None)):
            continue
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            problems.append(f"{found[0].parent} has {names}: the same map twice, keep the one that shall be read")
            continue
        path = found[0] if found else candidates[0]
        if problem := _file_problem(path):
            problems.append(problem)
            continue
        try:
            videos[modality] = open_map(path, modality)
        except VideoError as error:
            if is_transient(error):
                raise
            problems.append(str(error))
    if "rgb" in videos:
        rgb = as_video(videos["rgb"])
        problems += [problem for video in videos.values() if (problem := _alignment_problem(rgb, video))]
        problems += _crop_problems(source, rgb)
        try:
            read_given_keypoints(source, name, rgb)
        except KeypointFileError as error:
            problems.append(str(error))
    if problems:
        raise VideoError("; ".join(problems))
    return videos


def clip_files(source: VideosSource, name: str) -> tuple[Path, ...]:
    """All paths where a file of a clip may be; none of them has to exist."""
    plain = source.annotators is not None
    files = tuple(chain.from_iterable(candidate_files(source.folder, name, plain=plain).values()))
    return (*files, keypoints_path(source, name)) if plain else files


def keypoints_path(source: VideosSource, name: str) -> Path:
    """Where the key points of a clip are, if they are given."""
    return files_of(source.folder, name, [".keypoints.json"])[0]


def read_given_keypoints(source: VideosSource, name: str, rgb: VideoInfo) -> KeypointSequence | None:
    """The key points beside a clip's pictures; None if there are none, or if no annotators are set.

    Raises:
        KeypointFileError: the file cannot be used, or its number of frames, rate or aspect is not that of the pictures.
    """
    path = keypoints_path(source, name)
    if source.annotators is None or not os.path.lexists(path):
        return None
    person = source.annotators.person if isinstance(source.annotators.person, int) else None
    given = read_any_keypoints(path, size=(rgb.width, rgb.height), fps=rgb.fps, person=person)
    if len(given.keypoints) != rgb.num_frames:
        raise KeypointFileError(f"{path} has {len(given.keypoints)} frames, {rgb.path.name} {rgb.num_frames}")
    if abs(given.fps / rgb.fps - 1) > _TOLERANCE:
        raise KeypointFileError(
            f"{path} states {given.fps:g} frames per second, {rgb.path.name} has {rgb.fps:g}: find the key points in "
            "this video"
        )
    if abs((given.width / given.height) / (rgb.width / rgb.height) - 1) > _TOLERANCE:
        raise KeypointFileError(
            f"{path} states frames of {given.width}x{given.height}, {rgb.path.name} has {rgb.width}x{rgb.height}: the "
            "aspects differ. Key points of a cropped or padded picture do not fit the video; find them in the whole "
            "frame"
        )
    return given


def check_videos(
    source: VideosSource, names: Sequence[str], *, num_threads: int, on_video: Callable[[int], None]
) -> dict[str, str]:
    """Opens the videos of all clips.

    Args:
        source: the folder and the crop.
        names: the names of the clips.
        num_threads: number of clips opened at a time; opening mostly waits for storage.
        on_video: called with the number of clips that have been opened.

    Returns:
        The problems: name -> reasons.

    Raises:
        VideoError: the storage fails.
    """
    problems: dict[str, str] = {}
    given = GivenFiles(source)
    with ThreadPoolExecutor(num_threads) as pool:
        opened = {pool.submit(open_videos, source, name): name for name in names}
        try:
            for number, future in enumerate(as_completed(opened), start=1):
                on_video(number)
                try:
                    videos, keypoints = future.result(), keypoints_path(source, opened[future])
                    given.add(videos, has_keypoints=os.path.lexists(keypoints))
                except VideoError as error:
                    if is_transient(error):
                        raise
                    problems[opened[future]] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the rest is not opened
    if Ranks.from_environment().is_main:
        given.report()
    return problems


def _file_problem(path: Path) -> str | None:
    if not os.path.lexists(path):
        return f"{path} is missing"
    if not path.exists():
        return f"{path} is a link to a missing file: {os.readlink(path)}"
    if not path.is_file():
        return f"{path} is not a file"
    return None if os.access(path, os.R_OK, effective_ids=True) else f"{path} cannot be read (permission denied)"


def _shape_problem(rgb: VideoInfo, array: MapArray) -> str | None:
    """The reason why an array, which has no times, is not a frame for each frame of the pictures; None if it is."""
    if (array.num_frames, array.width, array.height) == (rgb.num_frames, rgb.width, rgb.height):
        return None
    return (
        f"{array.path} has {array.num_frames} frames of {array.width}x{array.height}, {rgb.path.name} {rgb.num_frames} "
        f"of {rgb.width}x{rgb.height}; an array has as many frames as the pictures, in the same size"
    )


def _alignment_problem(rgb: VideoInfo, video: MapSource) -> str | None:
    """The reason why a video and the pictures do not show the same times at the same size; None if they do."""
    if isinstance(video, MapArray):
        return _shape_problem(rgb, video)
    times, of_rgb = _times(video), _times(rgb)
    usual = max(_usual_gap(times), _usual_gap(of_rgb)) or 1 / rgb.fps
    unmatched = _unmatched_times(of_rgb, times, usual)
    same_size = (video.width, video.height) == (rgb.width, rgb.height)
    if same_size and abs(times[-1] - of_rgb[-1]) <= _HALF_GAP * usual and not len(unmatched):
        distance = max(_distances(times, of_rgb).max(), _distances(of_rgb, times).max())
        if distance > _HALF_GAP / rgb.fps:
            logger.warning(
                "%s and %s have frames at different times, up to %.3f s apart: frames nearest in time are paired",
                printable(video.path),
                printable(rgb.path.name),
                distance,
            )
        return None
    hole = f"; at {unmatched[0]:.3f} s only {rgb.path.name} has a frame" if len(unmatched) else ""
    return (
        f"{video.path} has {video.num_frames} frames of {video.width}x{video.height}, {rgb.path.name} "
        f"{rgb.num_frames} of {rgb.width}x{rgb.height}; their last frames are shown at {times[-1]:.3f} s and "
        f"{of_rgb[-1]:.3f} s{hole}. The videos of a clip must show the same moments at the same times, in the same size"
    )


def _times(video: VideoInfo) -> NDArray[np.float64]:
    """The times of the frames, in seconds after the first."""
    return (np.array(video.stamps, dtype=np.int64) - video.stamps[0]) * float(video.time_base)


def _usual_gap(times: NDArray[np.float64]) -> float:
    """The median time between two frames in seconds, so that a single pause does not change it."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def _unmatched_times(of_rgb: NDArray[np.float64], times: NDArray[np.float64], usual: float) -> NDArray[np.float64]:
    """The times of the pictures at which another video has no frame: the nearest is farther away than half a gap.

    The gap is the usual gap of the two videos, or the shorter of their local gaps where both are longer than usual. A
    frame of the other video without a picture near it is no problem: it is left out.
    """
    gaps = np.diff(of_rgb)
    here = np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
    after = np.searchsorted(times, of_rgb).clip(0, len(times) - 1)
    there = times[after] - times[np.maximum(after - 1, 0)]
    return of_rgb[_distances(of_rgb, times) > _HALF_GAP * np.maximum(usual, np.minimum(here, there))]


def _distances(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of each of `times` to the nearest of `others`; both are sorted."""
    after = np.searchsorted(others, times).clip(0, len(others) - 1)
    before = np.maximum(after - 1, 0)
    nearest: NDArray[np.float64] = np.minimum(np.abs(times - others[before]), np.abs(times - others[after]))
    return nearest


def _crop_problems(source: VideosSource, rgb: VideoInfo) -> list[str]:
    if source.crop is None:
        return []
    left, top, width, height = source.crop
    if left + width <= rgb.width and top + height <= rgb.height:
        return []
    return [f"`videos.crop` {list(source.crop)} reaches beyond the frame of {rgb.path} ({rgb.width}x{rgb.height})"]
