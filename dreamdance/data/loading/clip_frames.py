"""A clip's aligned frames as tensors, and their mirror image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.media.cropping import Crop, PartialCrop, centred_crop
from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import flip_map, pictures_to_tensor, resize_map
from dreamdance.modalities import MODALITIES, Kind


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


def open_pictures(
    pictures: NDArray[Any], kind: Kind, *, flip: bool, width: int, height: int, cropped: bool = False
) -> Tensor:
    """Pictures `(..., H, W, c)` as a tensor `(..., c, H, W)`: as stored if nothing is computed with their values.

    They are computed with if they are resized, rounded to a region or mirrored as normals. torch cannot mirror uint16.

    Args:
        pictures: stored frames.
        kind: the meaning of their values.
        flip: whether they will be mirrored.
        width, height: the size that they will have.
        cropped: whether `crop_and_resize` will take a part of them that was drawn.
    """
    part = centred_crop(pictures.shape[-2], pictures.shape[-3], to_width=width, to_height=height)
    is_resized = cropped or (part.width, part.height) != (width, height)
    if is_resized or kind == "region" or (flip and (kind == "normals" or pictures.dtype != np.uint8)):
        return pictures_to_tensor(pictures)
    return torch.from_numpy(np.moveaxis(pictures, -1, -3))


def shown_part(frame: tuple[int, int], size: tuple[int, int], crop: PartialCrop | None = None) -> Crop:
    """The part of a frame (width, height) that is brought to a size: the largest centred one of that aspect.

    Args:
        frame, size: width and height.
        crop: takes this part of it.
    """
    part = centred_crop(*frame, to_width=size[0], to_height=size[1])
    return part if crop is None else crop.of(part)


def crop_and_resize(images: Tensor, kind: Kind, *, width: int, height: int, crop: PartialCrop | None = None) -> Tensor:
    """The part of images `(..., c, H, W)` that `shown_part` names, at a size."""
    part = shown_part((images.shape[-1], images.shape[-2]), (width, height), crop)
    images = images[..., part.top : part.top + part.height, part.left : part.left + part.width]
    return resize_map(images, height, width, kind=kind)
