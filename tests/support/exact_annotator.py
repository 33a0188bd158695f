"""A pose annotator that knows the right answers: it recognises frames of rendered dancers and returns their poses."""

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.protocols import Person, PersonPoses
from dreamdance.annotators.weights import NetworkFile
from dreamdance.media.keypoints import BODY, NUM_KEYPOINTS

# In a recipe: `annotators: {pose: "support.exact_annotator:open_exact"}`.
NAME = f"{__name__}:open_exact"
# A frame that differs more from every known one, on average over its pixels, shows nobody.
LARGEST_DIFFERENCE = 12.0


class ExactAnnotator:
    """Finds the people of known pictures.

    Attributes:
        frames_seen: number of frames that were given to it.
    """

    networks: tuple[NetworkFile, ...] = ()

    def __init__(self) -> None:
        self._known: list[tuple[NDArray[np.uint8], list[NDArray[np.float32]]]] = []
        self.frames_seen = 0

    def learn(self, rgb: NDArray[np.uint8], *people: NDArray[np.float32]) -> None:
        """Remembers frames `(f, H, W, 3)` and the key points `(f, 128, 3)` of each of their people."""
        for number, frame in enumerate(rgb):
            self._known.append((frame, [keypoints[number] for keypoints in people]))

    def find_people(self, rgb: NDArray[np.uint8]) -> list[list[Person]]:
        self.frames_seen += len(rgb)
        return [[_person(points, frame.shape) for points in self._people(frame)] for frame in rgb]

    def annotate_pose(self, rgb: NDArray[np.uint8], people: list[Person | None]) -> PersonPoses:
        keypoints = np.zeros((len(rgb), NUM_KEYPOINTS, 3), np.float32)
        for number, (frame, person) in enumerate(zip(rgb, people, strict=True)):
            for points in self._people(frame):
                if person is not None and _person(points, frame.shape).box == person.box:
                    keypoints[number] = points
        return PersonPoses(keypoints)

    def _people(self, frame: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        alike = [(picture, people) for picture, people in self._known if picture.shape == frame.shape]
        differences = [float(np.abs(picture.astype(np.float32) - frame).mean()) for picture, _ in alike]
        if not differences or min(differences) > LARGEST_DIFFERENCE:
            return []
        return alike[int(np.argmin(differences))][1]


def _person(points: NDArray[np.float32], shape: tuple[int, ...]) -> Person:
    places = points[BODY, :2] * (shape[1], shape[0])
    (left, top), (right, bottom) = places.min(axis=0).tolist(), places.max(axis=0).tolist()
    side = max(right - left, bottom - top)
    return Person((left, top, right, bottom), 0.9, ((left + right) / 2, (top + bottom) / 2, side, 0.0))


EXACT = ExactAnnotator()


def open_exact() -> ExactAnnotator:
    """The one annotator of this process."""
    return EXACT
