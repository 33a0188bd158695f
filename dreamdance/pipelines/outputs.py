"""What goes into the pipelines and what comes out: PIL pictures, arrays and tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from diffusers.utils import BaseOutput
from einops import rearrange
from PIL import Image
from torch import Tensor

from dreamdance.data.transforms import encode_normals

Picture = Image.Image
Video = Sequence[Picture]
Frames = Tensor | np.ndarray | list[list[Picture]]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class GeometryOutput(BaseOutput):
    """Result of `GeometryPipeline`: lists of clips of pictures (`pil`), `b f H W c` (`np`) or `b f c H W` (`pt`).

    Attributes:
        normals: unit vectors in camera space (x right, y up, z towards the camera); pictures of (n + 1) / 2 for `pil`.
        depths: disparity in [0, 1], near bright, one channel.
        images: low-resolution rgb in [0, 1], which stage 2 does not read.
    """

    normals: Frames
    depths: Frames
    images: Frames


@dataclass
class AnimationOutput(BaseOutput):
    """Result of `AnimationPipeline`: frames in [0, 1], of the same forms as `GeometryOutput`'s."""

    frames: Frames


@dataclass
class DreamDanceOutput(BaseOutput):
    """Result of `DreamDancePipeline`: frames beside stage 1's normals and depths, in the forms of `GeometryOutput`."""

    frames: Frames
    normals: Frames
    depths: Frames


def check_output_type(output_type: str, *, accepted: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raises ValueError for an output type that the pipeline does not make."""
    if output_type not in accepted:
        raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(accepted)}")


def frames_output(frames: Tensor, output_type: str) -> Frames:
    """`b f c H W` in [0, 1] as tensors, arrays or PIL pictures."""
    frames = frames.float().cpu()
    if output_type == "pt":
        return frames
    array = rearrange(frames, "b f c H W -> b f H W c").numpy()
    if output_type == "np":
        return array
    shades = np.round(array.clip(0, 1) * 255).astype(np.uint8)
    if shades.shape[-1] == 1:
        shades = shades[..., 0]
    return [[Image.fromarray(frame) for frame in clip] for clip in shades]


def normals_output(normals: Tensor, output_type: str) -> Frames:
    """`b f 3 H W` unit vectors as they are, or as pictures."""
    return frames_output(encode_normals(normals) if output_type == "pil" else normals, output_type)


def image_tensor(image: Picture | Video | Tensor) -> Tensor:
    """Reference images as `b 3 H W` float32 in [0, 1].

    Args:
        image: one picture, a list of b pictures, or a tensor `3 H W` or `b 3 H W`.

    Raises:
        ValueError: not a picture of three channels, or values far outside of [0, 1].
    """
    if isinstance(image, Image.Image):
        image = [image]
    if not isinstance(image, Tensor):
        return torch.stack([_picture_tensor(picture) for picture in image])
    if image.ndim == 3:
        image = rearrange(image, "c H W -> 1 c H W")
    return _checked(image, "image", 4)


def clip_tensor(frames: Video | Sequence[Video] | Tensor, name: str) -> Tensor:
    """Poses or maps as `b f 3 H W` float32 in [0, 1].

    Args:
        frames: a list of f pictures, a list of b such lists, or a tensor `f c H W` or `b f c H W` of 1 or 3 channels.
        name: the argument's name, for messages.

    Raises:
        ValueError: as `image_tensor`.
    """
    if not isinstance(frames, Tensor):
        if not frames:
            raise ValueError(f"{name} is empty: at least one frame is needed")
        clips = cast(Sequence[Video], [frames] if isinstance(frames[0], Image.Image) else frames)
        return torch.stack([torch.stack([_picture_tensor(picture) for picture in clip]) for clip in clips])
    if frames.ndim == 4:
        frames = rearrange(frames, "f c H W -> 1 f c H W")
    if frames.ndim == 5 and frames.shape[2] == 1:
        frames = frames.expand(-1, -1, 3, -1, -1)
    return _checked(frames, name, 5)


def _picture_tensor(picture: Picture) -> Tensor:
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
    return rearrange(torch.from_numpy(array), "H W c -> c H W")


def _checked(tensor: Tensor, name: str, ndim: int) -> Tensor:
    shape = "b 3 H W" if ndim == 4 else "b f 3 H W"
    if tensor.ndim != ndim or tensor.shape[-3] != 3 or tensor.numel() == 0:
        raise ValueError(f"{name} must be pictures or a tensor {shape}, not of shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floats in [0, 1], not {tensor.dtype}")
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= -0.01 and high <= 1.01):  # so put, NaN is refused too
        raise ValueError(f"{name} must lie in [0, 1], but reaches from {low:.3g} to {high:.3g}")
    return tensor.float()
