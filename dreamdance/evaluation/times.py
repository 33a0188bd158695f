"""Pairs the frames of a result with the frames of its true clip that show the same moment; only these are compared."""

import logging
from collections.abc import Sequence
from itertools import pairwise

from dreamdance.evaluation.clips import Result, ResultError

logger = logging.getLogger(__name__)

# Two frame rates count as equal (29.97 and 30) if, over all common frames, they differ by less than this many frames.
SAME_RATE_FRAMES = 0.5
# Two frames show the same moment if their times differ by at most this fraction of a frame of the clip.
TOLERANCE_FRAMES = 0.1


def find_runs(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Places in `pairs` of frames that follow one another; the reference frame, which is left out, makes a gap.

    Args:
        pairs: as `pair_frames` returns them, some left out.
    """
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(pairs)]
    usual = min(steps, default=(1, 1))
    runs: list[list[int]] = [[0]] if pairs else []
    for place, step in enumerate(steps, start=1):
        if step != usual:
            runs.append([])
        runs[-1].append(place)
    return runs


def pair_frames(result: Result, *, num_frames: int, fps: float) -> list[tuple[int, int]]:
    """Pairs frames by their times; both sequences begin at the same moment.

    Args:
        result: the result, with its own number of frames and frame rate.
        num_frames: number of frames of the true clip.
        fps: frame rate of the true clip.

    Returns:
        (frame of the result, frame of the clip) for all times that agree within `TOLERANCE_FRAMES`.

    Raises:
        ResultError: the result has as many frames as the clip, but at another rate, so that either may be wrong.
    """
    ratio = fps / result.fps
    if abs(ratio - 1) * min(result.num_frames, num_frames) < SAME_RATE_FRAMES:
        ratio = 1.0
    elif result.num_frames == num_frames:
        raise ResultError(
            f"result '{result.id}' plays the {num_frames} frames of its clip at {result.fps:g} frames per second, not "
            f"at the clip's {fps:g}: frames with equal numbers show different moments. Remove 'fps' from the "
            f"manifest's entry, or set it to {fps:g}, and run animate again"
        )
    times = ((frame, frame * ratio) for frame in range(result.num_frames))
    pairs = [(frame, round(time)) for frame, time in times if abs(time - round(time)) <= TOLERANCE_FRAMES]
    pairs = [(frame, true_frame) for frame, true_frame in pairs if true_frame < num_frames]
    if not result.num_frames == num_frames == len(pairs):
        logger.warning(
            "result '%s' has %d frames at %g per second, its clip has %d at %g: %d frames show the same moments",
            *(result.id, result.num_frames, result.fps, num_frames, fps, len(pairs)),
        )
    return pairs
