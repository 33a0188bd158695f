"""Key points of one person: through a video, or in a picture."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.people import Box, follow_person
from dreamdance.annotators.protocols import LANDMARK_NAMES, NUM_LANDMARKS, Person, PersonPoses, PoseAnnotator
from dreamdance.media.keypoints import NUM_KEYPOINTS
from dreamdance.media.leg_sides import exchange_points
from dreamdance.media.video import VideoInfo, iterate_frames

_FRAMES_AT_ONCE = 16
_LANDMARKS = {name: index for index, name in enumerate(LANDMARK_NAMES)}
# The landmarks of each part of the legs in `media.leg_sides.PARTS`.
_LEG_LANDMARKS = (("hip",), ("knee", "ankle", "heel", "foot_index"))


@dataclass(frozen=True)
class PersonTrack:
    """What a pose annotator finds of one person.

    Attributes:
        keypoints: `(f, 128, 3)`, not smoothed; confidence 0 where the person was not found.
        landmarks: `(f, 33, 4)`; `(0, 33, 4)` if the network finds none.
        num_people: number of people in each frame `(f,)`.
    """

    keypoints: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    num_people: NDArray[np.int64]


def find_in_video(
    annotator: PoseAnnotator, video: VideoInfo, frames: list[int], *, person: int | Box | None
) -> Generator[None, None, PersonTrack]:
    """Follows one person through frames of a video; it is decoded twice. Yields after each part, as a heartbeat.

    Args:
        annotator: finds people and key points.
        video: the pictures.
        frames: numbers of its frames, in rising order.
        person: which person, see `follow_person`.

    Raises:
        NoSuchPersonError: there is no such person.
        VideoError: a frame is damaged.
    """
    return _find(annotator, lambda: _chunks(video, frames), width=video.width, height=video.height, person=person)


def exchange_leg_landmarks(landmarks: NDArray[np.float32], exchanged: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Gives the legs their own names in landmarks `(f, 33, 4)`, by the result of `find_exchanged_legs` `(f, 2)`."""
    return exchange_points(landmarks, exchanged, _LANDMARKS, _LEG_LANDMARKS)


def find_in_picture(annotator: PoseAnnotator, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The key points `(1, 128, 3)` of the largest and most central person; confidence 0 if nobody is there.

    Args:
        annotator: finds people and key points.
        picture: `(H, W, 3)`.
    """
    height, width = picture.shape[:2]
    search = _find(annotator, lambda: iter([picture[None]]), width=width, height=height, person=None)
    while True:
        try:
            next(search)
        except StopIteration as found:
            track: PersonTrack = found.value
            return track.keypoints


def _find(
    annotator: PoseAnnotator,
    chunks: Callable[[], Iterator[NDArray[np.uint8]]],
    *,
    width: int,
    height: int,
    person: int | Box | None,
) -> Generator[None, None, PersonTrack]:
    people: list[list[Person]] = []
    for rgb in chunks():
        people += annotator.find_people(rgb)
        yield None
    followed = follow_person(people, width=width, height=height, choice=person)
    places = [None] * len(people) if followed is None else list(followed.people)
    poses: list[PersonPoses] = []
    done = 0
    for rgb in chunks():
        poses.append(annotator.annotate_pose(rgb, places[done : done + len(rgb)]))
        done += len(rgb)
        yield None
    landmarks = [part.landmarks for part in poses if part.landmarks is not None]
    return PersonTrack(
        keypoints=np.concatenate([part.keypoints for part in poses]).reshape(-1, NUM_KEYPOINTS, 3),
        landmarks=np.concatenate(landmarks) if landmarks else np.zeros((0, NUM_LANDMARKS, 4), np.float32),
        num_people=np.array([len(found) for found in people], dtype=np.int64),
    )


def _chunks(video: VideoInfo, frames: list[int]) -> Iterator[NDArray[np.uint8]]:
    chunk: list[NDArray[np.uint8]] = []
    for frame in iterate_frames(video, frames):
        chunk.append(frame)
        if len(chunk) == _FRAMES_AT_ONCE:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)
