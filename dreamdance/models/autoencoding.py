"""Pictures to latents and back, the same way for Stable Diffusion's autoencoder, SVD's and the patch autoencoder."""

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from einops import rearrange
from torch import Tensor

from dreamdance.models.patch_autoencoder import PatchAutoencoder

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLTemporalDecoder | PatchAutoencoder


def downscale_factor(vae: Autoencoder) -> int:
    """Pixels per latent along a side."""
    if isinstance(vae, PatchAutoencoder):
        return vae.downscale_factor
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_latents(vae: Autoencoder, images: Tensor, *, scaled: bool = True, chunk_size: int | None = None) -> Tensor:
    """Encodes pictures to the mode of their latent distribution, without gradients.

    Args:
        vae: the frozen autoencoder.
        images: `n 3 H W` in [0, 1]; a picture with added noise may leave that range.
        scaled: times the scaling factor, as diffusion targets are; SVD's conditioning latents are **not** scaled.
        chunk_size: pictures encoded at once; all by default.

    Returns:
        `n c h w` in the type and on the device of the autoencoder.
    """
    pictures = images.to(device=vae.device, dtype=vae.dtype) * 2 - 1
    chunks = pictures.split(chunk_size or max(len(pictures), 1))
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in chunks])
    return latents * vae.config.scaling_factor if scaled else latents


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents: Tensor, *, chunk_size: int = 8, num_frames: int | None = None) -> Tensor:
    """Decodes scaled latents to pictures, a few frames at a time.

    Args:
        vae: the autoencoder.
        latents: `(b f) c h w`, times the scaling factor.
        chunk_size: frames decoded at once. SVD's decoder mixes neighbouring frames, so that larger chunks flicker
            less.
        num_frames: frames of each clip, so that no chunk mixes two clips; None means one clip.

    Returns:
        `(b f) 3 H W` float32, clamped to [0, 1], on the CPU: of a long clip the device never holds more than a chunk.

    Raises:
        ValueError: `chunk_size` is below 1, or the latents are no whole number of clips.
    """
    num_frames = len(latents) if num_frames is None else num_frames
    if chunk_size < 1 or num_frames < 1 or len(latents) % num_frames:
        raise ValueError(
            f"cannot decode {len(latents)} frames as clips of num_frames={num_frames} in chunks of {chunk_size}: "
            "num_frames must divide the frames, decode_chunk_size must be 1 or more"
        )
    latents = latents.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor
    pictures = []
    for clip in rearrange(latents, "(b f) c h w -> b f c h w", f=num_frames):
        for chunk in clip.split(chunk_size):
            frames = {"num_frames": len(chunk)} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
            pictures.append((vae.decode(chunk, **frames).sample.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(pictures)
