"""Procedural dancers (contract C10): people whose pictures, normals, depth, masks and joints are known exactly.

The dataset of the demo, the tests and the ablations. Everything follows from a seed; nothing is read from disk.
"""

from dataclasses import dataclass

import numpy as np

TRAINING_SEEDS = range(1_000_000_000)
"""Identities and motions to train on."""

HELD_OUT_SEEDS = range(1_000_000_000, 1_100_000_000)
"""Identities and motions that no training clip may have."""


@dataclass(frozen=True)
class DancerClip:
    """A rendered clip. Camera space is x right, y up, z towards the camera, which sits at its origin.

    rgb: `(f, H, W, 3)` uint8. normal: `(f, H, W, 3)` float32, unit length, at pixel centres. depth: `(f, H, W)`
    float32, metres along the optical axis, at pixel centres. mask: `(f, H, W)` bool, the body. keypoints: `(f, 128, 3)` float32
    (`data.keypoints`). joints: `(f, 128, 3)` float32, metres, the 3D points whose projections the key points are.
    intrinsics: `(3, 3)` float64, in pixels; pixel centres lie at halves.
    """

    rgb: np.ndarray
    normal: np.ndarray
    depth: np.ndarray
    mask: np.ndarray
    keypoints: np.ndarray
    joints: np.ndarray
    intrinsics: np.ndarray
    fps: float
    seed: int


def render_clip(seed: int, *, num_frames: int, width: int, height: int, fps: float = 8.0) -> DancerClip:
    """Renders the dancer of a seed.

    Args:
        seed: from `TRAINING_SEEDS` or `HELD_OUT_SEEDS`; decides body, clothes, background, camera and motion.
        num_frames: length of the clip.
        width, height: in pixels.
        fps: frames per second; the motion itself is a function of seconds.

    Raises:
        ValueError: a seed outside of both ranges, or an empty clip.
    """
    raise NotImplementedError
