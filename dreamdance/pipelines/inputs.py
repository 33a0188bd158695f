"""Inputs of the pipelines: turns PIL pictures, arrays and tensors into tensors of the result's aspect ratio."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dreamdance.media.cropping import centred_crop
from dreamdance.media.pictures import WHITE, Colour, to_rgb_picture
from dreamdance.media.transforms import pictures_to_tensor
from dreamdance.modalities import MODALITIES

Picture = Image.Image
Video = Sequence[Picture]
Images = Picture | Sequence[Picture] | NDArray[Any] | Sequence[NDArray[Any]] | Tensor | Sequence[Tensor]
Clips = Video | Sequence[Video] | NDArray[Any] | Sequence[NDArray[Any]] | Tensor | Sequence[Tensor]

# Sizes are multiples of the autoencoder's factor, therefore the aspect ratios of the two stages differ a little. Within
# this tolerance, their pictures count as the same part of the scene.
MAP_ASPECT_TOLERANCE = 0.03

# Name of the argument -> colour behind transparent parts of its pictures.
_BEHIND: dict[str, Colour] = {"image": WHITE, **{f"{name}s": each.background for name, each in MODALITIES.items()}}


def image_tensor(image: Images) -> Tensor:
    """Reference images as `b 3 H W` float32 in [0, 1].

    Args:
        image: one picture, a list of b pictures, or a tensor `3 H W` or `b 3 H W` of floats in [0, 1]. A picture is a
            PIL picture of any mode (see `media.pictures`), or an array `H W 3` of uint8, of uint16, or of floats in
            [0, 1]; arrays may be stacked.

    Raises:
        ValueError: the pictures do not have three channels and one size, or values are out of range.
    """
    tensor = _as_tensor(image, "image")
    if tensor.ndim == 3:
        tensor = rearrange(tensor, "c H W -> 1 c H W")
    return _checked(tensor, "image", 4)


def clip_tensor(frames: Clips, name: str) -> Tensor:
    """Poses or maps as `b f 3 H W` float32 in [0, 1].

    Args:
        frames: a list of f pictures, b lists of them, or a tensor `f c H W` or `b f c H W` of 1 or 3 channels. Pictures
            are as in `image_tensor`; arrays `H W c` may be stacked over f, and over b.
        name: name of the argument, for messages.

    Raises:
        ValueError: as `image_tensor`.
    """
    tensor = _as_tensor(frames, name)
    if tensor.ndim == 4:
        tensor = rearrange(tensor, "f c H W -> 1 f c H W")
    if tensor.ndim == 5 and tensor.shape[2] == 1:
        tensor = tensor.expand(-1, -1, 3, -1, -1)
    return _checked(tensor, name, 5)


def still_tensor(image: Images, name: str) -> Tensor:
    """Poses or maps of b single pictures as `b 1 3 H W` float32 in [0, 1]; else as `clip_tensor`."""
    tensor = _as_tensor(image, name)
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    return clip_tensor(tensor[:, None], name)


def cut_to_aspect(images: Tensor, height: int, width: int, *, tolerance: float = 0.0) -> Tensor:
    """Crops pictures at the centre to the aspect ratio of `height` x `width`, so that resizing never distorts them.

    Args:
        images: `... H W`.
        height, width: size of the result in pixels; only their ratio matters.
        tolerance: pictures whose aspect ratio differs by at most this fraction are not cropped.
    """
    own_height, own_width = images.shape[-2:]
    if have_same_aspect((own_height, own_width), (height, width), tolerance=tolerance):
        return images
    crop = centred_crop(own_width, own_height, to_width=width, to_height=height)
    return images[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def have_same_aspect(size: tuple[int, int], other: tuple[int, int], *, tolerance: float = MAP_ASPECT_TOLERANCE) -> bool:
    """Whether the aspect ratios of two (height, width) differ by at most the fraction `tolerance`."""
    return abs(size[1] * other[0] / (size[0] * other[1]) - 1.0) <= tolerance


def _as_tensor(given: Any, name: str) -> Tensor:
    """Turns a picture, an array, a tensor, or a list (of lists) of these into a tensor `... c H W`."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, Image.Image):
        return pictures_to_tensor(to_rgb_picture(given, background=_BEHIND[name], name=f"a picture given as {name}"))
    if isinstance(given, np.ndarray):
        return _array_tensor(given, name)
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} must be pictures (PIL), arrays or tensors, or lists of them, not {type(given)}")
    if not given:
        raise ValueError(f"{name} is empty: at least one picture is needed")
    tensors = [_as_tensor(part, name) for part in given]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        found = ", ".join(str(shape) for shape in shapes[:4])
        raise ValueError(f"{name} must all be of one size and length; their shapes (channels first) are {found}")
    return torch.stack(tensors)


def _array_tensor(array: NDArray[Any], name: str) -> Tensor:
    """Turns an array `... H W c` into a tensor `... c H W` of floats."""
    if array.ndim < 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: an array must be of shape H W 3 (maps also H W 1), not {array.shape}; give "
                         "others as PIL pictures")  # fmt: skip
    if array.dtype in (np.uint8, np.uint16):
        return pictures_to_tensor(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name}: an array must hold uint8, uint16, or floats in [0, 1], not {array.dtype}")
    return torch.from_numpy(np.moveaxis(array, -1, -3).astype(np.float32))


def _checked(tensor: Tensor, name: str, ndim: int) -> Tensor:
    shape = "b 3 H W" if ndim == 4 else "b f 3 H W"
    if tensor.ndim != ndim or tensor.shape[-3] != 3 or tensor.numel() == 0:
        raise ValueError(f"{name} must be pictures or a tensor {shape}, not of shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floats in [0, 1], not {tensor.dtype}")
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= -0.01 and high <= 1.01):  # NaN fails every comparison, and is refused too
        raise ValueError(f"{name} must lie in [0, 1], but its values are from {low:.3g} to {high:.3g}")
    return tensor.float()
