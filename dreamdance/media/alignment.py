"""Rescales a driving skeleton to the body of the reference, so that a tall dancer can drive a small dancer."""

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import UserError
from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD, KeypointSequence

# Trunk, hips, knees, ankles, shoulders, eyes and ears. Elbows and wrists move too much to measure a body.
MEASURED_JOINTS = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
MIN_JOINTS = 4
SCALE_RANGE = (0.2, 5.0)


class AlignmentError(UserError):
    """A driving skeleton cannot be fitted to the body of the reference."""


def align_keypoints(driving: KeypointSequence, reference: KeypointSequence) -> NDArray[np.float32]:
    """Scales and shifts a whole driving sequence by one transform that fits its body to the body of the reference.

    The transform is one scale in pixels for both directions, and a shift. Each frame is compared with the reference
    over the measured joints that are visible in both; frames with fewer than four of these are left out. The scale is
    the least-squares fit of the heights of these joints, centred in each frame. So neither a dancer who walks through
    the picture nor legs that are visible in only some frames change the scale. One transform for all frames preserves
    the motion and adds no jitter.

    Args:
        driving: the driving sequence; `keypoints` `(f, 128, 3)`.
        reference: the key points of the reference picture; only the first frame is used.

    Returns:
        `(f, 128, 3)` in [0,1] of the reference's frame; points outside the frame keep their confidence.

    Raises:
        AlignmentError: no frame shows enough joints of the reference, or the scale is outside `SCALE_RANGE`.
    """
    body, target = driving.keypoints[:, BODY], reference.keypoints[0, BODY]
    shared = np.zeros(body.shape[:2], dtype=bool)
    measured = list(MEASURED_JOINTS)
    shared[:, measured] = (body[:, measured, 2] >= CONFIDENCE_THRESHOLD) & (target[measured, 2] >= CONFIDENCE_THRESHOLD)
    counts = shared.sum(axis=1)
    if counts.max(initial=0) < MIN_JOINTS:
        raise AlignmentError(
            f"align: no frame of the driving sequence shows more than {counts.max(initial=0)} of the body joints that "
            f"the reference shows, {MIN_JOINTS} are needed; remove 'align' from the entry"
        )
    source_size = np.array([driving.width, driving.height], dtype=np.float64)
    target_size = np.array([reference.width, reference.height], dtype=np.float64)
    used = counts >= MIN_JOINTS
    weights = (shared[used] / counts[used, None])[..., None]
    points = body[used, :, :2] * source_size
    wanted = np.broadcast_to(target[:, :2] * target_size, points.shape)
    means, wanted_means = ((weights * places).sum(axis=1) for places in (points, wanted))
    heights, wanted_heights = (
        (places - centres[:, None])[shared[used], 1] for places, centres in ((points, means), (wanted, wanted_means))
    )
    scale = _fit_scale(heights, wanted_heights)
    shift = (wanted_means - scale * means).mean(axis=0)
    aligned = driving.keypoints.astype(np.float64)
    aligned[..., :2] = (aligned[..., :2] * source_size * scale + shift) / target_size
    return aligned.astype(np.float32)


def _fit_scale(heights: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """The least-squares factor from `heights` to `wanted`, both centred in each frame."""
    variance = float((heights**2).sum())
    scale = float((heights * wanted).sum()) / variance if variance > 0 else 0.0
    low, high = SCALE_RANGE
    if not low <= scale <= high:
        raise AlignmentError(
            f"align: the driving skeleton would have to be scaled by {scale:.3g}, which is not between {low} and "
            f"{high}; one of the two skeletons may be upside down or incomplete. Remove 'align' from the entry"
        )
    return scale
