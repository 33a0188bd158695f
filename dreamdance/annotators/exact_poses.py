"""The exact poses of rendered dancers, in the form that pose annotators return.

They are the right answers by which annotators are measured and tested.
"""

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.protocols import LANDMARK_NAMES, PersonPoses
from dreamdance.dancers.render import DancerClip

# Which of the 128 key points each landmark is; `feet` of the clip has the others.
_LEFT_HAND, _RIGHT_HAND, _FACE = 18, 39, 60
_KEYPOINTS = {
    "nose": 0, "left_eye_inner": _FACE + 42, "left_eye": 15, "left_eye_outer": _FACE + 45,
    "right_eye_inner": _FACE + 39, "right_eye": 14, "right_eye_outer": _FACE + 36, "left_ear": 17, "right_ear": 16,
    "mouth_left": _FACE + 54, "mouth_right": _FACE + 48, "left_shoulder": 5, "right_shoulder": 2, "left_elbow": 6,
    "right_elbow": 3, "left_wrist": 7, "right_wrist": 4, "left_pinky": _LEFT_HAND + 17,
    "right_pinky": _RIGHT_HAND + 17, "left_index": _LEFT_HAND + 5, "right_index": _RIGHT_HAND + 5,
    "left_thumb": _LEFT_HAND + 2, "right_thumb": _RIGHT_HAND + 2, "left_hip": 11, "right_hip": 8, "left_knee": 12,
    "right_knee": 9, "left_ankle": 13, "right_ankle": 10,
}  # fmt: skip
_FEET = ("left_heel", "right_heel", "left_foot_index", "right_foot_index")


def exact_poses(clip: DancerClip) -> PersonPoses:
    """The true key points, landmarks and mask of a rendered clip.

    A landmark's visibility is the confidence of its key point; that of feet is 1.
    """
    height, width = clip.mask.shape[1:]
    feet = [_FEET.index(name) if name in _FEET else -1 for name in LANDMARK_NAMES]
    joints = [_KEYPOINTS.get(name, 0) for name in LANDMARK_NAMES]
    is_foot = np.array(feet) >= 0
    points = np.where(is_foot[:, None], clip.feet[:, feet], clip.joints[:, joints]).astype(np.float64)
    visibility = np.where(is_foot, 1.0, clip.keypoints[:, joints, 2])
    hips = 0.5 * (clip.joints[:, 8, 2] + clip.joints[:, 11, 2])[:, None]
    focal = clip.intrinsics[0, 0]
    landmarks = np.stack(
        [
            -points[..., 0] / points[..., 2] * focal / width + 0.5,
            points[..., 1] / points[..., 2] * focal / height + 0.5,
            (points[..., 2] - hips) / -hips * focal / width,
            visibility,
        ],
        axis=-1,
    )
    mask: NDArray[np.float32] = clip.mask.astype(np.float32)
    return PersonPoses(clip.keypoints, landmarks.astype(np.float32), mask)
