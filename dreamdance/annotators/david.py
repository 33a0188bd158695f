"""DAViD: mask, relative depth and normals of people, by ONNX networks that were trained on exact synthetic truth.

F. Saleh et al., "DAViD: Data-efficient and Accurate Vision Models from Synthetic Data" (ICCV 2025). One file for all
three maps, or one for each. A picture is padded to a square and resized to 512 x 512, blue, green, red in [0,1].
Not run with real weights: the tests run graphs of the same form.

Two conventions stand in no document of the authors and were found as follows:

* Normals: x right, y up, z towards the camera, as here. The colours of the video on the project's page show it (the top
  of a head is green, its right side red, its front blue), and the project that measured the angle between DAViD's
  normals and a fitted head mesh on three photographs found 13-18 degrees with y up and 41-47 with y down.
* Depth: the authors' demo negates the result of the single network (`is_inverse=True`) and not that of the network for
  all tasks (`is_inverse_depth=False`), and shows both by the same colours, in which small is near. So the former is
  large where it is near and the latter where it is far. If a file differs, `annotators.axes.check_axes` finds it;
  `near_is_large` states it, in a function of your own that a recipe names (README).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.depth_windows import steady_person
from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.onnx_network import OnnxNetwork
from dreamdance.annotators.protocols import Depths, PersonPoses
from dreamdance.annotators.weights import NetworkFile, find_network_file

_SOURCE = "https://github.com/microsoft/DAViD"
MULTI_TASK = NetworkFile("DAViD, all tasks", "multi-task-model-vitl16_384.onnx", "MIT", _SOURCE)
DEPTH = NetworkFile(
    "DAViD, depth",
    "depth-model-vitb16_384.onnx",
    "MIT",
    _SOURCE,
    sha256="c8dc49821c95f7ab56a30150e58eba989b1d67ce988d11f083dc7350c54b883b",
)
NORMAL = NetworkFile("DAViD, normals", "normal-model-vitb16_384.onnx", "MIT", _SOURCE)
FOREGROUND = NetworkFile("DAViD, foreground", "foreground-segmentation-model-vitb16_384.onnx", "MIT", _SOURCE)

SIZE = 512
SEPARATE = (DEPTH, NORMAL, FOREGROUND)
# A key point of this confidence shows where the person is; a part of the foreground without any is another person.
_MIN_CONFIDENCE = 0.3
_FOREGROUND_THRESHOLD = _MASK_THRESHOLD = 0.5

_DEPTH_SHAPE, _NORMAL_SHAPE, _FOREGROUND_SHAPE = (1, SIZE, SIZE), (1, 3, SIZE, SIZE), (1, 1, SIZE, SIZE)


@dataclass(frozen=True)
class _Frame:
    """The position of a frame in the middle of a square, in pixels."""

    height: int
    width: int

    @property
    def side(self) -> int:
        return max(self.height, self.width)

    @property
    def top(self) -> int:
        return (self.side - self.height) // 2

    @property
    def left(self) -> int:
        return (self.side - self.width) // 2


class David:
    """Finds mask, depth and normals of people by DAViD's networks; none of them sees the background.

    Frames are processed one by one: the authors did not train for stability over time. Depth then gets one scale and
    shift for the clip (`depth_windows.steady_person`).
    """

    sees_background = False
    uses: Mapping[str, tuple[str, ...]] = {"mask": ("poses",), "normal": (), "depth": ("mask",)}

    def __init__(
        self,
        folder: Path | str,
        *,
        files: tuple[NetworkFile, ...] | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
        near_is_large: bool | None = None,
    ) -> None:
        """Checks the files; each is opened when it is first used.

        Args:
            folder: the folder that holds the files.
            files: one file for all tasks, or three: depth, normals, foreground. None: `MULTI_TASK` if the folder has
                it, or `SEPARATE` if it has one of these, instead.
            device: `cpu`, `cuda` or `cuda:<number>`.
            num_threads: threads of the arithmetic on a CPU; None lets onnxruntime choose.
            near_is_large: whether the network's depth is larger where it is nearer; None: false with one file for all
                tasks, true with three, as in the authors' demo.

        Raises:
            MissingInputError: a file is missing or damaged.
        """
        files = _choose_files(Path(folder)) if files is None else files
        if len(files) not in (1, 3):
            raise ValueError(
                f"DAViD has one file for all tasks or three (depth, normals, foreground), not {len(files)}"
            )
        found = [find_network_file(folder, file) for file in files]
        self._paths = [path for path, _ in found]
        self.networks = tuple(file for _, file in found)
        self._options: dict[str, Any] = {"size": (SIZE, SIZE), "device": device, "num_threads": num_threads}
        self._near_is_large = len(files) == 3 if near_is_large is None else near_is_large
        self._opened: dict[int, OnnxNetwork] = {}
        # The maps of the last clip that the network for all tasks found and nobody has taken, and the clip's digest.
        self._left: dict[str, NDArray[np.float32]] = {}
        self._digest = b""

    def annotate_mask(self, rgb: NDArray[np.uint8], poses: PersonPoses) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to `(f, H, W)` in [0,1].

        Of the foreground, the connected parts count in which a visible key point lies: others are other people.
        """
        foreground = self._annotate(rgb, "foreground")
        return np.stack(
            [_keep_person(frame, points) for frame, points in zip(foreground, poses.keypoints, strict=True)]
        )

    def annotate_depth(self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]) -> Depths:
        """Maps frames `(f, H, W, 3)` to disparity of one scale and shift; it has a meaning inside the mask only."""
        depth = self._annotate(rgb, "depth")
        disparity = steady_person(depth if self._near_is_large else -depth, mask > _MASK_THRESHOLD)
        return Depths(disparity, "disparity")

    def annotate_normal(
        self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to unit normals of the same shape; they have a meaning inside the mask only."""
        return self._annotate(rgb, "normal")

    def _annotate(self, rgb: NDArray[np.uint8], task: str) -> NDArray[np.float32]:
        if len(self._paths) == 3:
            return self._run(rgb, (task,))[task]
        digest = hashlib.blake2b(np.ascontiguousarray(rgb).data).digest() + str(rgb.shape).encode()
        if digest != self._digest or task not in self._left:
            self._left, self._digest = self._run(rgb, ("depth", "normal", "foreground")), digest
        return self._left.pop(task)

    def _run(self, rgb: NDArray[np.uint8], tasks: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
        shapes = {"depth": _DEPTH_SHAPE, "normal": _NORMAL_SHAPE, "foreground": _FOREGROUND_SHAPE}
        network = self._open(0 if len(tasks) == 3 else list(shapes).index(tasks[0]), outputs=len(tasks))
        place = _Frame(*rgb.shape[1:3])
        maps: dict[str, NDArray[np.float32]] = {
            task: np.empty((*rgb.shape[:3], 3) if task == "normal" else rgb.shape[:3], np.float32) for task in tasks
        }
        for index, frame in enumerate(rgb):
            beat()
            results = network.run(_to_square(frame, place), shapes=tuple(shapes[task] for task in tasks))
            for task, result in zip(tasks, results, strict=True):
                maps[task][index] = _to_frame(result, place)
        if "normal" in maps:
            maps["normal"] /= np.maximum(np.linalg.norm(maps["normal"], axis=-1, keepdims=True), 1e-6)
        if "foreground" in maps:
            maps["foreground"] = maps["foreground"].clip(0.0, 1.0)
        return maps

    def _open(self, index: int, *, outputs: int) -> OnnxNetwork:
        if index not in self._opened:
            self._opened[index] = OnnxNetwork(self._paths[index], outputs=outputs, **self._options)
        return self._opened[index]


def _choose_files(folder: Path) -> tuple[NetworkFile, ...]:
    has_all = (folder / MULTI_TASK.file).is_file()
    return SEPARATE if not has_all and any((folder / file.file).is_file() for file in SEPARATE) else (MULTI_TASK,)


def _to_square(frame: NDArray[np.uint8], place: _Frame) -> NDArray[np.float32]:
    """The network's input `(512, 512, 3)`: as the authors' `prepare_image_for_model` makes it."""
    bottom, right = place.side - place.height - place.top, place.side - place.width - place.left
    picture = frame[..., ::-1].astype(np.float32) / 255
    square = cv2.copyMakeBorder(picture, place.top, bottom, place.left, right, cv2.BORDER_REPLICATE)
    while min(square.shape[:2]) > SIZE * 3:
        square = cv2.pyrDown(square)
    return np.asarray(cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR))


def _to_frame(result: NDArray[np.float32], place: _Frame) -> NDArray[np.float32]:
    """The part of a result `(1, [channels,] 512, 512)` that shows the frame, `(H, W[, 3])`."""
    channels = result[0].transpose(1, 2, 0) if result.ndim == 4 else result[0]
    square = cv2.resize(channels, (place.side, place.side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(square)[place.top : place.top + place.height, place.left : place.left + place.width]


def _keep_person(foreground: NDArray[np.float32], points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Removes the connected parts of a foreground `(H, W)` in which no visible key point `(128, 3)` lies."""
    height, width = foreground.shape
    _, labels = cv2.connectedComponents((foreground > _FOREGROUND_THRESHOLD).astype(np.uint8))
    seen = points[points[:, 2] >= _MIN_CONFIDENCE]
    columns = (seen[:, 0] * width).astype(int).clip(0, width - 1)
    rows = (seen[:, 1] * height).astype(int).clip(0, height - 1)
    persons = np.setdiff1d(labels[rows, columns], [0])
    others = ~np.isin(labels, [0, *persons])
    # the soft edge of another part goes with it
    edge = cv2.dilate(others.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    kept = np.isin(labels, persons)
    removed = others | (edge & ~kept)
    return np.where(removed | (not len(persons)), np.float32(0), foreground)
