"""A clip's aligned frames as tensors, and their mirror image."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import flip_images, flip_normals, pictures_to_tensor


@dataclass(frozen=True)
class ClipFrames:
    """Aligned frames of one clip; what it lacks is None.

    rgb, pose, normal, depth: `(f, 3, H, W)` float32 in [0,1]; mask: `(f, 1, H, W)`; keypoints: `(f, 128, 3)`, see
    `media.keypoints`.
    """

    rgb: Tensor
    pose: Tensor
    normal: Tensor | None = None
    depth: Tensor | None = None
    mask: Tensor | None = None
    keypoints: Tensor | None = None


def flip_clip(clip: ClipFrames, *, drawn_pose: Tensor | None = None) -> ClipFrames:
    """Mirrors a clip from left to right: pictures, normals' x, left and right key points; the pose is drawn again.

    Args:
        clip: with key points.
        drawn_pose: `(f, 3, H, W)`, the drawing of the mirrored key points where it is at hand already.

    Raises:
        ValueError: the clip has no key points. A drawing cannot be mirrored, because left and right differ in colour.
    """
    if clip.keypoints is None:
        raise ValueError("a clip that has only a pose drawing and no key points cannot be flipped")
    keypoints = flip_keypoints(clip.keypoints.numpy())
    if drawn_pose is None:
        height, width = clip.pose.shape[-2:]
        drawn_pose = pictures_to_tensor(draw_poses(keypoints, width=width, height=height))
    return replace(
        clip,
        rgb=flip_images(clip.rgb),
        pose=drawn_pose,
        normal=None if clip.normal is None else flip_normals(clip.normal),
        depth=None if clip.depth is None else flip_images(clip.depth),
        mask=None if clip.mask is None else flip_images(clip.mask),
        keypoints=torch.from_numpy(keypoints),
    )
