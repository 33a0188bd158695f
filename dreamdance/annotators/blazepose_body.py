"""The body network of BlazePose: 33 points in space, their visibility, and the person's mask, in one region."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.picture_regions import Region, paste_region, region_along, to_picture
from dreamdance.annotators.protocols import LANDMARK_NAMES, NUM_LANDMARKS
from dreamdance.annotators.tflite_network import TfliteNetwork, sigmoid

# The network's points behind the 33 landmarks: the middle of the body, and a point on the circle around the body.
_MIDDLE, _CIRCLE = 33, 34
_NUM_POINTS = 39
_HIPS = [LANDMARK_NAMES.index("left_hip"), LANDMARK_NAMES.index("right_hip")]
# The region is wider than the circle around the body (MediaPipe's value).
_MARGIN = 1.25
# The side of the window of the heat map, in cells, and the confidence below which a point is not refined (MediaPipe's).
_WINDOW, _REFINED_CONFIDENCE = 7, 0.5
# The mask's value beyond the region, before the logistic function.
_OUTSIDE = -20.0


@dataclass(frozen=True)
class BodyPass:
    """What the network found in one region. Lengths in pixels of the picture, y points down.

    Attributes:
        score: the probability that the region contains a person.
        points: `(33, 2)`.
        depths: `(33,)`, towards the camera, relative to the middle of the hips.
        visibility: `(33,)` in [0,1]: that a point is in the picture, times that nothing hides it.
        region: where the network would see this person best.
        mask_logits: `(256, 256)` in the region that the network saw.
        seen: the region that the network saw.
    """

    score: float
    points: NDArray[np.float64]
    depths: NDArray[np.float64]
    visibility: NDArray[np.float64]
    region: Region
    mask_logits: NDArray[np.float32]
    seen: Region

    def mask(self, *, width: int, height: int) -> NDArray[np.float32]:
        """The person's mask in the picture, `(height, width)` float32 in [0,1].

        Logits are interpolated, not probabilities: the edge is then as sharp as the network meant it.
        """
        logits = paste_region(self.mask_logits, self.seen, width=width, height=height, outside=_OUTSIDE)
        return sigmoid(logits).astype(np.float32)


class BodyNetwork:
    """The network `pose_landmark_full`."""

    def __init__(self, network: TfliteNetwork) -> None:
        self._network = network

    def run(self, picture: NDArray[np.uint8], region: Region) -> BodyPass:
        """Finds the body of the person in a region of a picture `(H, W, 3)`."""
        values, score, mask, heatmap, metres = self._network.run(picture, region, lowest=0.0)
        size = self._network.size
        rows = values.reshape(_NUM_POINTS, 5).astype(np.float64)
        places = rows[:, :2]
        places[:NUM_LANDMARKS] = refine_by_heatmap(places, heatmap, size=size)[:NUM_LANDMARKS]
        points = to_picture(places, region, size=size)
        visibility = sigmoid(rows[:, 3]) * sigmoid(rows[:, 4])
        return BodyPass(
            score=float(score[0]),
            points=points[:NUM_LANDMARKS],
            depths=find_depths(points[:NUM_LANDMARKS], metres.reshape(_NUM_POINTS, 3)[:NUM_LANDMARKS], region[3]),
            visibility=visibility[:NUM_LANDMARKS],
            region=region_around(points[_MIDDLE], points[_CIRCLE]),
            mask_logits=mask[..., 0],
            seen=region,
        )


def region_around(middle: NDArray[np.float64], circle: NDArray[np.float64]) -> Region:
    """The region of a body, from its middle (of the hips) and the point of the circle around it that is above it."""
    side = 2.0 * _MARGIN * float(np.hypot(*(circle - middle)))
    return float(middle[0]), float(middle[1]), side, region_along(middle, circle)


def find_depths(points: NDArray[np.float64], metres: NDArray[np.floating[Any]], rotation: float) -> NDArray[np.float64]:
    """Depths of the landmarks towards the camera, in pixels, relative to the middle of the hips.

    The network gives depths twice: in pixels of the region, and with points in metres. Here: those in metres, brought
    to the scale of the picture, because those in pixels are about four times too large (against the exact joints of 12
    rendered dancers: slope 0.26, of those in metres 0.95; `tools/measure_keypoints.py`).

    Args:
        points: `(33, 2)` in pixels of the picture.
        metres: `(33, 3)`: x right and y down in the region, z away from the camera.
        rotation: of the region, in radians.

    Returns:
        `(33,)`.
    """
    world = np.asarray(metres, dtype=np.float64)
    world = world - world[_HIPS].mean(axis=0)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    flat = world[:, :2] @ np.array([[cosine, sine], [-sine, cosine]])
    extent = float((flat**2).sum())
    scale = float((flat * (points - points[_HIPS].mean(axis=0))).sum()) / extent if extent > 0 else 0.0
    return np.asarray(-world[:, 2] * max(scale, 0.0), dtype=np.float64)


def refine_by_heatmap(places: NDArray[np.float64], heatmap: NDArray[np.float32], *, size: int) -> NDArray[np.float64]:
    """Moves each point to the mean of the heat map around it, as MediaPipe's `RefineLandmarksFromHeatmapCalculator`.

    Args:
        places: `(n, 2)` in pixels of a square of `size` pixels.
        heatmap: `(rows, columns, n)`, before the logistic function.
        size: the side of the square.

    Returns:
        `(n, 2)`; points without a clear maximum stay.
    """
    cells = heatmap.shape[0]
    refined = places.copy()
    for index, (column, row) in enumerate(np.floor(places * cells / size).astype(int)):
        if not (0 <= column < cells and 0 <= row < cells):
            continue
        half = _WINDOW // 2
        rows = np.arange(max(0, row - half), min(cells, row + half + 1))
        columns = np.arange(max(0, column - half), min(cells, column + half + 1))
        weights = sigmoid(heatmap[np.ix_(rows, columns)][..., index])
        if weights.max() >= _REFINED_CONFIDENCE:
            x, y = (weights.sum(axis=0) * columns).sum(), (weights.sum(axis=1) * rows).sum()
            refined[index] = np.array([x, y]) / weights.sum() * (size / cells)
    return refined
