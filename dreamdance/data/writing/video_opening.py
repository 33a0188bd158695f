"""Opens the videos of a clip and compares what their headers show: all that is wrong is named before work begins."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import is_transient
from dreamdance.media.video import VideoError, VideoInfo, probe_video
from dreamdance.media.video_names import is_text, printable
from dreamdance.modalities import MODALITIES, OPTIONAL
from dreamdance.recipe.schema import VideosSource

logger = logging.getLogger(__name__)

# What a clip may have a video of.
FILMED = tuple(name for name, modality in MODALITIES.items() if modality.domain or modality.control)
_HALF = 0.51  # of the time between two frames, with a little for rounded stamps


def video_files(folder: Path | str, name: str) -> dict[str, Path]:
    """The files of a clip by modality, those that need not be there included."""
    return {modality: Path(folder).absolute() / f"{name}.{modality}.mp4" for modality in FILMED}


def open_videos(source: VideosSource, name: str) -> dict[str, VideoInfo]:
    """Opens a clip's videos.

    Raises:
        VideoError: one cannot be read, or does not fit the pictures; names everything that is wrong with the clip.
    """
    if not is_text(name):  # as everything must be that is written into a clip
        raise VideoError(f"the name {name!r} is not text in UTF-8; rename the files")
    videos: dict[str, VideoInfo] = {}
    problems: list[str] = []
    for modality, path in video_files(source.folder, name).items():
        if modality in OPTIONAL and not os.path.lexists(path):
            continue
        if problem := _file_problem(path):
            problems.append(problem)
            continue
        try:
            videos[modality] = probe_video(path)
        except VideoError as error:
            if is_transient(error):
                raise
            problems.append(str(error))
    if "rgb" in videos:
        problems += [problem for video in videos.values() if (problem := _misfit(videos["rgb"], video))]
        problems += _outside(source, videos["rgb"])
    if problems:
        raise VideoError("; ".join(problems))
    return videos


def check_videos(
    source: VideosSource, names: Sequence[str], *, num_threads: int, on_video: Callable[[int], None]
) -> dict[str, str]:
    """Opens all clips' videos.

    Args:
        source: the folder, and the crop.
        names: of the clips.
        num_threads: most of the time is spent waiting for storage.
        on_video: called with the number of clips that have been opened.

    Returns:
        What is wrong: name -> reasons.

    Raises:
        VideoError: the storage fails.
    """
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(num_threads) as pool:
        opened = {pool.submit(open_videos, source, name): name for name in names}
        try:
            for number, future in enumerate(as_completed(opened), start=1):
                on_video(number)
                try:
                    future.result()
                except VideoError as error:
                    if is_transient(error):
                        raise
                    problems[opened[future]] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody waits for the rest
    return problems


def _file_problem(path: Path) -> str | None:
    if not os.path.lexists(path):
        return f"{path} is missing"
    if not path.exists():
        return f"{path} is a link that leads nowhere: {os.readlink(path)}"
    if not path.is_file():
        return f"{path} is no file"
    return None if os.access(path, os.R_OK, effective_ids=True) else f"{path} may not be read (permission denied)"


def _misfit(rgb: VideoInfo, video: VideoInfo) -> str | None:
    """What keeps a video from showing the same moments as the pictures, in the same places."""
    times, of_rgb = _times(video), _times(rgb)
    usual = max(_usual_gap(times), _usual_gap(of_rgb)) or 1 / rgb.fps
    alone = _alone(of_rgb, times, usual)
    same_size = (video.width, video.height) == (rgb.width, rgb.height)
    if same_size and abs(times[-1] - of_rgb[-1]) <= _HALF * usual and not len(alone):
        distance = max(_distances(times, of_rgb).max(), _distances(of_rgb, times).max())
        if distance > _HALF / rgb.fps:
            logger.warning(
                "%s and %s have frames at different times, up to %.3f s apart: the nearest in time belong together",
                printable(video.path),
                printable(rgb.path.name),
                distance,
            )
        return None
    hole = f"; at {alone[0]:.3f} s only {rgb.path.name} has a frame" if len(alone) else ""
    return (
        f"{video.path} has {video.num_frames} frames of {video.width}x{video.height}, {rgb.path.name} "
        f"{rgb.num_frames} of {rgb.width}x{rgb.height}; their last frames are shown at {times[-1]:.3f} s and "
        f"{of_rgb[-1]:.3f} s{hole}. The videos of a clip must show the same moments at the same times, in the same size"
    )


def _times(video: VideoInfo) -> NDArray[np.float64]:
    """When the frames are shown, in seconds after the first."""
    return (np.array(video.stamps, dtype=np.int64) - video.stamps[0]) * float(video.time_base)


def _usual_gap(times: NDArray[np.float64]) -> float:
    """The time between two frames; that of most of them, for one pause says nothing about the rest."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def _alone(of_rgb: NDArray[np.float64], times: NDArray[np.float64], usual: float) -> NDArray[np.float64]:
    """The pictures' times at which another video has no frame: farther away than half the usual gap of either.

    Where both have fewer frames than usual, half the shorter of the gaps that both have there. A frame of the other
    video that no picture is near to does no harm: it is left out.
    """
    gaps = np.diff(of_rgb)
    here = np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
    after = np.searchsorted(times, of_rgb).clip(0, len(times) - 1)
    there = times[after] - times[np.maximum(after - 1, 0)]
    return of_rgb[_distances(of_rgb, times) > _HALF * np.maximum(usual, np.minimum(here, there))]


def _distances(times: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each of some times is from the nearest of others; both rise."""
    after = np.searchsorted(others, times).clip(0, len(others) - 1)
    before = np.maximum(after - 1, 0)
    nearest: NDArray[np.float64] = np.minimum(np.abs(times - others[before]), np.abs(times - others[after]))
    return nearest


def _outside(source: VideosSource, rgb: VideoInfo) -> list[str]:
    if source.crop is None:
        return []
    left, top, width, height = source.crop
    if left + width <= rgb.width and top + height <= rgb.height:
        return []
    return [f"`videos.crop` {list(source.crop)} leaves {rgb.path} ({rgb.width}x{rgb.height})"]
