"""Finds the shots of a video: the parts between cuts and dissolves. A clip must not reach over the end of a shot."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.transnetv2 import FRAME_HEIGHT, FRAME_WIDTH, ShotNetwork
from dreamdance.annotators.weights import NetworkFile

# A shot ends where the probability of a cut is higher. cosmos-curate takes this value for TransNetV2 (0.5 is the
# authors'); with the histograms 0.4 lies between the changes within shots (up to 0.29 in three real dance videos and 30
# rendered ones) and those at cuts between them (99 % above 0.61).
DEFAULT_THRESHOLD = 0.4
# Removed from a shot at its ends, except at the ends of the video: half of a dissolve of one second.
DEFAULT_MARGIN_SECONDS = 0.5

# Histograms. Bins: 3 bits of each channel. Reach: a flash of up to two frames is no cut, because frames up to three
# apart are compared across it. Half-span: dissolves of up to about 20 frames are found (measured: all of 4, 8, 12, 16
# and 20 frames, between 9 pairs of real and 28 of rendered videos).
_BITS = 3
_REACH = 3
_HALF_SPAN = 8
# How far the middle of a dissolve may lie from the mean of both sides, as a share of their distance: up to the first
# value the change counts fully, beyond the second (that of fast motion) not at all.
_FULL_BLEND, _NO_BLEND = 0.35, 0.5


@dataclass(frozen=True)
class Shot:
    """Frames `first` to `end` - 1 of a video, without its margins."""

    first: int
    end: int

    @property
    def num_frames(self) -> int:
        return self.end - self.first


class CutDetector(Protocol):
    """Gives the probability that a shot ends with each frame of a video, from its small frames."""

    @property
    def networks(self) -> tuple[NetworkFile, ...]:
        """The files of weights that the result depends on."""

    def cut_probabilities(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps all frames of a video, `(f, 27, 48, 3)` uint8, to `(f,)` float32 in [0,1]."""


def open_cut_detector(name: str, *, weights: str | None = None, device: str = "cpu") -> CutDetector:
    """Opens a detector by the name in a recipe.

    Args:
        name: `histogram`, or `transnetv2` with its weights.
        weights: the folder of weights; only for `transnetv2`.
        device: where the network runs.

    Raises:
        ValueError: another name, or `transnetv2` without a folder.
        MissingInputError: the weights are missing or damaged.
    """
    if name == "histogram":
        return HistogramDetector()
    if name != "transnetv2":
        raise ValueError(f"the detector of shots is '{name}'; histogram and transnetv2 are accepted")
    if weights is None:
        raise ValueError("the detector of shots transnetv2 needs the folder of its weights; histogram needs none")
    return ShotNetwork(weights, device=device)


def shrink_frames(frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Reduces the frames of a video, `(H, W, 3)` uint8 each, to what detectors see: `(f, 27, 48, 3)` uint8.

    The aspect is not kept, as in TransNetV2's training.
    """
    size = (FRAME_WIDTH, FRAME_HEIGHT)
    small = [np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), dtype=np.uint8) for frame in frames]
    return np.stack(small) if small else np.zeros((0, FRAME_HEIGHT, FRAME_WIDTH, 3), np.uint8)


def find_shots(
    probabilities: NDArray[np.floating[Any]],
    *,
    fps: float,
    threshold: float = DEFAULT_THRESHOLD,
    margin_seconds: float = DEFAULT_MARGIN_SECONDS,
) -> list[Shot]:
    """Divides a video into shots.

    Args:
        probabilities: `(f,)` in [0,1], from a `CutDetector`. A run of values above the threshold is one transition: the
            shot before it ends with its first frame, the next shot begins after its last one.
        fps: frames per second of the video.
        threshold: in [0,1].
        margin_seconds: removed on both sides of a transition.

    Returns:
        The shots in order; those of which the margins leave nothing are left out.

    Raises:
        ValueError: a value is out of its range.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"the threshold of shots is {threshold:g}; 0 to 1 are accepted")
    if not (margin_seconds >= 0.0 and fps > 0.0):
        raise ValueError(f"a margin of {margin_seconds:g} s at {fps:g} frames per second: 0 s or more, above 0 fps")
    margin, num_frames = round(margin_seconds * fps), len(probabilities)
    is_cut = np.asarray(probabilities)[:-1] > threshold  # after the last frame nothing follows
    edges = np.flatnonzero(np.diff(is_cut.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    ends = [int(first) + 1 for first, _ in edges] + [num_frames]
    starts = [0] + [int(after) for _, after in edges]
    shots = [
        Shot(start + (margin if start else 0), end - (margin if end < num_frames else 0))
        for start, end in zip(starts, ends, strict=True)
    ]
    return [shot for shot in shots if shot.num_frames > 0]


class HistogramDetector:
    """Finds cuts and dissolves by histograms of colours, without a network.

    The value of a cut is the share of the picture's area that changes its colour, in the smallest of the comparisons
    across it. A dissolve also shows, in its middle, the mean of what lies before and after it. Fast motion of a dancer
    changes few colours, and does not pass through a mean; a cut between shots of equal colours is not found.
    """

    networks: tuple[NetworkFile, ...] = ()

    def cut_probabilities(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps all frames of a video, `(f, H, W, 3)` uint8, to `(f,)` float32 in [0,1]; see `CutDetector`."""
        num_frames = len(frames)
        colours = _colour_shares(frames)
        values = np.zeros(num_frames, np.float32)
        for frame in range(num_frames - 1):
            beat()
            before = colours[max(0, frame + 1 - _REACH) : frame + 1]
            after = colours[frame + 1 : frame + 1 + _REACH]
            values[frame] = 0.5 * np.abs(before[:, None] - after[None]).sum(axis=2).min()
        for frame in range(_HALF_SPAN, num_frames - _HALF_SPAN - 1):
            beat()
            change = 0.5 * float(np.abs(colours[frame - _HALF_SPAN] - colours[frame + 1 + _HALF_SPAN]).sum())
            if change > values[frame]:
                values[frame] = max(values[frame], change * _blend_share(frames, frame))
        return values


def _colour_shares(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Histograms of frames `(f, H, W, 3)` over 512 colours: `(f, 512)` float32, each of sum 1."""
    shares = np.empty((len(frames), 1 << 3 * _BITS), np.float32)
    for row, frame in enumerate(frames):  # one at a time: a video of an hour has 100,000
        beat()
        red, green, blue = np.moveaxis(frame.astype(np.int64) >> (8 - _BITS), -1, 0)
        bins = (red << 2 * _BITS) + (green << _BITS) + blue
        shares[row] = np.bincount(bins.ravel(), minlength=shares.shape[1])
        shares[row] /= max(bins.size, 1)
    return shares


def _blend_share(frames: NDArray[np.uint8], frame: int) -> float:
    """How well the middle of a possible dissolve equals the mean of both sides: 0 (not) to 1."""
    before, after = (frames[number].astype(np.float32) for number in (frame - _HALF_SPAN, frame + 1 + _HALF_SPAN))
    middle = frames[frame : frame + 2].mean(axis=0, dtype=np.float32)
    distance = float(np.abs(before - after).mean())
    if distance == 0.0:
        return 0.0
    rest = float(np.abs(middle - 0.5 * (before + after)).mean()) / distance
    return min(1.0, max(0.0, (_NO_BLEND - rest) / (_NO_BLEND - _FULL_BLEND)))
