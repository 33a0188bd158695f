"""Rescales a driving skeleton to the body of the reference, so that a tall dancer can drive a small one."""

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.keypoints import BODY, KeypointSequence
from dreamdance.data.pose_drawing import CONFIDENCE_THRESHOLD
from dreamdance.errors import UserError

# trunk, hips, knees, ankles, shoulders, eyes and ears; elbows and wrists swing too far to measure a body by
MEASURED_JOINTS = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)
MIN_JOINTS = 4
SCALE_RANGE = (0.2, 5.0)


class AlignmentError(UserError):
    """A driving skeleton cannot be fitted to the reference's body."""


def align_keypoints(driving: KeypointSequence, reference: KeypointSequence) -> NDArray[np.float32]:
    """Scales and shifts a whole driving sequence by one transform which fits its body to the reference's.

    One scale in pixels for both directions, and a shift: the least-squares fit of the height of each measured joint,
    averaged over the sequence, to the reference's. Joints are averaged first: movement would shrink a fit to all
    frames. What moves stays as it is, and one transform for all frames adds no jitter.

    Args:
        driving: the sequence; `keypoints` `(f, 128, 3)`.
        reference: of the reference image; its first frame is read.

    Returns:
        `(f, 128, 3)` in [0,1] of the reference's frame; points beyond it keep their confidence.

    Raises:
        AlignmentError: too few joints are visible in both, or no sensible scale fits.
    """
    body, target = driving.keypoints[:, BODY], reference.keypoints[0, BODY]
    visible = body[..., 2] >= CONFIDENCE_THRESHOLD
    common = [j for j in MEASURED_JOINTS if visible[:, j].any() and target[j, 2] >= CONFIDENCE_THRESHOLD]
    if len(common) < MIN_JOINTS:
        raise AlignmentError(
            f"align: only {len(common)} body joints are visible in both the driving sequence and the reference, "
            f"{MIN_JOINTS} are needed; leave 'align' out"
        )
    source_size = np.array([driving.width, driving.height], dtype=np.float64)
    target_size = np.array([reference.width, reference.height], dtype=np.float64)
    means = np.stack([body[visible[:, j], j, :2].mean(axis=0) for j in common]) * source_size
    wanted = target[common, :2].astype(np.float64) * target_size
    scale = _fit_scale(means[:, 1], wanted[:, 1])
    shift = wanted.mean(axis=0) - scale * means.mean(axis=0)
    aligned = driving.keypoints.astype(np.float64)
    aligned[..., :2] = (aligned[..., :2] * source_size * scale + shift) / target_size
    return aligned.astype(np.float32)


def _fit_scale(source: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    centred = source - source.mean()
    variance = float((centred**2).sum())
    scale = float((centred * wanted).sum()) / variance if variance > 0 else 0.0
    low, high = SCALE_RANGE
    if not low <= scale <= high:
        raise AlignmentError(
            f"align: the driving skeleton would have to be scaled by {scale:.3g}, which is not between {low} and "
            f"{high}; is one of the two upside down, or not a whole body? Leave 'align' out"
        )
    return scale
