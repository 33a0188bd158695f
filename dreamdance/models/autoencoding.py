"""Encodes pictures to latents and decodes them, with Stable Diffusion's autoencoder, SVD's or the patch autoencoder.

Autoencoders compute in float32 whatever the precision of the networks around them: in bfloat16 their latents are off by
1 % and their pictures by 3 %.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dreamdance.models.patch_autoencoder import PatchAutoencoder

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLTemporalDecoder | PatchAutoencoder

# Number of frames that neighbouring chunks of a video decoder share.
DECODE_OVERLAP = 2


def downscale_factor(vae: Autoencoder) -> int:
    """Pixels per latent along a side."""
    if isinstance(vae, PatchAutoencoder):
        return vae.downscale_factor
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: Autoencoder, images: Tensor) -> tuple[int, int, int]:
    """`c h w` of the latents of pictures `n 3 H W`."""
    factor = downscale_factor(vae)
    return (vae.config.latent_channels, images.shape[-2] // factor, images.shape[-1] // factor)


@contextmanager
def keep_in_float32(network: nn.Module) -> Iterator[None]:
    """Restores the float32 values of a network that other code casts to a narrower type inside this context.

    Casting back alone would leave the values rounded.
    """
    kept = [
        (owner, name, value.data)
        for owner in network.modules()
        for name, value in (*owner._parameters.items(), *owner._buffers.items())
        if value is not None and value.dtype == torch.float32
    ]
    try:
        yield
    finally:
        for owner, name, values in kept:
            cast = getattr(owner, name)
            if cast.is_floating_point() and cast.itemsize < values.itemsize:
                cast.data = values.to(cast.device)


def computes_one_by_one(pictures: Tensor) -> bool:
    """Whether an encoder takes pictures one by one, see `encode_moments`; fake tensors stand for those of a GPU."""
    return pictures.device.type == "cpu" and not isinstance(pictures, FakeTensor)


@torch.no_grad()
def encode_latents(
    vae: Autoencoder,
    images: Tensor,
    *,
    scaled: bool = True,
    chunk_size: int | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Encodes pictures to the mode of their latent distribution, or to a sample of it, without gradients.

    Args:
        vae: the frozen autoencoder; a narrower one than float32 is converted to float32 and stays so.
        images: `n 3 H W` in [0, 1]; a picture with added noise may leave that range.
        scaled: multiply by the scaling factor, as for diffusion targets; SVD's conditioning latents are **not** scaled.
        chunk_size: pictures encoded at once; all by default.
        noise: `n c h w`, unit normal; the result is mean + deviation * noise. None gives the mode (the mean).

    Returns:
        `n c h w`, float32 or wider, on the device of the autoencoder.
    """
    mean, deviation = encode_moments(vae, images, chunk_size=chunk_size)
    return latents_from_moments(vae, mean, deviation, scaled=scaled, noise=noise)


@torch.no_grad()
def encode_moments(vae: Autoencoder, images: Tensor, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Encodes pictures to the mean and the standard deviation of their latent distribution, without gradients.

    The bits of a convolution depend on the order of the dimensions in memory, and on the CPU also on the size of the
    batch. Pictures are therefore encoded in one order, and on the CPU one by one: otherwise stored latents would
    differ from those of training.

    Args:
        vae, images, chunk_size: see `encode_latents`.

    Returns:
        Mean and deviation, each `n c h w`, not scaled.
    """
    _widen(vae)
    pictures = images.to(device=vae.device, dtype=vae.dtype) * 2 - 1
    size = 1 if computes_one_by_one(pictures) else chunk_size or max(len(pictures), 1)
    distributions = [vae.encode(chunk.contiguous()).latent_dist for chunk in pictures.split(size)]
    mean, deviation = (torch.cat([getattr(part, name) for part in distributions]) for name in ("mean", "std"))
    return mean, deviation


def latents_from_moments(
    vae: Autoencoder,
    mean: Tensor,
    deviation: Tensor | None = None,
    *,
    scaled: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """The latents of a distribution: its mean, or, with a deviation and noise, a sample; see `encode_latents`."""
    latents = mean if noise is None or deviation is None else mean + deviation * noise.to(mean)
    return latents * vae.config.scaling_factor if scaled else latents


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents: Tensor, *, chunk_size: int = 8, num_frames: int | None = None) -> Tensor:
    """Decodes scaled latents to pictures, a few frames at a time.

    SVD's decoder mixes neighbouring frames. Its chunks therefore share two frames (one or none in chunks of less than
    five), over which one chunk fades into the next: this is closer to decoding all frames at once than a cut.

    Args:
        vae: the autoencoder; a narrower one than float32 is converted to float32 and stays so.
        latents: `(b f) c h w`, multiplied by the scaling factor.
        chunk_size: largest number of frames decoded at once; with SVD's decoder, larger chunks are more accurate.
        num_frames: frames of each clip, so that no chunk mixes two clips; None means one clip.

    Returns:
        `(b f) 3 H W` float32, clamped to [0, 1], on the CPU; the device never holds more than one chunk.

    Raises:
        ValueError: `chunk_size` is below 1, or the latents are no whole number of clips.
    """
    num_frames = len(latents) if num_frames is None else num_frames
    if chunk_size < 1 or num_frames < 1 or len(latents) % num_frames:
        raise ValueError(
            f"cannot decode {len(latents)} frames as clips of num_frames={num_frames} in chunks of {chunk_size}: "
            "num_frames must divide the frames, decode_chunk_size must be 1 or more"
        )
    _widen(vae)
    latents = latents.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor
    mixes_frames = isinstance(vae, AutoencoderKLTemporalDecoder)
    overlap = min(DECODE_OVERLAP, (chunk_size - 1) // 2) if mixes_frames else 0
    frames: list[Tensor] = []
    for index, clip in enumerate(rearrange(latents, "(b f) c h w -> b f c h w", f=num_frames)):
        for chunk in _plan_chunks(num_frames, chunk_size, overlap):
            named = {"num_frames": len(chunk)} if mixes_frames else {}
            decoded = list(vae.decode(clip.narrow(0, chunk.start, len(chunk)), **named).sample.float().cpu())
            start = index * num_frames + chunk.start
            shared = len(frames) - start
            for place in range(shared):
                share = (place + 1) / (shared + 1)
                decoded[place] = (1 - share) * frames[start + place] + share * decoded[place]
            frames[start:] = decoded
    return torch.stack(frames).div_(2).add_(0.5).clamp_(0, 1)


def _plan_chunks(num_frames: int, chunk_size: int, overlap: int) -> list[range]:
    """Splits frames into chunks of at most `chunk_size`, of nearly equal length; neighbours share `overlap` frames."""
    if num_frames <= chunk_size:
        return [range(num_frames)]
    count = math.ceil((num_frames - overlap) / (chunk_size - overlap))
    rims = [overlap + math.ceil((num_frames - overlap) * index / count) for index in range(count + 1)]
    return [range(start - overlap, stop) for start, stop in pairwise(rims)]


def _widen(vae: Autoencoder) -> None:
    """Converts the autoencoder to float32, as diffusers' pipelines do if its config has `force_upcast`."""
    if vae.dtype.itemsize < torch.float32.itemsize:
        vae.to(torch.float32)
