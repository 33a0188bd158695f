"""Key points of the driving videos and pictures of entries: found by the recipe's annotator, kept in side files.

A side file's name contains the hash of everything that determines it: the content of the video, the frames, the person,
and the annotator with its weights. Ranks that need the same one at the same time write the same content. Smoothing
takes a moment and is not kept.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.driving_video import choose_frames, to_reference, to_sequence
from dreamdance.annotators.opening import open_annotator
from dreamdance.annotators.people import NoSuchPersonError
from dreamdance.annotators.protocols import PoseAnnotator
from dreamdance.annotators.video_person import find_in_picture, find_in_video
from dreamdance.data.annotation.side_files import Arrays, SideFiles, StageKey
from dreamdance.errors import MissingInputError, UserError
from dreamdance.media.keypoints import KeypointSequence
from dreamdance.media.video import VideoInfo
from dreamdance.recipe.annotator_section import DrivingAnnotators, PersonBox
from dreamdance.runs.file_states import FileState, read_state

# Increase it when the code changes the key points: results and side files of other numbers are not taken.
_VERSION = 1
_FOLDER = ".keypoints"


class KeypointFinder:
    """Finds key points, or takes the kept ones."""

    def __init__(self, section: DrivingAnnotators, output: Path, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Opens no network yet.

        Args:
            section: the recipe's annotator.
            output: folder of the results, in which key points are kept if the section names no other folder.
            heartbeat: called while a network works.
        """
        self._section, self._heartbeat = section, heartbeat
        self._folder = output / _FOLDER if section.side_files is None else Path(section.side_files)

    @cached_property
    def annotator(self) -> PoseAnnotator:
        """The opened annotator.

        Raises:
            MissingInputError: it does not exist, its weights are missing, or it finds no poses.
        """
        name, weights = self._section.pose, self._section.weights
        opened = open_annotator(name, weights=weights, device=self._section.device)
        if not isinstance(opened, PoseAnnotator):
            raise MissingInputError(f"`annotators.pose` is {name}, which finds no poses")
        return opened

    def settings(self, person: int | PersonBox | None) -> dict[str, Any]:
        """Everything besides the files that determines the key points of a driving video, JSON-able."""
        chosen = self._choice(person)
        return {
            **self._network(),
            "person": list(chosen) if isinstance(chosen, tuple) else chosen,
            "smooth": self._section.smooth,
        }

    def of_video(
        self, video: VideoInfo, state: FileState, *, person: int | PersonBox | None, fps: float | None
    ) -> KeypointSequence:
        """The skeleton of one person of a driving video.

        Args:
            video: the video.
            state: the state of its file; an error if the file has another one when it has been read.
            person: which person; None takes the recipe's.
            fps: the rate; None keeps the video's.

        Raises:
            UserError: the video cannot be used, or shows nobody, or not this person.
        """
        frames = choose_frames(video, fps)
        chosen = self._choice(person)

        def find() -> Iterator[Arrays | None]:
            track = yield from find_in_video(self.annotator, video, frames, person=chosen)
            _check_unchanged(video.path, state)
            yield {"keypoints": track.keypoints}

        settings = {**self._network(), "person": chosen, "frames": frames}
        try:
            keypoints = self._make(StageKey("video", settings, [state.sha256]), find)
        except UserError as error:
            if type(error) in (UserError, NoSuchPersonError):  # about people, who are named without the video
                raise UserError(f"{video.path}: {error}") from error
            raise
        return to_sequence(video, keypoints, fps=fps or video.fps, smooth=self._section.smooth)

    def of_picture(self, path: Path, picture: NDArray[np.uint8], state: FileState) -> KeypointSequence:
        """The body of the largest and most central person of a reference picture.

        Args:
            path: its file.
            picture: `(H, W, 3)`, as a viewer shows it.
            state: the state of its file; an error if the file has another one now.

        Raises:
            UserError: nobody was found.
        """

        def find() -> Iterator[Arrays | None]:
            keypoints = find_in_picture(self.annotator, picture)
            _check_unchanged(path, state)
            yield {"keypoints": keypoints}

        keypoints = self._make(StageKey("picture", self._network(), [state.sha256]), find)
        height, width = picture.shape[:2]
        return to_reference(keypoints, width=width, height=height, where=str(path))

    def _choice(self, person: int | PersonBox | None) -> int | PersonBox | None:
        """Whom to follow; None for the largest and most central, also if the number 0 names them: equal keys."""
        return (self._section.person if person is None else person) or None

    def _network(self) -> dict[str, Any]:
        files = {file.file: file.sha256 for file in self.annotator.networks}
        return {"version": _VERSION, "annotator": self._section.pose, "weights": files}

    def _make(self, key: StageKey, find: Callable[[], Iterator[Arrays | None]]) -> NDArray[np.float32]:
        for found in SideFiles(self._folder).make(key, find):
            self._heartbeat()
            if found is not None:
                keypoints: NDArray[np.float32] = found["keypoints"]
                return keypoints
        raise AssertionError("a stage yields its result last")


def _check_unchanged(path: Path, state: FileState) -> None:
    if read_state(path, state) != state:
        raise UserError("the file was replaced while its key points were found")
