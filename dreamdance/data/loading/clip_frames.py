"""A clip's aligned frames as tensors, and their mirror image."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import flip_map, pictures_to_tensor
from dreamdance.modalities import MODALITIES


@dataclass(frozen=True)
class ClipFrames:
    """Aligned frames of one clip.

    Attributes:
        maps: the clip's maps by modality, `(f, c, H, W)` float32 in [0,1].
        keypoints: `(f, 128, 3)`, see `media.keypoints`; None if the clip has none.
    """

    maps: Mapping[str, Tensor]
    keypoints: Tensor | None = None


def flip_clip(clip: ClipFrames, *, drawn_pose: Tensor | None = None) -> ClipFrames:
    """Mirrors a clip horizontally: pictures, the normals' x, left and right key points; draws the pose again.

    Args:
        clip: a clip with key points.
        drawn_pose: `(f, 3, H, W)`, the drawing of the mirrored key points, if the caller has it already.

    Raises:
        ValueError: the clip has no key points. A drawing cannot be mirrored, because left and right differ in colour.
    """
    if clip.keypoints is None:
        raise ValueError("a clip that has only a pose drawing and no key points cannot be flipped")
    keypoints = flip_keypoints(clip.keypoints.numpy())
    if drawn_pose is None:
        height, width = clip.maps["rgb"].shape[-2:]
        drawn_pose = pictures_to_tensor(draw_poses(keypoints, width=width, height=height))
    kinds = {name: MODALITIES[name].kind for name in clip.maps}
    maps = {
        name: drawn_pose if kinds[name] == "drawing" else flip_map(images, kind=kinds[name])
        for name, images in clip.maps.items()
    }
    return ClipFrames(maps, torch.from_numpy(keypoints))
