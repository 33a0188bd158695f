"""The interfaces of annotators, and what they return.

Frames are `(f, H, W, 3)` uint8, in the order red, green, blue. Directions in space: x right, y up, z towards the
camera. An annotator whose network has other axes converts its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.weights import NetworkFile

# The 33 points in space of one body, in BlazePose's order.
LANDMARK_NAMES = (
    "nose", "left_eye_inner", "left_eye", "left_eye_outer", "right_eye_inner", "right_eye", "right_eye_outer",
    "left_ear", "right_ear", "mouth_left", "mouth_right", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_pinky", "right_pinky", "left_index", "right_index",
    "left_thumb", "right_thumb", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
    "left_heel", "right_heel", "left_foot_index", "right_foot_index",
)  # fmt: skip
NUM_LANDMARKS = len(LANDMARK_NAMES)


@dataclass(frozen=True)
class Person:
    """A person that a detector found in one frame. Lengths are in pixels of the frame, y points down.

    Attributes:
        box: left, top, right and bottom of the whole body.
        score: the detector's confidence, in [0,1].
        region: what the pose network shall see: centre x, centre y, side of a square, and its rotation in radians,
            positive when the body leans to the right of the picture.
    """

    box: tuple[float, float, float, float]
    score: float
    region: tuple[float, float, float, float]


@dataclass(frozen=True)
class PersonPoses:
    """The poses of one person in f frames.

    Attributes:
        keypoints: `(f, 128, 3)` float32 (`media.keypoints`); confidence 0 where nobody was found.
        landmarks: `(f, 33, 4)` float32, in the order of `LANDMARK_NAMES`, or None: x and y in [0,1] of the frame as in
            key points; z towards the camera, relative to the middle of the hips, in widths of the frame; visibility.
        mask: `(f, H, W)` float32 in [0,1], the share of each pixel that the person covers; None if not known.
    """

    keypoints: NDArray[np.float32]
    landmarks: NDArray[np.float32] | None = None
    mask: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Depths:
    """Depth of f frames.

    Attributes:
        values: `(f, H, W)` float32, finite.
        kind: `depth`: distance, positive, in any unit; `disparity`: larger is nearer, up to an unknown scale and shift.
    """

    values: NDArray[np.float32]
    kind: Literal["depth", "disparity"]


class _Annotator(Protocol):
    """What all annotators have. Two further attributes may be left out.

    * `uses`: what it reads beside the pictures, by task, such as `{"normal": ("poses", "mask"), "depth": ()}`. "poses"
      are key points and landmarks, "landmarks" those that it cannot do without. Kept results are made again only if
      these change. By default poses and mask.
    * `finds_landmarks`, of an annotator of poses: False if its poses have no landmarks.
    """

    @property
    def networks(self) -> tuple[NetworkFile, ...]:
        """The files of weights that the result depends on; empty for plain geometry."""


@runtime_checkable
class PoseAnnotator(_Annotator, Protocol):
    """Finds people and their key points."""

    def find_people(self, rgb: NDArray[np.uint8]) -> list[list[Person]]:
        """Finds all people in each of the frames `(f, H, W, 3)`, in any order."""

    def annotate_pose(self, rgb: NDArray[np.uint8], people: Sequence[Person | None]) -> PersonPoses:
        """Finds the key points of one person, whose place in each frame is given; None where it was not found."""


@runtime_checkable
class MaskAnnotator(_Annotator, Protocol):
    """Finds the pixels of the person."""

    def annotate_mask(self, rgb: NDArray[np.uint8], poses: PersonPoses) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to `(f, H, W)` float32 in [0,1]."""


@runtime_checkable
class NormalAnnotator(_Annotator, Protocol):
    """Estimates the surface normal at every pixel.

    Attributes:
        sees_background: False if only pixels of the mask have a meaning.
    """

    sees_background: bool

    def annotate_normal(
        self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to `(f, H, W, 3)` float32: unit length, x right, y up, z towards the camera."""


@runtime_checkable
class DepthAnnotator(_Annotator, Protocol):
    """Estimates the depth at every pixel.

    Attributes:
        sees_background: False if only pixels of the mask have a meaning.
    """

    sees_background: bool

    def annotate_depth(self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]) -> Depths:
        """Maps frames `(f, H, W, 3)` to their depths."""


Annotator = PoseAnnotator | MaskAnnotator | NormalAnnotator | DepthAnnotator


def check_shape(annotator: Any, result: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises ValueError if an annotator's result has another shape."""
    if result.shape != shape:
        raise ValueError(f"{type(annotator).__name__} returned shape {result.shape}, expected is {shape}")
