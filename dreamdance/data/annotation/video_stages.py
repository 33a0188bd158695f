"""The stages of one video: cuts, motion, the followed person with key points. Each keeps its result in a side file."""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import AxesCheck
from dreamdance.annotators.people import Box, NoSuchPersonError
from dreamdance.annotators.protocols import NUM_LANDMARKS
from dreamdance.annotators.video_person import PersonTrack, exchange_leg_landmarks, find_in_video
from dreamdance.data.annotation.networks import Networks
from dreamdance.data.annotation.side_files import Arrays, SideFiles, StageKey, last_result
from dreamdance.data.curation.clothes import describe_clothes
from dreamdance.data.curation.motion import MotionTrack, measure_motion
from dreamdance.data.curation.shots import Shot, find_shots, shrink_frames
from dreamdance.media.cropping import Crop
from dreamdance.media.keypoint_filter import filter_keypoints
from dreamdance.media.keypoints import CONFIDENCE_THRESHOLD, NUM_KEYPOINTS, KeypointSequence
from dreamdance.media.leg_sides import describe_exchanged_legs, exchange_legs, find_exchanged_legs
from dreamdance.media.letterbox import search_letterbox
from dreamdance.media.video import VideoInfo, iterate_frames, read_frames
from dreamdance.recipe.annotator_section import Annotators

logger = logging.getLogger(__name__)

# Increase a stage's number when its code changes its results: side files of other numbers are not taken.
STAGE_VERSIONS = {"area": 1, "clothes": 1, "cuts": 1, "motion": 2, "person": 1, "used": 2, "maps": 5}


@dataclass(frozen=True)
class FollowedPoses:
    """The person of a shot, frame by frame.

    Attributes:
        frames: the numbers of the frames in the video.
        found: key points `(f, 128, 3)` as the network found them, exchanged legs put right.
        smoothed: key points `(f, 128, 3)` to store and draw.
        landmarks: `(f, 33, 4)`, or None if the network finds none.
        num_people: number of people in each frame `(f,)`.
        key: the digest of the stage's key, for the keys of later stages.
    """

    frames: list[int]
    found: NDArray[np.float32]
    smoothed: NDArray[np.float32]
    landmarks: NDArray[np.float32] | None
    num_people: NDArray[np.int64]
    key: str

    def rows(self, frames: list[int]) -> list[int]:
        """The places of some of the video's frames."""
        places = {frame: row for row, frame in enumerate(self.frames)}
        return [places[frame] for frame in frames]


class VideoStages:
    """Runs the stages of a video, or takes their kept results."""

    def __init__(
        self, video: VideoInfo, content: str, *, section: Annotators, networks: Networks, files: SideFiles
    ) -> None:
        """Runs nothing yet.

        Args:
            video: the pictures.
            content: hash of the video's file.
            section: the recipe's annotators.
            networks: the opened annotators.
            files: where results are kept.
        """
        self.video, self.content, self.networks, self.files = video, content, networks, files
        self._section = section
        self._given_checks: dict[tuple[str, str], AxesCheck] = {}

    def key(self, stage: str, settings: dict[str, Any], *inputs: str) -> StageKey:
        """The key of a stage of this video."""
        version = STAGE_VERSIONS[stage.partition("-")[0]]
        return StageKey(stage, {"version": version, **settings}, [self.content, *inputs])

    def axes_check(self, normal: str, depth: str, *, given: bool) -> AxesCheck:
        """The comparison of normals with depth: one for all videos of this process, or, with given maps, for this one.

        Args:
            normal, depth: what makes them, for the message.
            given: whether one of them is a file of this video.
        """
        checks = self._given_checks if given else self.networks.axes_checks
        return checks.setdefault((normal, depth), AxesCheck((normal, depth)))

    def area(self) -> Generator[None, None, Crop]:
        """The part of the frames without black bars."""

        def find() -> Iterator[Arrays | None]:
            search = search_letterbox(iterate_frames(self.video), where=str(self.video.path))
            crop = yield from search
            yield {"crop": np.array([crop.left, crop.top, crop.width, crop.height])}

        result = yield from last_result(self.files.make(self.key("area", {}), find))
        return Crop(*result["crop"].tolist())

    def cut_probabilities(self) -> Generator[None, None, NDArray[np.float32]]:
        """The probability of a cut after each frame at a constant rate `(f,)`."""

        def find() -> Iterator[Arrays | None]:
            small = []
            for frame in small_frames(self.video):
                small.append(frame)
                yield None
            yield {"probabilities": self.networks.cuts.cut_probabilities(np.stack(small))}

        key = self.key("cuts", {"network": self.networks.identity("cuts")})
        result = yield from last_result(self.files.make(key, find))
        return result["probabilities"]

    def shots(self) -> Generator[None, None, tuple[list[Shot], NDArray[np.float32]]]:
        """The shots, in numbers of frames at a constant rate, and the probabilities of cuts."""
        probabilities = yield from self.cut_probabilities()
        return find_shots(probabilities, fps=self.video.fps), probabilities

    def motion(self) -> Generator[None, None, MotionTrack]:
        """The motion of the whole video."""

        def measure() -> Iterator[Arrays | None]:
            track = yield from measure_motion(self.video)
            yield {"speeds": track.speeds, "source": np.array(track.source)}

        result = yield from last_result(self.files.make(self.key("motion", {}), measure))
        return MotionTrack(result["speeds"], "codec" if str(result["source"]) == "codec" else "flow")

    def person(
        self, frames: list[int], *, fps: float, given: KeypointSequence | None = None, given_sha256: str = ""
    ) -> Generator[None, None, FollowedPoses]:
        """Follows the person through the frames of one shot.

        Args:
            frames: numbers of frames of the video.
            fps: their rate.
            given: key points of all frames of the video, which win over those of the network. The network then finds
                landmarks and masks of the person who has these key points.
            given_sha256: the hash of their file.

        Raises:
            NoSuchPersonError: the shot does not show the person that the recipe chooses.
        """
        choice = (self._section.person or None) if given is None else _first_box(given.keypoints[frames])
        settings = {"network": self.networks.identity("pose"), "person": choice, "frames": frames}
        key = self.key("person", settings)
        found = yield from last_result(self.files.make(key, lambda: self._find_person(frames, choice, given)))
        if "missing" in found:
            raise NoSuchPersonError(str(found["missing"]))
        keypoints = found["keypoints"] if given is None else given.keypoints[frames]
        landmarks = found["landmarks"] if len(found["landmarks"]) else None
        smoothed, smooth = keypoints, self._section.smooth and given is None
        sequence = KeypointSequence(keypoints, self.video.width, self.video.height, fps)
        if given is not None and (warning := describe_exchanged_legs(sequence, frames)) is not None:
            logger.warning("%s: %s", self.video.path, warning)
        if smooth:
            exchanged = find_exchanged_legs(sequence)
            keypoints = exchange_legs(keypoints, exchanged)
            if landmarks is not None:
                landmarks = exchange_leg_landmarks(landmarks, exchanged)
            smoothed = filter_keypoints(replace(sequence, keypoints=keypoints))
        version = STAGE_VERSIONS["used"]
        used = StageKey("used", {"version": version, "smooth": smooth, "fps": fps}, [key.digest, given_sha256])
        return FollowedPoses(frames, keypoints, smoothed, landmarks, found["num_people"], used.digest)

    def clothes(self, poses: FollowedPoses, frames: list[int]) -> Generator[None, None, NDArray[np.float32]]:
        """What the person of a shot wears, `(2, b)` of `describe_clothes`.

        Args:
            poses: the person.
            frames: the frames of the shot to look at.
        """

        def describe() -> Iterator[Arrays | None]:
            yield None
            keypoints = poses.smoothed[poses.rows(frames)]
            yield {"clothes": describe_clothes(read_frames(self.video, frames), keypoints)}

        key = self.key("clothes", {"frames": frames}, poses.key)
        result = yield from last_result(self.files.make(key, describe))
        return np.asarray(result["clothes"], dtype=np.float32)

    def _find_person(
        self, frames: list[int], choice: int | Box | None, given: KeypointSequence | None
    ) -> Iterator[Arrays | None]:
        try:
            track = yield from find_in_video(self.networks.pose, self.video, frames, person=choice)
        except NoSuchPersonError as error:
            if given is None:
                yield {"missing": np.array(str(error))}
                return
            logger.warning(
                "%s: the network does not find the person of the given key points: %s", self.video.path, error
            )
            points, landmarks = (
                np.zeros((len(frames), *size), np.float32) for size in ((NUM_KEYPOINTS, 3), (NUM_LANDMARKS, 4))
            )
            track = PersonTrack(points, landmarks, np.zeros(len(frames), np.int64))
        yield {"keypoints": track.keypoints, "landmarks": track.landmarks, "num_people": track.num_people}


def small_frames(video: VideoInfo) -> Iterator[NDArray[np.uint8]]:
    """The frames at a constant rate, small, as the detection of cuts and of equal footage sees them."""
    for frame in iterate_frames(video, video.constant_rate_frames()):
        yield shrink_frames([frame])[0]


def _first_box(keypoints: NDArray[np.float32]) -> Box | None:
    """The box of the visible points `(f, 128, 3)` in the first frame that has some."""
    for points in keypoints:
        seen = points[points[:, 2] >= CONFIDENCE_THRESHOLD, :2].clip(0.0, 1.0)
        if len(seen) and (seen.max(axis=0) > seen.min(axis=0)).all():
            (left, top), (right, bottom) = seen.min(axis=0).tolist(), seen.max(axis=0).tolist()
            return left, top, right, bottom
    return None
