"""Makes clips from a folder: `<clip>.rgb.mp4`, `<clip>.pose.mp4`, optional `<clip>.<modality>.mp4`, `.mkv` or `.npz`.

All videos of a clip are cut at the same times, cropped to the same region and resized to the same size.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from dreamdance.data.writing.clip_record import ClipRecord, NoClips, References, spread_over
from dreamdance.data.writing.map_files import (
    MapSource,
    ValueRange,
    as_video,
    disparity_range,
    is_metric,
    present_files,
    read_map,
)
from dreamdance.data.writing.video_opening import open_videos
from dreamdance.errors import MissingInputError
from dreamdance.media.cropping import Crop, centred_crop
from dreamdance.media.letterbox import search_letterbox
from dreamdance.media.map_arrays import MapArray
from dreamdance.media.video import VideoInfo, iterate_frames
from dreamdance.media.video_names import VIDEO_SUFFIXES, files_of, plain_name, printable
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.schema import VideosSource
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.sample_random import sample_generator

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]


def find_videos(folder: Path | str, *, plain: bool = False) -> list[str]:
    """The names of the clips in a folder, in alphabetical order; hidden files are ignored.

    Only the main rank warns about pictures without a pose. A link to a missing file counts as a video; `check_videos`
    reports it with all other problems.

    Args:
        folder: its subfolders are not searched.
        plain: whether a clip needs nothing but its pictures, `<clip>.mp4`. If not, it has pictures and a pose.

    Raises:
        MissingInputError: there is no such clip.
    """
    folder = Path(folder)
    files = [path.name for path in folder.glob("*.*") if path.name[0] != "."]
    if plain:
        if names := sorted({name for file in files if (name := plain_name(file)) is not None}):
            return names
        raise MissingInputError(
            f"no videos in {folder.absolute()}: `videos.folder` must contain <clip>{', <clip>'.join(VIDEO_SUFFIXES)}"
        )
    names = sorted({file[: -len(".rgb.mp4")] for file in files if file.lower().endswith(".rgb.mp4")})
    usable = [name for name in names if present_files(files_of(folder, name, [".pose.mp4"]))]
    for name in sorted(set(names) - set(usable)) if Ranks.from_environment().is_main else ():
        path = printable(folder / f"{name}.rgb.mp4")
        logger.warning("%s is left out: the folder has no %s.pose.mp4", path, printable(name))
    if not usable:
        found = [file for file in files if plain_name(file) is not None]
        hint = f". It has {len(found)} videos without a pose: `videos.annotators={{}}` finds the poses" if found else ""
        raise MissingInputError(
            f"no videos in {folder.absolute()}: `videos.folder` must contain <clip>.rgb.mp4 and <clip>.pose.mp4{hint}"
        )
    return usable


def choose_validation(
    names: list[str], *, fraction: float, seed: int, groups: Sequence[Sequence[str]] | None = None
) -> set[str]:
    """Draws whole videos for validation: the given fraction of them, but at least one, and never all.

    Args:
        names: of all videos, in alphabetical order.
        fraction: in [0,1).
        seed: of the draw.
        groups: all names in groups that the split must not divide; by default each video is its own group. Groups are
            drawn until the fraction is reached.

    Raises:
        MissingInputError: there is only one video, or one group.
    """
    if fraction == 0:
        return set()
    groups = [[name] for name in names] if groups is None else groups
    if len(groups) < 2:
        what = "one video" if len(names) < 2 else f"{len(names)} videos of the same footage"
        raise MissingInputError(
            f"{what} cannot be divided by clip; set `videos.split_by` to time, or `videos.validation_fraction` to 0"
        )
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    order = torch.randperm(len(groups), generator=sample_generator((seed, 0, 0), "validation videos")).tolist()
    chosen: set[str] = set()
    for index in order[:-1]:
        if len(chosen) < count:
            chosen.update(groups[index])
    return chosen


@dataclass(frozen=True)
class VideoPart:
    """The clips of one video in one split; the worker that writes them calls this object."""

    source: VideosSource
    name: str
    clip_id: str
    split: Split

    def __call__(self) -> Iterator[ClipRecord | NoClips | None]:
        """Yields None for each frame in which it searches for black bars, then the clips, or why there are none.

        Raises:
            VideoError: a video cannot be decoded, or is not aligned with the pictures.
        """
        videos = open_videos(self.source, self.name)
        rgb = as_video(videos["rgb"])
        frames = rgb.constant_rate_frames()[:: self.source.frame_stride]
        pieces = split_frames(frames, self.split, self.source)
        if not pieces:
            yield NoClips(explain_shortness(len(frames), self.split, self.source))
            return
        part = yield from self._find_crop(rgb)
        span = split_span(frames, self.split, self.source)
        chosen = [span.start + index for index in spread_over(len(span), self.source.references)]
        ranges = {name: found for name, one in videos.items() if (found := disparity_range(one)) is not None}
        step, references = self.source.frame_stride, None
        if chosen:
            maps = read_maps(self.source, videos, ranges, [frames[index] for index in chosen], part)
            references = References([step * index for index in chosen], maps)
        for number, (first, piece) in enumerate(pieces):
            start = span.start + number * self.source.clip_frames
            yield ClipRecord(
                clip_id=f"{self.clip_id}.{self.split}.{number:04d}",
                fps=rgb.fps / self.source.frame_stride,
                maps=read_maps(self.source, videos, ranges, piece, part),
                references=None if references is None else references.seen_from(step * start),
                frame_step=step,
                metadata={
                    "source": rgb.path.name,
                    "first_frame": first,
                    "crop": [part.left, part.top, part.width, part.height],
                    **({"depth_range": list(ranges["depth"].ends)} if is_metric(videos.get("depth")) else {}),
                },
            )

    def _find_crop(self, rgb: VideoInfo) -> Generator[None, None, Crop]:
        """Finds the kept part of the frame: the recipe's crop or the area without black bars, cut to the aspect."""
        part = Crop(left=0, top=0, width=rgb.width, height=rgb.height)
        if self.source.crop is not None:
            part = Crop(*self.source.crop)
        elif self.source.crop_letterbox:
            part = yield from search_letterbox(iterate_frames(rgb), where=str(rgb.path))
        if self.source.width is not None and self.source.height is not None:
            centred = centred_crop(part.width, part.height, to_width=self.source.width, to_height=self.source.height)
            part = centred.within(part)
        return part


def read_maps(
    source: VideosSource,
    files: Mapping[str, MapSource],
    ranges: Mapping[str, ValueRange],
    frames: list[int],
    part: Crop,
) -> dict[str, NDArray[Any]]:
    """Reads frames of the pictures, and those of all maps that show the same moments.

    Args:
        source: states the size of the stored frames.
        files: the pictures, and the maps that are given.
        ranges: what `disparity_range` found in them.
        frames: numbers of frames of the pictures, not decreasing.
        part: the part of each frame that is kept.
    """
    rgb = as_video(files["rgb"])
    width, height = source.width or part.width, source.height or part.height
    times = rgb.times(frames)
    maps = {}
    for name, file in files.items():
        same = file is rgb or isinstance(file, MapArray)
        chosen = frames if same else as_video(file).frames_at(times)
        maps[name] = read_map(
            MODALITIES[name], file, chosen, part, width=width, height=height, value_range=ranges.get(name)
        )
    return maps


def split_frames(frames: list[int], split: Split, source: VideosSource) -> list[tuple[int, list[int]]]:
    """Cuts a video's frames into clips.

    With `split_by: time` the last `validation_fraction` of the frames is for validation and the rest for training; else
    all frames belong to the split that the video was drawn for. A remainder shorter than `min_clip_frames` is left out.

    Returns:
        For each clip (number of its first frame in the video, numbers of its frames).
    """
    span = split_span(frames, split, source)
    frames = frames[span.start : span.stop]
    pieces = [frames[start : start + source.clip_frames] for start in range(0, len(frames), source.clip_frames)]
    return [(piece[0], piece) for piece in pieces if len(piece) >= source.min_clip_frames]


def explain_shortness(num_frames: int, split: Split, source: VideosSource) -> str:
    """Why a video is too short for a clip of a split.

    Args:
        num_frames: number of its frames at `videos.frame_stride`.
    """
    length = f"it has {num_frames} frames"
    if source.split_by == "time":
        share, end = source.validation_fraction, "last"
        if split == "train":
            share, end = 1 - share, "first"
        own = len(split_span(range(num_frames), split, source))
        length = (
            f"the {end} {100 * share:g} % of its {num_frames} frames, which are for {split} (`videos.split_by`, "
            f"`videos.validation_fraction`), are {own} frames"
        )
    stride = f" at `videos.frame_stride` {source.frame_stride}" if source.frame_stride > 1 else ""
    return f"{length}{stride}; a clip has at least {source.min_clip_frames} (`videos.min_clip_frames`)"


def split_span(frames: Sequence[int], split: Split, source: VideosSource) -> range:
    """The places in a video's frames that belong to a split; see `split_frames`.

    A frame that is shown for longer, so that its number repeats, belongs to one split alone: to the earlier part.
    """
    num_frames = len(frames)
    if source.split_by != "time":
        return range(num_frames)
    boundary = num_frames - round(source.validation_fraction * num_frames)
    while 0 < boundary < num_frames and frames[boundary] == frames[boundary - 1]:
        boundary += 1
    return range(boundary) if split == "train" else range(boundary, num_frames)
