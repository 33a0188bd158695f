"""BlazePose: people, their 128 key points, 33 landmarks in space and masks, by networks that a package ships.

The `.tflite` files of the package mediapipe 0.10.21, which `tools/networks.sh` fetches, run by ai-edge-litert. The
package itself is never imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.anchor_detector import AnchorDetector
from dreamdance.annotators.blazepose_body import BodyNetwork, BodyPass, region_around
from dreamdance.annotators.blazepose_face import FaceNetworks
from dreamdance.annotators.blazepose_hands import Hand, HandNetworks, keep_own_hands
from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.picture_regions import Region, whole_picture
from dreamdance.annotators.protocols import LANDMARK_NAMES, NUM_LANDMARKS, Person, PersonPoses
from dreamdance.annotators.tflite_network import TfliteNetwork
from dreamdance.annotators.weights import NetworkFile, find_network_file
from dreamdance.media.keypoints import BODY, BODY_NAMES, FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND


def _mediapipe_file(name: str, sha256: str) -> NetworkFile:
    return NetworkFile(
        network=f"BlazePose ({name})",
        file=f"mediapipe/{name}.tflite",
        licence="Apache-2.0",
        source="the package mediapipe 0.10.21: bash tools/networks.sh",
        sha256=sha256,
    )


FILES = (
    _mediapipe_file("pose_detection", "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c"),
    _mediapipe_file("pose_landmark_full", "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f"),
    _mediapipe_file("palm_detection_full", "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54"),
    _mediapipe_file("hand_landmark_full", "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"),
    _mediapipe_file("face_detection_short_range", "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"),
    _mediapipe_file("face_landmark", "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"),
)

# A detection, and a person in a region, with a lower score are ignored (MediaPipe's values).
_DETECTION_SCORE, _PERSON_SCORE = 0.5, 0.5
# Two detections whose landmarks differ by less than this share of the region on average are one person.
_SAME_PERSON_DISTANCE = 0.05
# The person's box is wider than its landmarks by this share of the region: hair, hands and feet lie beyond them.
_BOX_MARGIN = 0.05
# The shortest projected forearm, and the smallest region around a head, as shares of the body's region.
_SHORTEST_FOREARM, _SMALLEST_HEAD = 0.06, 0.2
# Hands at wrists that the network believes hidden are not looked for.
_WRIST_VISIBILITY = 0.2
# Key points are written within this range, in fractions of the frame (the key-point file's).
_LOWEST, _HIGHEST = -1.0, 2.0

_INDEX = {name: index for index, name in enumerate(LANDMARK_NAMES)}
_SHOULDERS = [_INDEX["left_shoulder"], _INDEX["right_shoulder"]]
_HIPS = [_INDEX["left_hip"], _INDEX["right_hip"]]
# The landmark of each of the body's key points; the neck, which is none, is the middle of the shoulders.
_LANDMARK_OF_BODY = [_INDEX.get(name, 0) for name in BODY_NAMES]
_NECK = BODY_NAMES.index("neck")


class BlazePose:
    """Finds people, poses and masks. Its place in the recipe: `pose: blazepose`, `mask: blazepose`.

    Attributes:
        networks: the six files of weights.
    """

    def __init__(self, weights_folder: Path | str, *, num_threads: int = 1) -> None:
        """Loads the networks.

        Args:
            weights_folder: the folder that `tools/networks.sh` filled.
            num_threads: number of processor threads of each network.

        Raises:
            MissingInputError: a file is missing or has another hash, or ai-edge-litert is not installed.
        """
        found = [find_network_file(weights_folder, file) for file in FILES]
        self.networks = tuple(file for _, file in found)
        detection, body, palms, hands, faces, mesh = (TfliteNetwork(path, num_threads=num_threads) for path, _ in found)
        self._detector = AnchorDetector(detection, strides=(8, 16, 32, 32, 32), lowest=-1.0)
        self._body = BodyNetwork(body)
        self._hands = HandNetworks(AnchorDetector(palms, strides=(8, 16, 16, 16), lowest=0.0), hands)
        self._face = FaceNetworks(AnchorDetector(faces, strides=(8, 16, 16, 16), lowest=-1.0), mesh)

    def find_people(self, rgb: NDArray[np.uint8]) -> list[list[Person]]:
        """Finds all people in each of the frames `(f, H, W, 3)`, best first.

        The regions are those that the landmarks of a first pass give, which are tighter than the detector's.
        """
        _check_frames(rgb)
        return [self._find_people(frame) for frame in rgb]

    def _find_people(self, frame: NDArray[np.uint8]) -> list[Person]:
        beat()
        height, width = frame.shape[:2]
        found = self._detector.detect(frame, whole_picture(width, height), threshold=_DETECTION_SCORE)
        kept: list[BodyPass] = []
        people = []
        for detection in found:
            body = self._body.run(frame, region_around(detection.points[0], detection.points[1]))
            if body.score < _PERSON_SCORE or any(_is_same_person(body, other) for other in kept):
                continue
            box = _box_around(body, width, height)
            if box is not None:
                kept.append(body)
                people.append(Person(box, min(detection.score, body.score), body.region))
        return people

    def annotate_pose(self, rgb: NDArray[np.uint8], people: Sequence[Person | None]) -> PersonPoses:
        """Finds key points and landmarks of one person; confidence and visibility are 0 where it is not found.

        Args:
            rgb: `(f, H, W, 3)`.
            people: the person in each frame, or None.

        Raises:
            ValueError: the frames are no such array, or there is not one entry of `people` for each.
        """
        _check_frames(rgb)
        if len(people) != len(rgb):
            raise ValueError(f"{len(people)} people for {len(rgb)} frames; one entry for each frame is accepted")
        num_frames, height, width = rgb.shape[:3]
        keypoints = np.zeros((num_frames, NUM_KEYPOINTS, 3), dtype=np.float32)
        landmarks = np.zeros((num_frames, NUM_LANDMARKS, 4), dtype=np.float32)
        for index, (frame, person) in enumerate(zip(rgb, people, strict=True)):
            beat()
            body = self._body.run(frame, person.region) if person is not None else None
            if body is None or body.score < _PERSON_SCORE:
                continue
            landmarks[index, :, :2] = body.points / (width, height)
            landmarks[index, :, 2] = body.depths / width
            landmarks[index, :, 3] = body.visibility
            keypoints[index] = self._keypoints(frame, body)
        return PersonPoses(keypoints, landmarks)

    def annotate_mask(self, rgb: NDArray[np.uint8], poses: PersonPoses) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to masks `(f, H, W)` in [0,1].

        Masks that came with the poses are returned as they are. Else the person is looked for around the landmarks,
        those outside of the picture included, or, in poses without landmarks, around the key points. The mask is 0
        where neither shows shoulders and hips, or where the network sees nobody.
        """
        _check_frames(rgb)
        if poses.mask is not None:
            return poses.mask
        height, width = rgb.shape[1:3]
        mask = np.zeros(rgb.shape[:3], dtype=np.float32)
        for index, frame in enumerate(rgb):
            beat()
            region = None
            if poses.landmarks is not None:
                region = region_of_landmarks(poses.landmarks[index], width=width, height=height)
            if region is None:
                region = region_of_keypoints(poses.keypoints[index], width=width, height=height)
            body = self._body.run(frame, region) if region is not None else None
            if body is not None and body.score >= _PERSON_SCORE:
                mask[index] = body.mask(width=width, height=height)
        return mask

    def _keypoints(self, frame: NDArray[np.uint8], body: BodyPass) -> NDArray[np.float64]:
        """The 128 key points of one frame, `(128, 3)`."""
        height, width = frame.shape[:2]
        result = np.zeros((NUM_KEYPOINTS, 3))
        result[BODY, :2] = body.points[_LANDMARK_OF_BODY]
        result[BODY, 2] = body.visibility[_LANDMARK_OF_BODY]
        result[_NECK, :2] = body.points[_SHOULDERS].mean(axis=0)
        result[_NECK, 2] = body.visibility[_SHOULDERS].min()
        side = body.region[2]
        hands: list[Hand | None] = []
        wrists = []
        for name in ("left", "right"):
            elbow, wrist = _INDEX[f"{name}_elbow"], _INDEX[f"{name}_wrist"]
            wrists.append(body.points[wrist])
            if body.visibility[wrist] < _WRIST_VISIBILITY:
                hands.append(None)
                continue
            arm = {"elbow": body.points[elbow], "wrist": body.points[wrist]}
            hands.append(self._hands.find_hand(frame, **arm, shortest=_SHORTEST_FOREARM * side))
        for place, hand in zip(
            (LEFT_HAND, RIGHT_HAND), keep_own_hands(hands[0], hands[1], (wrists[0], wrists[1])), strict=True
        ):
            if hand is not None:
                result[place, :2], result[place, 2] = hand.points, hand.score
        face = self._face.find_face(frame, body.points, smallest=_SMALLEST_HEAD * side)
        if face is not None:
            result[FACE, :2], result[FACE, 2] = face.points, face.score
        result[:, :2] /= (width, height)
        is_outside = ((result[:, :2] < 0.0) | (result[:, :2] > 1.0)).any(axis=1)
        result[is_outside, 2] = 0.0
        result[:, :2] = result[:, :2].clip(_LOWEST, _HIGHEST)
        return result


def region_of_keypoints(keypoints: NDArray[Any], *, width: int, height: int) -> Region | None:
    """The region of a person whose key points `(128, 3)` are known; None if shoulders or hips are not."""
    body = keypoints[BODY].astype(np.float64)
    points, is_known = body[:, :2] * (width, height), body[:, 2] > 0
    joints = {name: index for index, name in enumerate(BODY_NAMES)}
    shoulders, hips = ([joints[f"{side}_{part}"] for side in ("left", "right")] for part in ("shoulder", "hip"))
    if not is_known[[*shoulders, *hips]].all():
        return None
    return _region_around_points(points[is_known], points[hips].mean(axis=0), points[shoulders].mean(axis=0))


def region_of_landmarks(landmarks: NDArray[Any], *, width: int, height: int) -> Region | None:
    """The region of a person whose landmarks `(33, 4)` are known; None where nobody was found.

    Landmarks outside of the picture count: of a person cut at the hips, the network has placed the legs too.
    """
    if not landmarks[:, 3].any():
        return None
    points = landmarks[:, :2].astype(np.float64) * (width, height)
    return _region_around_points(points, points[_HIPS].mean(axis=0), points[_SHOULDERS].mean(axis=0))


def _region_around_points(
    points: NDArray[np.float64], middle: NDArray[np.float64], top: NDArray[np.float64]
) -> Region | None:
    """The region of a body's points `(n, 2)`, from the middle of the hips and that of the shoulders."""
    radius = float(np.hypot(*(points - middle).T).max())
    up = top - middle
    length = float(np.hypot(*up))
    if length == 0.0:
        return None
    return region_around(middle, middle + up / length * radius)


def _box_around(body: BodyPass, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The box of a person within the picture; None if nothing of it lies there."""
    margin = _BOX_MARGIN * body.region[2]
    left, top = (body.points.min(axis=0) - margin).clip(0.0, (width, height))
    right, bottom = (body.points.max(axis=0) + margin).clip(0.0, (width, height))
    return (float(left), float(top), float(right), float(bottom)) if left < right and top < bottom else None


def _is_same_person(body: BodyPass, other: BodyPass) -> bool:
    distance = float(np.hypot(*(body.points - other.points).T).mean())
    return distance < _SAME_PERSON_DISTANCE * max(body.region[2], other.region[2])


def _check_frames(rgb: NDArray[Any]) -> None:
    if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"frames must be (f, H, W, 3) uint8; got {rgb.shape} {rgb.dtype}")
