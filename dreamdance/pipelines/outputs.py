"""What comes out of the pipelines: tensors, arrays or PIL pictures."""

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
