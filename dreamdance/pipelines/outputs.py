"""Outputs of the pipelines, as tensors, arrays or PIL pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dreamdance.media.transforms import encode_normals
from dreamdance.pipelines.inputs import Picture

Frames = Tensor | NDArray[np.float32] | list[list[Picture]]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class GeometryOutput(BaseOutput):
    """Result of `GeometryPipeline`: a list of pictures for each clip (`pil`), `b f H W c` (`np`) or `b f c H W` (`pt`).

    Attributes:
        normals: unit vectors in camera space (x right, y up, z towards the camera); for `pil`, pictures of (n + 1) / 2.
        depths: disparity in [0, 1], near is bright; one channel.
        images: low-resolution rgb in [0, 1]; stage 2 does not read it.
    """

    normals: Frames
    depths: Frames
    images: Frames


@dataclass
class AnimationOutput(BaseOutput):
    """Result of `AnimationPipeline`: frames in [0, 1], in the forms of `GeometryOutput`."""

    frames: Frames


@dataclass
class DreamDanceOutput(BaseOutput):
    """Result of `DreamDancePipeline`: frames, and stage 1's normals and depths, in the forms of `GeometryOutput`."""

    frames: Frames
    normals: Frames
    depths: Frames


def check_output_type(output_type: str, *, accepted: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raises ValueError for an output type that is not accepted."""
    if output_type not in accepted:
        raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(accepted)}")


def frames_output(frames: Tensor, output_type: str) -> Frames:
    """Turns `b f c H W` in [0, 1] into tensors, arrays or PIL pictures."""
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
    """Returns unit vectors `b f 3 H W` as tensors or arrays, or as pictures of (n + 1) / 2."""
    return frames_output(encode_normals(normals) if output_type == "pil" else normals, output_type)
