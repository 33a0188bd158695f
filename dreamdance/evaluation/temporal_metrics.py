"""What goes wrong over time: flicker of what should stand still, drift of colour, jumps where windows meet.

Values are in grey levels of 0..255. No network, and no optical flow.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dreamdance.evaluation.image_metrics import FloatArray, MaskArray, mean_colour
from dreamdance.media.surfaces import erode

GREY_LEVELS = 255.0
# A pixel of the truth stands still if no channel changes by more than this from one frame to the next.
STILL_LEVELS = 2.0
# With fewer pixels that stand still (as a share of all), there is no flicker.
MIN_STILL_SHARE = 0.01
# The drift is that of this share of the frames, at the end.
LAST_SHARE = 0.1


def flicker(
    frames: FloatArray, truth: FloatArray, mask: MaskArray | None = None, *, runs: Sequence[Sequence[int]]
) -> float:
    """Mean absolute change, from frame to frame, of pixels that stand still in the truth and lie outside of the body.

    Args:
        frames, truth: `f H W c` in [0, 1].
        mask: `f H W`, the true body; None counts all pixels that stand still.
        runs: frames that follow one another without a gap.

    Returns:
        Grey levels; NaN if (almost) nothing stands still.
    """
    total, count, pixels = 0.0, 0, 0
    for run in runs:
        for before, after in pairwise(run):
            is_still = _change(truth, before, after).max(axis=-1) <= STILL_LEVELS
            if mask is not None:
                is_still &= erode(~mask[[before, after]]).all(axis=0)
            total += float(_change(frames, before, after)[is_still].sum())
            count += int(is_still.sum())
            pixels += is_still.size
    return total / (count * frames.shape[-1]) if count > MIN_STILL_SHARE * pixels else float("nan")


def colour_drift_curve(frames: FloatArray) -> NDArray[np.float64]:
    """How far the mean colour of each frame is from that of frame 0: `f`, the mean over channels, in grey levels."""
    means = np.stack([mean_colour(frame[None]) for frame in frames]) * GREY_LEVELS
    curve: NDArray[np.float64] = np.abs(means - means[0]).mean(axis=-1)
    return curve


def colour_drift(frames: FloatArray) -> float:
    """The mean of `colour_drift_curve` over the last tenth of the frames; compare it with the truth's own."""
    curve = colour_drift_curve(frames)
    return float(curve[-max(1, round(LAST_SHARE * len(curve))) :].mean())


def seam_ratio(frames: FloatArray, truth: FloatArray, *, runs: Sequence[Sequence[int]], seams: Sequence[int]) -> float:
    """Change from frame to frame where a window of the sampling begins, relative to the change elsewhere.

    Each change is divided by that of the truth, so that a jump of the dancer does not count.

    Args:
        frames, truth: `f H W c` in [0, 1].
        runs: frames that follow one another without a gap.
        seams: frames with which a window begins, except the first.

    Returns:
        1 if windows do not show; NaN without a seam, or with nothing beside seams.
    """
    found: dict[bool, list[float]] = {True: [], False: []}
    for run in runs:
        for before, after in pairwise(run):
            # a quarter of a grey level: what stands still would divide by zero
            changes = [max(float(_change(part, before, after).mean()), 0.25) for part in (frames, truth)]
            found[after in seams].append(changes[0] / changes[1])
    if not found[True] or not found[False]:
        return float("nan")
    return float(np.mean(found[True]) / np.mean(found[False]))


def _change(frames: FloatArray, before: int, after: int) -> NDArray[np.float64]:
    difference: NDArray[np.float64] = np.abs(np.asarray(frames[after], np.float64) - frames[before]) * GREY_LEVELS
    return difference
