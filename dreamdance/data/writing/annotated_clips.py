"""Makes clips from plain videos: every map that no file beside a video gives is made by the recipe's annotators."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import geometry_consistency
from dreamdance.annotators.people import NoSuchPersonError
from dreamdance.data.annotation.clip_maps import ClipMaps, GivenMaps, make_maps, to_crop
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.annotation.side_files import SideFiles
from dreamdance.data.annotation.video_stages import FollowedPoses, VideoStages
from dreamdance.data.curation.measures import measure_cut, measure_people, measure_sharpness, measure_visible_joints
from dreamdance.data.curation.motion import MotionTrack
from dreamdance.data.curation.person_crop import crop_person, holds_joints
from dreamdance.data.curation.scores import Scores
from dreamdance.data.writing.clip_record import ClipRecord, NoClips, References
from dreamdance.data.writing.map_files import MapSource, ValueRange, as_video, disparity_range, is_metric
from dreamdance.data.writing.reference_choice import ShotReferences, choose_references, shows_person
from dreamdance.data.writing.video_clips import Split, explain_shortness, read_maps, split_span
from dreamdance.data.writing.video_opening import keypoints_path, open_videos, read_given_keypoints
from dreamdance.media.cropping import Crop
from dreamdance.media.keypoint_filter import measure_jitter
from dreamdance.media.keypoints import KeypointSequence
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import VideoError, VideoInfo
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.file_states import read_state

logger = logging.getLogger(__name__)

# A clip is left out if fewer of its frames show the person.
_LEAST_FRAMES = 0.5


@dataclass(frozen=True)
class AnnotatedVideoPart:
    """The clips of one plain video in one split; the worker that writes them calls this object.

    Attributes:
        source: the folder, and how clips are cut.
        name: of the video's files.
        clip_id: the beginning of the clips' names.
        split: the part of the set.
        side_files: the folder of the results of the stages of all videos.
    """

    source: VideosSource
    name: str
    clip_id: str
    split: Split
    side_files: Path

    def __call__(self) -> Iterator[ClipRecord | NoClips | None]:
        """Yields None while it works on a clip, then the clip; if the video gives none, the reason.

        Raises:
            VideoError: a video cannot be decoded, is not aligned with the pictures, or shows the chosen person nowhere.
            UserError: an annotator cannot be opened, or its normals and depth disagree.
        """
        video = yield from _AnnotatedVideo.open(self.source, self.name, self.side_files / self.clip_id)
        own = set(video.own_frames(self.split))
        shots = yield from video.follow_people(own)
        clips = [(poses, piece) for poses in shots for piece in video.cut([f for f in poses.frames if f in own])]
        kept = [(poses, piece) for poses, piece in clips if shows_person(poses, piece).mean() >= _LEAST_FRAMES]
        if not kept:
            yield NoClips(video.explain_no_clips(self.split, num_shots=len(shots)))
            return
        if len(kept) < len(clips):
            logger.warning(
                "%s: %d of %d %s clips are left out, because nobody is seen in most of their frames",
                printable(video.rgb.path),
                len(clips) - len(kept),
                len(clips),
                self.split,
            )
        found = yield from choose_references(video.stages, shots, own, self.source.references)
        references = {poses.frames[0]: of_shot for poses, of_shot in zip(shots, found, strict=True)}
        for number, (poses, piece) in enumerate(kept):
            clip_id = f"{self.clip_id}.{self.split}.{number:04d}"
            yield (yield from video.make_clip(clip_id, poses, piece, references[poses.frames[0]]))


@dataclass(frozen=True)
class _AnnotatedVideo:
    """One video, its given maps, and what was found in the whole of it."""

    source: VideosSource
    files: Mapping[str, MapSource]
    ranges: Mapping[str, ValueRange]
    sha256: Mapping[str, str]
    keypoints: KeypointSequence | None
    stages: VideoStages
    area: Crop
    cuts: NDArray[np.float32]
    motion: MotionTrack
    shots: Sequence[list[int]]
    # The references that were made last, by their frames and crop.
    references: dict[tuple[Crop, tuple[int, ...]], References | None] = field(default_factory=dict)

    @property
    def rgb(self) -> VideoInfo:
        return self.stages.video

    @property
    def has_drawing(self) -> bool:
        """Whether poses are given as a drawing alone: found key points would be drawn in another style if mirrored."""
        return "pose" in self.files and self.keypoints is None

    @classmethod
    def open(cls, source: VideosSource, name: str, side_files: Path) -> Generator[None, None, "_AnnotatedVideo"]:
        """Opens the files of a video and finds its shots, its motion and its black bars."""
        section = source.annotators
        if section is None:
            raise ValueError("a plain video needs `videos.annotators`")
        files = open_videos(source, name)
        rgb = as_video(files["rgb"])
        keypoints = read_given_keypoints(source, name, rgb)
        paths = {modality: file.path for modality, file in files.items()}
        if keypoints is not None:
            paths["keypoints"] = keypoints_path(source, name)
        sha256 = {}
        for modality, path in paths.items():
            yield None
            if (state := read_state(path)) is None:
                raise VideoError(f"{path} was removed while its clips were made")
            sha256[modality] = state.sha256
        stages = VideoStages(
            rgb, sha256["rgb"], section=section, networks=open_networks(section), files=SideFiles(side_files)
        )
        shots, cuts = yield from stages.shots()
        motion = yield from stages.motion()
        if source.crop is not None:
            area = Crop(*source.crop)
        elif source.crop_letterbox:
            area = yield from stages.area()
        else:
            area = Crop(left=0, top=0, width=rgb.width, height=rgb.height)
        regular = rgb.constant_rate_frames()
        ranges = {one: found for one, file in files.items() if (found := disparity_range(file)) is not None}
        frames = [regular[shot.first : shot.end : source.frame_stride] for shot in shots]
        return cls(source, files, ranges, sha256, keypoints, stages, area, cuts, motion, frames)

    def follow_people(self, own: set[int]) -> Generator[None, None, list[FollowedPoses]]:
        """Follows the person through every shot that is long enough for a clip.

        Args:
            own: the frames of the split. A shot with too few of them for a clip is left out.

        Returns:
            The person of each shot that shows it.

        Raises:
            VideoError: no shot of the video shows the chosen person.
        """
        least = self.source.min_clip_frames
        shots = [frames for frames in self.shots if sum(frame in own for frame in frames) >= least]
        found, missing = list[FollowedPoses](), list[tuple[list[int], NoSuchPersonError]]()
        for frames in shots:
            try:
                found.append((yield from self._follow(frames)))
            except NoSuchPersonError as error:
                missing.append((frames, error))
        if missing:
            others = [frames for frames in self.shots if len(frames) >= least and frames not in shots]
            if not found and not (yield from self._show_person(others)):
                first, reason = missing[0]
                raise VideoError(
                    f"{self.rgb.path}: no shot shows the person that `videos.annotators.person` chooses; "
                    f"{self._span(first)}: {reason}"
                )
            logger.warning(
                "%s: %d of %d shots do not show the person that `videos.annotators.person` chooses and give no clip: "
                "%s",
                printable(self.rgb.path),
                len(missing),
                len(shots),
                ", ".join(self._span(frames) for frames, _ in missing),
            )
        return found

    def _follow(self, frames: list[int]) -> Generator[None, None, FollowedPoses]:
        fps, sha256 = self.rgb.fps / self.source.frame_stride, self.sha256.get("keypoints", "")
        return (yield from self.stages.person(frames, fps=fps, given=self.keypoints, given_sha256=sha256))

    def _show_person(self, shots: list[list[int]]) -> Generator[None, None, bool]:
        """Whether one of the shots shows the chosen person."""
        for frames in shots:
            try:
                yield from self._follow(frames)
            except NoSuchPersonError:
                continue
            return True
        return False

    def _span(self, frames: list[int]) -> str:
        first, last = self.rgb.times([frames[0], frames[-1]])
        return f"{first:.1f} to {last:.1f} s"

    def explain_no_clips(self, split: Split, *, num_shots: int) -> str:
        """Why the video gives a split no clip, although it shows the chosen person, or nobody.

        Args:
            split: the part of the set.
            num_shots: number of shots that are long enough and show the chosen person, or nobody.
        """
        if num_shots:
            return "nobody is seen in most of the frames of any clip"
        least, own = self.source.min_clip_frames, set(self.own_frames(split))
        num_frames = len(self.rgb.constant_rate_frames()[:: self.source.frame_stride])
        if len(split_span(range(num_frames), split, self.source)) < least:
            return explain_shortness(num_frames, split, self.source)
        longest = max((sum(frame in own for frame in frames) for frames in self.shots), default=0)
        if longest >= least:
            return "no shot shows the person that `videos.annotators.person` chooses"
        where = f" in the part for {split} (`videos.split_by`)" if self.source.split_by == "time" else ""
        return (
            f"its longest shot of {len(self.shots)} has {longest} frames{where}, cuts and the half second beside them "
            f"left out; a clip has at least {least} (`videos.min_clip_frames`)"
        )

    def own_frames(self, split: Split) -> list[int]:
        """The frames of the video that belong to a split."""
        regular = self.rgb.constant_rate_frames()
        span = split_span(regular, split, self.source)
        return regular[span.start : span.stop]

    def cut(self, frames: list[int]) -> list[list[int]]:
        """Cuts the frames of a shot into clips; a remainder that is too short is left out."""
        pieces = [frames[i : i + self.source.clip_frames] for i in range(0, len(frames), self.source.clip_frames)]
        return [piece for piece in pieces if len(piece) >= self.source.min_clip_frames]

    def make_clip(
        self,
        clip_id: str,
        poses: FollowedPoses,
        piece: list[int],
        references: ShotReferences,
    ) -> Generator[None, None, ClipRecord]:
        """Makes all maps and scores of one clip, and its references."""
        part = self._find_crop(poses, piece)
        maps, keypoints, made = yield from self._make_frames(poses, piece, part)
        of_clip = part, tuple(frame for _, frames in references for frame in frames)
        if of_clip not in self.references:
            self.references.clear()  # they are large
            self.references[of_clip] = yield from self._make_references(part, references)
        found, first = self.references[of_clip], self.rgb.constant_rate_frames().index(piece[0])
        return ClipRecord(
            clip_id=clip_id,
            fps=self.rgb.fps / self.source.frame_stride,
            maps=maps,
            keypoints=None if self.has_drawing else keypoints,
            metadata=self._metadata(
                poses, piece, part, made, self._measure(poses, piece, maps["rgb"], keypoints, made)
            ),
            references=None if found is None else found.seen_from(first),
            frame_step=self.source.frame_stride,
        )

    def _make_references(self, part: Crop, references: ShotReferences) -> Generator[None, None, References | None]:
        """The references of one person in one crop; their positions are counted from the video's first frame."""
        regular = {frame: place for place, frame in enumerate(self.rgb.constant_rate_frames())}
        positions, of_references, their_keypoints = list[int](), list[dict[str, NDArray[Any]]](), list[NDArray[Any]]()
        ranges = list[tuple[float, float] | None]()
        for shot, frames in references:
            for crop, group in self._group_by_crop(shot, frames, part):
                found, points, made = yield from self._make_frames(shot, group, crop)
                positions += [regular[frame] for frame in group]
                ranges += [self._depth_range(made)] * len(group)
                of_references.append(found)
                their_keypoints.append(points)
        order = np.argsort(positions, kind="stable").tolist()
        if not order:
            return None
        return References(
            [positions[place] for place in order],
            {name: np.concatenate([found[name] for found in of_references])[order] for name in of_references[0]},
            None if self.has_drawing else np.concatenate(their_keypoints)[order],
            [ranges[place] for place in order],
        )

    def _find_crop(self, poses: FollowedPoses, frames: list[int]) -> Crop:
        """The part of the area that is kept: all, or around the person if the recipe states a size."""
        if self.source.width is None or self.source.height is None:
            return self.area
        seen = to_crop(poses.smoothed[poses.rows(frames)], self.rgb.width, self.rgb.height, self.area)
        found = crop_person(
            seen,
            width=self.area.width,
            height=self.area.height,
            to_width=self.source.width,
            to_height=self.source.height,
        )
        return found.crop.within(self.area)

    def _group_by_crop(self, poses: FollowedPoses, frames: list[int], part: Crop) -> list[tuple[Crop, list[int]]]:
        """The clip's crop for all frames whose joints it does not cut; each other frame has its own crop."""
        seen = to_crop(poses.smoothed, self.rgb.width, self.rgb.height, self.area)
        held = {frame: holds_joints(self._inside(part), seen[poses.rows([frame])], self.area) for frame in frames}
        fitting = [frame for frame in frames if held[frame]]
        others = [(self._find_crop(poses, [frame]), [frame]) for frame in frames if not held[frame]]
        return [(part, fitting), *others] if fitting else others

    def _inside(self, part: Crop) -> Crop:
        """A crop of the frame, measured in the area."""
        return Crop(part.left - self.area.left, part.top - self.area.top, part.width, part.height)

    def _make_frames(
        self, poses: FollowedPoses, frames: list[int], part: Crop
    ) -> Generator[None, None, tuple[dict[str, NDArray[Any]], NDArray[np.float32], ClipMaps]]:
        """All maps of some frames, in the stored encodings, their key points, and what the scores need."""
        yield None
        read = read_maps(self.source, self.files, self.ranges, frames, part)
        given = {name: found for name, found in read.items() if name not in ("rgb", "pose")}
        made = yield from make_maps(self.stages, read["rgb"], poses, frames, part, GivenMaps(given, self.sha256))
        keypoints = to_crop(poses.smoothed[poses.rows(frames)], self.rgb.width, self.rgb.height, part)
        height, width = read["rgb"].shape[1:3]
        pose = read["pose"] if "pose" in read else draw_poses(keypoints, width=width, height=height)
        maps = {"rgb": read["rgb"], "pose": pose, "normal": made.normal, "depth": made.depth, "mask": made.mask}
        return maps, keypoints, made

    def _depth_range(self, made: ClipMaps) -> tuple[float, float] | None:
        return self.ranges["depth"].ends if is_metric(self.files.get("depth")) else made.depth_range

    def _measure(
        self,
        poses: FollowedPoses,
        piece: list[int],
        rgb: NDArray[np.uint8],
        keypoints: NDArray[np.float32],
        made: ClipMaps,
    ) -> Scores:
        rows, regular = poses.rows(piece), self.rgb.constant_rate_frames()
        places = slice(regular.index(piece[0]), regular.index(piece[-1]) + 1)
        found = KeypointSequence(
            poses.found[rows], self.rgb.width, self.rgb.height, self.rgb.fps / self.source.frame_stride
        )
        inside = made.mask > 0
        return Scores(
            cut=measure_cut(self.cuts[places]),
            motion=self.motion.mean(piece[0], piece[-1] + 1),
            sharpness=measure_sharpness(rgb, inside),
            visible_joints=measure_visible_joints(keypoints),
            people=measure_people(poses.num_people[rows].tolist()),
            jitter=_finite(measure_jitter(found)),
            geometry_angle=_finite(geometry_consistency(made.normals, made.depths, inside)),
        )

    def _metadata(
        self, poses: FollowedPoses, piece: list[int], part: Crop, made: ClipMaps, scores: Scores
    ) -> dict[str, Any]:
        sequence = KeypointSequence(
            poses.smoothed[poses.rows(piece)],
            self.rgb.width,
            self.rgb.height,
            self.rgb.fps / self.source.frame_stride,
        )
        networks = self.stages.networks
        given = {name: {"file": self.files[name].path.name} for name in self.files if name != "rgb"}
        if self.keypoints is not None:
            given["keypoints"] = {}
        metadata: dict[str, Any] = {
            "source": self.rgb.path.name,
            "source_sha256": self.sha256["rgb"],
            "first_frame": piece[0],
            "seconds": self.rgb.times([piece[0], piece[-1]]),
            "crop": [part.left, part.top, part.width, part.height],
            "annotators": {
                task: {**networks.identity(task), "licences": networks.licences(task)} for task in networks.names
            },
            "given": {name: {**about, "sha256": self.sha256[name]} for name, about in given.items()},
            "scores": scores.to_json(),
            "smoothed_jitter": _finite(measure_jitter(sequence)),
        }
        if (depth_range := self._depth_range(made)) is not None:
            metadata["depth_range"] = list(depth_range)
        if not made.sees_background:
            metadata["background"] = "none"
        return metadata


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
