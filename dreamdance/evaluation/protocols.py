"""How frames are prepared for a metric: the true protocol, and DisCo's as its code has it.

`true`: floats at the size of the results (or of `metrics`), clips of 16 frames side by side.
`disco` (Wangt-CN/DisCo, tool/metrics): bytes at 256x256, clips of 16 frames from every frame on but the last possible
one, resized for the networks by Pillow's bicubic filter, channel by channel and without rounding.
`disco_gif`: the same clips as GIFs of 256 colours, whose frames some versions of ffmpeg repeat 8 times (its issue 36).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dreamdance.evaluation.clips import Size
from dreamdance.evaluation.scores import as_bytes
from dreamdance.media.transforms import resize_images

Protocol = Literal["true", "disco", "disco_gif"]
DISCO_SIZE: Size = (256, 256)
CLIP_FRAMES = 16
GIF_REPEATS = 8


def resize_frames(frames: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """Resizes frames `f H W 3` in [0, 1], bilinear, antialiased when shrinking; the aspect may change."""
    resized = [resize_images(_as_tensor(frame[None]), *size)[0] for frame in frames]
    return np.stack([rearrange(frame, "c h w -> h w c").numpy() for frame in resized])


def disco_frames(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Frames `f H W 3` in [0, 1] as bytes at 256x256, resized as OpenCV's INTER_LINEAR does: without antialiasing."""
    if frames.shape[1:3] == DISCO_SIZE:
        return as_bytes(frames)
    small = [functional.interpolate(_as_tensor(as_bytes(frame[None])), DISCO_SIZE, mode="bilinear") for frame in frames]
    return rearrange(torch.cat(small).round().to(torch.uint8), "f c h w -> f h w c").numpy()


def clip_frames(runs: Sequence[Sequence[int]], protocol: Protocol) -> list[list[int]]:
    """The clips of 16 frames on which FVD and FID-VID are measured.

    Args:
        runs: frames that follow one another without a gap.
        protocol: how the clips lie in them.
    """
    clips = []
    for run in runs:
        last = len(run) - CLIP_FRAMES
        starts = range(0, last + 1, CLIP_FRAMES) if protocol == "true" else range(last)
        clips += [list(run[start : start + CLIP_FRAMES]) for start in starts]
    return clips


def network_input(clip: NDArray[np.float32] | NDArray[np.uint8], side: int, protocol: Protocol) -> Tensor:
    """A clip for a video network: `3 f side side` in 0..255; `disco_gif` has 8 times as many frames.

    Args:
        clip: `f H W 3`: floats in [0, 1] (`true`), or bytes.
        side: height and width of the network's input.
        protocol: how it is prepared.
    """
    if protocol == "true":
        return rearrange(resize_images(_as_tensor(clip), side, side), "f c h w -> c f h w") * 255
    frames = [_quantised(frame) if protocol == "disco_gif" else frame for frame in clip]
    resized = np.stack([_resize_as_disco(frame, side) for frame in frames], axis=1)
    return torch.from_numpy(
        resized if protocol == "disco" else repeat(resized, "c f h w -> c (f n) h w", n=GIF_REPEATS)
    )


def _quantised(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame in the 256 colours of its own palette."""
    return np.asarray(Image.fromarray(frame).quantize(256).convert("RGB"))


def _resize_as_disco(frame: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """`H W 3` bytes -> `3 side side`; bicubic values may leave 0..255."""
    channels = [Image.fromarray(frame[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack([np.asarray(one.resize((side, side), Image.Resampling.BICUBIC)) for one in channels])


def _as_tensor(frames: NDArray[np.float32] | NDArray[np.uint8]) -> Tensor:
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)).float(), "f h w c -> f c h w")
