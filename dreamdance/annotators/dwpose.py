"""DWPose: key points of the whole body (133 points) by two ONNX networks, a person detector and a pose network.

Z. Yang et al., "Effective Whole-body Pose Estimation with Two-stages Distillation" (2023). The detector is YOLOX-L,
which takes blue, green, red from 0 to 255. The pose network was trained on red, green, blue with ImageNet's mean and
deviation (`bgr_to_rgb=True` in the authors' configuration of mmpose); some of the programs around it feed BGR.
Not run with real weights: the tests run graphs of the same form.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.onnx_network import OnnxNetwork
from dreamdance.annotators.protocols import Person, PersonPoses
from dreamdance.annotators.weights import NetworkFile, find_network_file
from dreamdance.media.keypoints import NUM_KEYPOINTS

DETECTOR = NetworkFile(
    network="DWPose's person detector YOLOX-L",
    file="yolox_l.onnx",
    licence="Apache-2.0",
    source="https://huggingface.co/yzd-v/DWPose",
    sha256="7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
)
POSE_NETWORK = NetworkFile(
    network="DWPose",
    file="dw-ll_ucoco_384.onnx",
    licence="Apache-2.0",
    source="https://huggingface.co/yzd-v/DWPose",
    sha256="724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
)

# YOLOX: boxes of three grids of cells, and the scores of COCO's 80 classes, of which class 0 is a person.
DETECTOR_SIZE = 640
_STRIDES = (8, 16, 32)
_PADDING_GREY = 114
_DETECTOR_SHAPE = (1, sum((DETECTOR_SIZE // stride) ** 2 for stride in _STRIDES), 85)
# DWPose's own thresholds.
MIN_SCORE = 0.3
MAX_OVERLAP = 0.45

# RTMPose: 133 points, each as a distribution over half pixels of each axis (SimCC).
POSE_HEIGHT, POSE_WIDTH = 384, 288
NUM_POINTS = 133
_BINS_PER_PIXEL = 2
_POSE_SHAPES = ((1, NUM_POINTS, POSE_WIDTH * _BINS_PER_PIXEL), (1, NUM_POINTS, POSE_HEIGHT * _BINS_PER_PIXEL))
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_DEVIATION = np.array([58.395, 57.12, 57.375], np.float32)
BOX_PADDING = 1.25

# COCO-WholeBody: 17 points of the body, 6 of the feet, 68 of the face, 21 of the left hand, 21 of the right hand.
_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6
# The points of `media.keypoints`, without the neck (place 1), which COCO lacks.
_WITHOUT_NECK = np.array(
    [0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, *range(91, 112), *range(112, 133), *range(23, 91)]
)


class DWPose:
    """Finds people and their key points by DWPose's two networks."""

    finds_landmarks = False

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        files: tuple[NetworkFile, NetworkFile] = (DETECTOR, POSE_NETWORK),
    ) -> None:
        """Opens the networks.

        Args:
            folder: the folder that holds both files.
            device: `cpu`, `cuda` or `cuda:<number>`.
            num_threads: threads of the arithmetic on a CPU; None lets onnxruntime choose.
            files: other files of the same form, such as another export: detector, pose network.

        Raises:
            MissingInputError: a file is missing or damaged, or onnxruntime or the device is missing.
            UserError: a file has another form.
        """
        found = [find_network_file(folder, file) for file in files]
        self.networks = tuple(file for _, file in found)
        options: dict[str, Any] = {"device": device, "num_threads": num_threads}
        self._detector = OnnxNetwork(found[0][0], size=(DETECTOR_SIZE, DETECTOR_SIZE), outputs=1, **options)
        self._pose_network = OnnxNetwork(found[1][0], size=(POSE_HEIGHT, POSE_WIDTH), outputs=2, **options)

    def find_people(self, rgb: NDArray[np.uint8]) -> list[list[Person]]:
        """Finds all people in each of the frames `(f, H, W, 3)`, the surest first."""
        return [self._find_in_frame(frame) for frame in rgb]

    def annotate_pose(self, rgb: NDArray[np.uint8], people: Sequence[Person | None]) -> PersonPoses:
        """Finds the key points of one person, whose box in each frame is given; None where it was not found."""
        keypoints = np.zeros((len(rgb), NUM_KEYPOINTS, 3), np.float32)
        for index, (frame, person) in enumerate(zip(rgb, people, strict=True)):
            beat()
            if person is not None:
                keypoints[index] = self._find_points(frame, person.box)
        return PersonPoses(keypoints)

    def _find_in_frame(self, frame: NDArray[np.uint8]) -> list[Person]:
        beat()
        height, width = frame.shape[:2]
        ratio = min(DETECTOR_SIZE / height, DETECTOR_SIZE / width)
        inner_height, inner_width = int(height * ratio), int(width * ratio)
        picture = np.full((DETECTOR_SIZE, DETECTOR_SIZE, 3), _PADDING_GREY, np.uint8)
        picture[:inner_height, :inner_width] = cv2.resize(frame[..., ::-1], (inner_width, inner_height))
        (rows,) = self._detector.run(picture, shapes=(_DETECTOR_SHAPE,))
        boxes, scores = _decode_boxes(rows[0])
        boxes *= np.tile([width / inner_width, height / inner_height], 2)
        sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        kept = cv2.dnn.NMSBoxes(sizes.tolist(), scores.tolist(), MIN_SCORE, MAX_OVERLAP)
        return [_person(boxes[index], float(scores[index])) for index in np.asarray(kept, dtype=int).reshape(-1)]

    def _find_points(self, frame: NDArray[np.uint8], box: tuple[float, float, float, float]) -> NDArray[np.float32]:
        """Key points `(128, 3)` of the person in a box of the frame."""
        to_crop = _crop_matrix(box)
        crop = cv2.warpAffine(frame, to_crop, (POSE_WIDTH, POSE_HEIGHT), flags=cv2.INTER_LINEAR)
        columns, rows = self._pose_network.run((crop - _MEAN) / _DEVIATION, shapes=_POSE_SHAPES)
        in_crop = np.stack([columns[0].argmax(axis=-1), rows[0].argmax(axis=-1)], axis=-1) / _BINS_PER_PIXEL
        # both pictures count pixels from the centre of their first one
        in_frame = (in_crop - to_crop[:, 2]) / to_crop[[0, 1], [0, 1]] + 0.5
        places = in_frame / [frame.shape[1], frame.shape[0]]
        confidence = np.minimum(columns[0].max(axis=-1), rows[0].max(axis=-1)).clip(0.0, 1.0)
        confidence[((places < 0) | (places > 1)).any(axis=-1)] = 0.0
        return _to_our_points(np.concatenate([places, confidence[:, None]], axis=-1))


def _decode_boxes(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes of people `(n, 4)`, left, top, right, bottom in pixels of the detector's input, and their scores `(n,)`."""
    cells, strides = [], []
    for stride in _STRIDES:
        length = DETECTOR_SIZE // stride
        down, right = np.mgrid[:length, :length]
        cells.append(np.stack([right, down], axis=-1).reshape(-1, 2))
        strides.append(np.full((length * length, 1), stride))
    cell, stride = np.concatenate(cells), np.concatenate(strides)
    scores = rows[:, 4].astype(np.float64) * rows[:, 5]
    likely = scores > MIN_SCORE
    places = rows[likely].astype(np.float64)
    centres = (places[:, :2] + cell[likely]) * stride[likely]
    halves = np.exp(places[:, 2:4]) * stride[likely] / 2
    return np.concatenate([centres - halves, centres + halves], axis=1), scores[likely]


def _person(box: NDArray[np.float64], score: float) -> Person:
    left, top, right, bottom = (float(value) for value in box)
    side = BOX_PADDING * max(right - left, bottom - top)
    return Person((left, top, right, bottom), score, ((left + right) / 2, (top + bottom) / 2, side, 0.0))


def _crop_matrix(box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """The map `(2, 3)` from pixels of the frame to pixels of the crop: the padded box, brought to the crop's aspect."""
    left, top, right, bottom = box
    width, height = (right - left) * BOX_PADDING, (bottom - top) * BOX_PADDING
    width = max(width, height * POSE_WIDTH / POSE_HEIGHT)
    scale = POSE_WIDTH / width
    return np.array(
        [
            [scale, 0.0, POSE_WIDTH / 2 - scale * (left + right) / 2],
            [0.0, scale, POSE_HEIGHT / 2 - scale * (top + bottom) / 2],
        ]
    )


def _to_our_points(points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Turns COCO-WholeBody's points `(133, 3)` into those of `media.keypoints`; the neck lies between the shoulders."""
    shoulders = points[[_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    neck = np.concatenate([shoulders[:, :2].mean(axis=0), shoulders[:, 2:].min(axis=0)])
    return np.insert(points[_WITHOUT_NECK], 1, neck, axis=0).astype(np.float32)
