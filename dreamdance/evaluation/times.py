"""Which frames of a result and of its true clip show the same moment: they are compared, and no others."""

import logging

from dreamdance.evaluation.clips import Result, ResultError

logger = logging.getLogger(__name__)

SAME_RATE_FRAMES = 0.5
"""Rates that drift apart by less, over all frames that both have, are one rate, written differently (29.97 and 30)."""
TOLERANCE_FRAMES = 0.1


def pair_frames(result: Result, *, num_frames: int, fps: float) -> list[tuple[int, int]]:
    """Pairs frames by their times; both sequences begin at the same moment.

    Args:
        result: with its own number of frames and rate.
        num_frames: of the true clip.
        fps: of the true clip.

    Returns:
        (frame of the result, frame of the clip), wherever the times agree within a tenth of the clip's frame.

    Raises:
        ResultError: the result has as many frames as the clip, but at another rate: which of both was meant?
    """
    ratio = fps / result.fps
    if abs(ratio - 1) * min(result.num_frames, num_frames) < SAME_RATE_FRAMES:
        ratio = 1.0
    elif result.num_frames == num_frames:
        raise ResultError(
            f"result '{result.id}' plays the {num_frames} frames of its clip at {result.fps:g} frames per second and "
            f"not at the clip's {fps:g}: no other frame is of the same moment. Leave 'fps' out of the manifest's "
            f"entry, or give {fps:g}, and run animate again"
        )
    times = ((frame, frame * ratio) for frame in range(result.num_frames))
    pairs = [(frame, round(time)) for frame, time in times if abs(time - round(time)) <= TOLERANCE_FRAMES]
    pairs = [(frame, true_frame) for frame, true_frame in pairs if true_frame < num_frames]
    if not result.num_frames == num_frames == len(pairs):
        logger.warning(
            "result '%s' has %d frames at %g per second, its clip %d at %g: compared at the %d times that both have",
            *(result.id, result.num_frames, result.fps, num_frames, fps, len(pairs)),
        )
    return pairs
