"""Picture transforms on tensors for data, objectives and pipelines: resizing, normals, flips. They need no OpenCV.

Normals are not colours: a resize averages them as vectors and scales them back to unit length.
"""

import numpy as np
import torch
from einops import pack, rearrange, unpack
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dreamdance.modalities import Kind

_SMALLEST_LENGTH = 1e-6


def encode_normals(normals: Tensor) -> Tensor:
    """Encodes unit normals `(..., 3, H, W)` as pictures in [0,1]: (n+1)/2."""
    return (normals + 1.0) / 2.0


def decode_normals(encoded: Tensor) -> Tensor:
    """Decodes normal pictures `(..., 3, H, W)` in [0,1] to unit vectors; mid-grey becomes one that faces the camera."""
    return _to_unit_length(encoded * 2.0 - 1.0)


def _to_unit_length(vectors: Tensor) -> Tensor:
    length = vectors.square().sum(dim=-3, keepdim=True).sqrt()  # `norm` over this axis takes 15 times as long on CPUs
    is_third = torch.arange(3, device=vectors.device) == 2  # no list of numbers: it would be copied to the device
    towards_camera = rearrange(is_third.to(vectors.dtype), "c -> c 1 1").expand_as(vectors)
    return torch.where(length > _SMALLEST_LENGTH, vectors / length.clamp_min(_SMALLEST_LENGTH), towards_camera)


def resize_images(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes pictures `(..., c, H, W)` to `(..., c, height, width)`, bilinear, antialiased when shrinking."""
    if images.shape[-2:] == (height, width):
        return images
    flat, leading = pack([images], "* c h w")
    resized = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    (result,) = unpack(resized, leading, "* c h w")
    return result


def resize_normals(encoded: Tensor, height: int, width: int) -> Tensor:
    """Resizes normal pictures `(..., 3, H, W)` in [0,1] as vectors, renormalises and encodes them again."""
    if encoded.shape[-2:] == (height, width):
        return encoded
    return encode_normals(_to_unit_length(resize_images(decode_normals(encoded), height, width)))


def resize_map(images: Tensor, height: int, width: int, *, kind: Kind) -> Tensor:
    """Resizes the pictures `(..., c, H, W)` of a modality as its kind requires."""
    if kind == "normals":
        return resize_normals(images, height, width)
    resized = resize_images(images, height, width)
    return resized.round() if kind == "region" else resized


def pass_through(
    images: Tensor, height: int, width: int, *, kind: Kind = "colours", to: tuple[int, int] | None = None
) -> Tensor:
    """Resizes to `height` x `width` and back: what a map looks like after stage 1 has made it at its own, smaller size.

    Args:
        images: `(..., c, H, W)` in [0,1].
        height, width: stage 1's size in pixels.
        kind: what the pixels mean: normals are renormalised.
        to: height and width of the result, of images that are of stage 1's size already; None means those of `images`.
    """
    smaller = resize_map(images, height, width, kind=kind)
    return resize_map(smaller, *(to or images.shape[-2:]), kind=kind)


def flip_images(images: Tensor) -> Tensor:
    """Mirrors pictures `(..., W)` from left to right."""
    return images.flip(-1)


def flip_normals(encoded: Tensor) -> Tensor:
    """Mirrors normal pictures `(..., 3, H, W)` in [0,1]: the x component changes its sign as well."""
    flipped = encoded.flip(-1).clone()
    flipped[..., 0, :, :] = 1.0 - flipped[..., 0, :, :]
    return flipped


def flip_map(images: Tensor, *, kind: Kind) -> Tensor:
    """Mirrors the pictures `(..., c, H, W)` of a modality as its kind requires; a drawing is drawn again instead."""
    return flip_normals(images) if kind == "normals" else flip_images(images)


def pictures_to_tensor(pictures: NDArray[np.uint8] | NDArray[np.uint16]) -> Tensor:
    """Turns pictures `(..., H, W, c)` uint8 or uint16 into `(..., c, H, W)` float32 in [0,1]."""
    largest = float(np.iinfo(pictures.dtype).max)
    return torch.from_numpy(np.moveaxis(pictures, -1, -3).astype(np.float32) / np.float32(largest))


def scale_to_floats(images: Tensor) -> Tensor:
    """Turns stored values, uint8 or uint16, into float32 in [0,1], to the bit as `pictures_to_tensor`; keeps floats."""
    if images.is_floating_point():
        return images
    # A tensor on the device, not a number: a GPU multiplies by the rounded inverse of a number.
    largest = torch.full((), float(torch.iinfo(images.dtype).max), device=images.device)
    return images.to(torch.float32) / largest


def tensor_to_pictures(images: Tensor) -> NDArray[np.uint8]:
    """Turns pictures `(..., c, H, W)` in [0,1] into `(..., H, W, c)` uint8, rounded; values beyond are clipped."""
    scaled = (images.detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return np.ascontiguousarray(np.moveaxis(scaled.numpy(), -3, -1))
