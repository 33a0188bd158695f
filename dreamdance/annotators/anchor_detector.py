"""Detectors of MediaPipe (people, palms, faces): boxes and points relative to a fixed grid of anchors.

Source: the decoding of MediaPipe's `TensorsToDetectionsCalculator` and the weighted suppression of its
`NonMaxSuppressionCalculator`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.boxes import overlaps
from dreamdance.annotators.picture_regions import Region, to_picture
from dreamdance.annotators.tflite_network import TfliteNetwork, sigmoid

_ANCHORS_PER_LAYER = 2
# Detections that overlap more are one thing (MediaPipe's value).
_SUPPRESSION_OVERLAP = 0.3


@dataclass(frozen=True)
class Detection:
    """Something found in a picture; lengths in pixels of the picture.

    Attributes:
        score: in [0,1].
        centre: `(2,)`, of the box.
        side: the longer side of the box.
        points: `(n, 2)`, the detector's points.
    """

    score: float
    centre: NDArray[np.float64]
    side: float
    points: NDArray[np.float64]


class AnchorDetector:
    """A network that finds boxes and points in a square picture."""

    def __init__(self, network: TfliteNetwork, *, strides: Sequence[int], lowest: float) -> None:
        """Makes a detector.

        Args:
            network: the network; its outputs are boxes with points, and scores before the logistic function.
            strides: the stride in pixels of each layer of anchors.
            lowest: see `TfliteNetwork.run`.
        """
        self._network = network
        self._anchors = place_anchors(strides, network.size)
        self._lowest = lowest

    def detect(self, picture: NDArray[np.uint8], region: Region, *, threshold: float) -> list[Detection]:
        """Finds everything whose score is at least `threshold` in a region of a picture, best first."""
        values, logits = self._network.run(picture, region, lowest=self._lowest)
        scores = sigmoid(logits[:, 0])
        found = np.flatnonzero(scores >= threshold)
        found = found[np.argsort(-scores[found], kind="stable")]
        size = self._network.size
        pairs = values[found].reshape(len(found), values.shape[1] // 2, 2).astype(np.float64)
        # The second pair is width and height, all others are places.
        pairs[:, [0, *range(2, pairs.shape[1])]] += self._anchors[found, None] * size
        scale = region[2] / size
        return [
            Detection(score, to_picture(merged[0], region, size=size), float(merged[1].max() * scale),
                      to_picture(merged[2:], region, size=size))
            for score, merged in merge_overlapping(pairs, scores[found])
        ]  # fmt: skip


def place_anchors(strides: Sequence[int], size: int) -> NDArray[np.float64]:
    """The centres `(n, 2)` of the anchors, in [0,1] of the square: layers of equal stride share their cells."""
    centres = []
    for stride in dict.fromkeys(strides):
        cells = -(-size // stride)
        line = (np.arange(cells) + 0.5) / cells
        grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
        centres.append(np.repeat(grid, _ANCHORS_PER_LAYER * list(strides).count(stride), axis=0))
    return np.concatenate(centres)


def merge_overlapping(
    pairs: NDArray[np.float64], scores: NDArray[np.float64]
) -> list[tuple[float, NDArray[np.float64]]]:
    """Merges overlapping detections into their mean, weighted by the scores.

    Args:
        pairs: `(n, 2 + points, 2)`: centre, width and height, points; in the order of falling scores.
        scores: `(n,)`.

    Returns:
        The best score of each group with its mean, best first.
    """
    boxes = np.concatenate([pairs[:, 0] - pairs[:, 1] / 2, pairs[:, 0] + pairs[:, 1] / 2], axis=1)
    left = np.arange(len(pairs))
    merged = []
    while len(left):
        group = overlaps(boxes[left[0]], boxes[left]) > _SUPPRESSION_OVERLAP
        group[0] = True
        members = left[group]
        merged.append((float(scores[members[0]]), np.average(pairs[members], axis=0, weights=scores[members])))
        left = left[~group]
    return merged
