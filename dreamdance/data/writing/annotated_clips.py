"""Makes clips from plain videos: every map that no file beside a video gives is made by the recipe's annotators."""

import logging
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import geometry_consistency
from dreamdance.data.annotation.clip_maps import ClipMaps, make_maps, to_crop
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.annotation.side_files import SideFiles
from dreamdance.data.annotation.video_stages import FollowedPoses, VideoStages
from dreamdance.data.curation.motion import MotionTrack
from dreamdance.data.curation.person_crop import crop_person
from dreamdance.data.curation.scores import (
    Scores,
    measure_cut,
    measure_people,
    measure_sharpness,
    measure_visible_joints,
)
from dreamdance.data.writing.shard_parts import ClipRecord
from dreamdance.data.writing.video_clips import Split, resize_picture, split_frames
from dreamdance.data.writing.video_opening import open_videos
from dreamdance.media.cropping import Crop
from dreamdance.media.keypoint_filter import measure_jitter
from dreamdance.media.keypoints import KeypointSequence
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import VideoError, VideoInfo, iterate_frames
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.file_states import read_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotatedVideoPart:
    """The clips of one plain video in one split; the worker that writes them calls this object."""

    source: VideosSource
    name: str
    clip_id: str
    split: Split
    side_files: Path

    def __call__(self) -> Iterator[ClipRecord | None]:
        """Yields None while it works on a clip, then the clip.

        Raises:
            VideoError: a video cannot be decoded, or is not aligned with the pictures.
            UserError: an annotator cannot be opened, or its normals and depth disagree.
        """
        section = self.source.annotators
        if section is None:
            raise ValueError("a plain video needs `videos.annotators`")
        rgb = open_videos(self.source, self.name)["rgb"]
        state = read_state(rgb.path)
        if state is None:
            raise VideoError(f"{rgb.path} was removed while its clips were made")
        networks = open_networks(section)
        stages = VideoStages(
            rgb, state.sha256, section=section, networks=networks, files=SideFiles(self.side_files / self.clip_id)
        )
        regular = rgb.constant_rate_frames()
        kept = set(split_own(regular, self.split, self.source))
        shots, cuts = yield from stages.shots()
        motion = yield from stages.motion()
        area = yield from self._find_area(stages)
        number = 0
        for shot in shots:
            frames = regular[shot.first : shot.end : self.source.frame_stride]
            if len(frames) < self.source.min_clip_frames:
                continue
            fps = rgb.fps / self.source.frame_stride
            poses = yield from stages.person(frames, fps=fps)
            own = [frame for frame in frames if frame in kept]
            for _, piece in split_frames(own, self.split, self.source.model_copy(update={"split_by": "clip"})):
                record = yield from self._make_clip(stages, poses, piece, area, cuts, motion, regular, number)
                number += 1
                yield record
        if number == 0:
            logger.warning("%s gives no %s clip", printable(rgb.path), self.split)

    def _make_clip(
        self,
        stages: VideoStages,
        poses: FollowedPoses,
        piece: list[int],
        area: Crop,
        cuts: NDArray[np.float32],
        motion: MotionTrack,
        regular: list[int],
        number: int,
    ) -> Generator[None, None, ClipRecord]:
        video, rows = stages.video, poses.rows(piece)
        part = self._find_crop(video, area, poses.smoothed[rows])
        width, height = self.source.width or part.width, self.source.height or part.height
        pictures = []
        for frame in iterate_frames(video, piece):
            pictures.append(resize_picture(part.cut(frame), width, height))
            yield None
        rgb = np.stack(pictures)
        maps = yield from make_maps(stages, rgb, poses, piece, part)
        keypoints = to_crop(poses.smoothed[rows], video.width, video.height, part)
        places = [regular.index(piece[0]), regular.index(piece[-1]) + 1]
        sequence = KeypointSequence(poses.found[rows], video.width, video.height, video.fps / self.source.frame_stride)
        scores = Scores(
            cut=measure_cut(cuts[slice(*places)]),
            motion=motion.mean(piece[0], piece[-1] + 1),
            sharpness=measure_sharpness(rgb, maps.mask > 0),
            visible_joints=measure_visible_joints(keypoints),
            people=measure_people(poses.num_people[rows].tolist()),
            jitter=_finite(measure_jitter(sequence)),
            geometry_angle=_finite(geometry_consistency(maps.normals, maps.depths, (maps.mask > 0).astype(np.float32))),
        )
        smoothed = KeypointSequence(poses.smoothed[rows], video.width, video.height, sequence.fps)
        return ClipRecord(
            clip_id=f"{self.clip_id}.{self.split}.{number:04d}",
            fps=sequence.fps,
            maps={
                "rgb": rgb,
                "pose": draw_poses(keypoints, width=width, height=height),
                "normal": maps.normal,
                "depth": maps.depth,
                "mask": maps.mask,
            },
            keypoints=keypoints,
            metadata=self._metadata(stages, piece, part, maps, scores, _finite(measure_jitter(smoothed))),
        )

    def _find_area(self, stages: VideoStages) -> Generator[None, None, Crop]:
        """The part of the frames that may be kept: the recipe's crop, or all without black bars."""
        if self.source.crop is not None:
            return Crop(*self.source.crop)
        if self.source.crop_letterbox:
            return (yield from stages.area())
        return Crop(left=0, top=0, width=stages.video.width, height=stages.video.height)

    def _find_crop(self, video: VideoInfo, area: Crop, keypoints: NDArray[np.float32]) -> Crop:
        """The part of the area that a clip keeps: all, or around the person if the recipe states a size."""
        if self.source.width is None or self.source.height is None:
            return area
        seen = to_crop(keypoints, video.width, video.height, area)
        found = crop_person(
            seen,
            width=area.width,
            height=area.height,
            to_width=self.source.width,
            to_height=self.source.height,
        )
        return found.crop.within(area)

    def _metadata(
        self,
        stages: VideoStages,
        piece: list[int],
        part: Crop,
        maps: ClipMaps,
        scores: Scores,
        jitter: float | None,
    ) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "source": stages.video.path.name,
            "source_sha256": stages.content,
            "first_frame": piece[0],
            "seconds": stages.video.times([piece[0], piece[-1]]),
            "crop": list(asdict(part).values()),
            "annotators": {task: stages.networks.identity(task) for task in ("pose", "mask", "depth", "normal")},
            "scores": scores.to_json(),
            "smoothed_jitter": jitter,
        }
        if maps.depth_range is not None:
            metadata["depth_range"] = list(maps.depth_range)
        if not maps.sees_background:
            metadata["background"] = "none"
        return metadata


def split_own(frames: list[int], split: Split, source: VideosSource) -> list[int]:
    """The frames of a video that belong to a split: all, or with `split_by: time` its part of the video."""
    if source.split_by == "clip":
        return frames
    boundary = len(frames) - round(source.validation_fraction * len(frames))
    return frames[:boundary] if split == "train" else frames[boundary:]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
