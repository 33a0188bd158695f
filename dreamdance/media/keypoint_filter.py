"""Key points over time: short gaps are filled, jitter is measured and smoothed.

The filter is the one-euro filter (Casiez, Roussel, Vogel, CHI 2012): a low-pass whose cutoff rises with the speed of
the point, so that a resting point becomes still and a fast one keeps its path. Clips are complete when they are
filtered, so it runs forwards and backwards, and the mean of the two passes has no lag. Measured at 30 frames per second
on 8 rendered dancers with noise of .01 of the torso: one pass lags by .33 frames and leaves 1.18 times the error of the
noise; the mean of both leaves .73 times, and waves lag by less than .02 frames; a backward pass over the result of the
forward one leaves .71 times, but cuts a wave of 2.5 hertz by 4.7 % in place of 2.8 %.

Lengths are in torsos (from the neck to the middle of the hips), so the size of a person in the frame means nothing.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD, KeypointSequence

_Array = NDArray[np.float64]

# Longer gaps stay: after a fifth of a second nobody knows where a hand was.
MAX_GAP_FRAMES = 5
# Confidence of a filled point, as a part of the lower one at the two ends of the gap.
FILLED_CONFIDENCE = 0.5

# Cutoff at rest, in hertz, and its rise per torso per second. At 30 frames per second a wave of 2.5 hertz keeps 97 % of
# its amplitude if that is half a torso, and 82 % if it is .05. A cutoff of 1 hertz would leave less jitter but cuts
# small fast motions to half.
_RESTING_CUTOFF_HERTZ = 4.0
_CUTOFF_PER_SPEED = 8.0
# Cutoff of the speed itself, in hertz: the value of the filter's authors.
_SPEED_CUTOFF_HERTZ = 1.0

# Shoulders are about this part of a torso wide; they measure people whose hips are not visible.
_SHOULDERS_PER_TORSO = 0.7
_NECK, _HIPS, _SHOULDERS = 1, [8, 11], [2, 5]

_DIFFERENCE_ORDER = 4
# Standard deviation of the fourth difference of independent noise of deviation 1: the root of 1 + 16 + 36 + 16 + 1.
_DIFFERENCE_GAIN = 70.0**0.5


def filter_keypoints(sequence: KeypointSequence) -> NDArray[np.float32]:
    """Fills short gaps and smooths the path of each point by itself; left and right never mix.

    Args:
        sequence: one person's key points `(f, 128, 3)` with frame size and rate.

    Returns:
        `(f, 128, 3)`. Points below `CONFIDENCE_THRESHOLD` keep their values, unless they belong to a gap of up to
        `MAX_GAP_FRAMES`.
    """
    filled = fill_gaps(sequence.keypoints)
    present = filled[..., 2] >= CONFIDENCE_THRESHOLD
    unit = torso_length(sequence) / np.array([sequence.width, sequence.height])
    paths = filled[..., :2] / unit
    forwards = _one_euro(paths, present, sequence.fps)
    backwards = _one_euro(paths[::-1], present[::-1], sequence.fps)[::-1]
    result = filled.copy()
    result[..., :2] = np.where(present[..., None], 0.5 * (forwards + backwards) * unit, filled[..., :2])
    return result


def fill_gaps(keypoints: NDArray[np.float32]) -> NDArray[np.float32]:
    """Interpolates points that are missing in up to `MAX_GAP_FRAMES` frames between two that have them.

    A point is missing if its confidence is below `CONFIDENCE_THRESHOLD`, below which it is not drawn either.

    Args:
        keypoints: `(f, 128, 3)`.

    Returns:
        `(f, 128, 3)`; a filled point has `FILLED_CONFIDENCE` times the lower confidence of the two ends, and
        `CONFIDENCE_THRESHOLD` at least.
    """
    result = keypoints.copy()
    present = keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    for point in np.flatnonzero((~present).any(axis=0) & present.any(axis=0)):
        known = np.flatnonzero(present[:, point])
        for before, after in pairwise(known):
            if 1 < after - before <= MAX_GAP_FRAMES + 1:
                share = np.linspace(0.0, 1.0, after - before + 1)[1:-1, None]
                first, last = keypoints[before, point], keypoints[after, point]
                result[before + 1 : after, point, :2] = (1 - share) * first[:2] + share * last[:2]
                confidence = FILLED_CONFIDENCE * min(first[2], last[2])
                result[before + 1 : after, point, 2] = max(confidence, CONFIDENCE_THRESHOLD)
    return result


def measure_jitter(sequence: KeypointSequence) -> float:
    """How much the joints of the body tremble, in lengths of the torso; NaN if five frames in a row show no joint.

    The value is the standard deviation of independent noise (of x, and of y) that would give the same mean square of
    the fourth difference over time; so single frames in which a joint jumps count, which a median would hide. A fourth
    difference hardly sees motion that takes several frames: clean dancers at 30 frames per second have about .0005. At
    8 frames per second dances themselves count as jitter; so compare only values at similar rates.
    """
    seen = sequence.keypoints[:, BODY, 2] >= CONFIDENCE_THRESHOLD
    if len(seen) <= _DIFFERENCE_ORDER:
        return float("nan")
    places = sequence.keypoints[:, BODY, :2].astype(np.float64) * [sequence.width, sequence.height]
    differences = np.diff(places, n=_DIFFERENCE_ORDER, axis=0)
    usable = np.stack([seen[start : len(seen) - _DIFFERENCE_ORDER + start] for start in range(_DIFFERENCE_ORDER + 1)])
    chosen = differences[usable.all(axis=0)]
    if chosen.size == 0:
        return float("nan")
    return float(np.sqrt(np.square(chosen).mean()) / (_DIFFERENCE_GAIN * torso_length(sequence)))


def _one_euro(paths: _Array, present: NDArray[np.bool_], fps: float) -> _Array:
    """One pass over paths `(f, n, 2)`; a point starts again after frames in which it is missing."""
    result = paths.copy()
    speed = np.zeros(paths.shape[1:])
    for frame in range(1, len(paths)):
        goes_on = (present[frame] & present[frame - 1])[:, None]
        step = _smoothing(_SPEED_CUTOFF_HERTZ, fps)
        velocity = (paths[frame] - result[frame - 1]) * fps
        speed = np.where(goes_on, step * velocity + (1 - step) * speed, 0.0)
        cutoff = _RESTING_CUTOFF_HERTZ + _CUTOFF_PER_SPEED * np.linalg.norm(speed, axis=-1, keepdims=True)
        part = _smoothing(cutoff, fps)
        smoothed = part * paths[frame] + (1 - part) * result[frame - 1]
        result[frame] = np.where(goes_on, smoothed, paths[frame])
    return result


def _smoothing(cutoff_hertz: float | _Array, fps: float) -> _Array:
    """The part of a new value in the filtered one."""
    return np.asarray(1.0 / (1.0 + fps / (2 * np.pi * cutoff_hertz)))


def torso_length(sequence: KeypointSequence) -> float:
    """The median length of the torso in pixels; from the shoulders, or from all joints, where hips are not visible."""
    seen = sequence.keypoints[:, BODY, 2] >= CONFIDENCE_THRESHOLD
    points = sequence.keypoints[:, BODY, :2].astype(np.float64) * [sequence.width, sequence.height]
    torsos = np.linalg.norm(points[:, _NECK] - points[:, _HIPS].mean(axis=1), axis=-1)[seen[:, [_NECK, *_HIPS]].all(1)]
    widths = np.linalg.norm(points[:, 2] - points[:, 5], axis=-1)[seen[:, _SHOULDERS].all(axis=1)]
    found = float(np.median(torsos)) if len(torsos) else 0.0
    if found < 1.0 and len(widths):  # the widest shoulders face the camera
        found = float(np.quantile(widths, 0.9)) / _SHOULDERS_PER_TORSO
    if found < 1.0:
        found = 0.25 * max(sequence.width, sequence.height)
    return max(found, 1.0)
