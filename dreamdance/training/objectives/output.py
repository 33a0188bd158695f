"""The output and the base class of both objectives. This module does not know ranks, optimizers or recipes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from dreamdance.diffusion.noise import draw_noise
from dreamdance.models import PatchAutoencoder
from dreamdance.models.autoencoding import Autoencoder, encode_moments, keep_in_float32, latents_from_moments
from dreamdance.models.image_embedding import ImageEncoder

# Number of pictures that the frozen autoencoder encodes at once: at full size its activations exceed the UNet's.
ENCODE_CHUNK_SIZE = 8


class ObjectiveOutput(NamedTuple):
    """The loss of one micro batch; a tuple, because DeepSpeed finds the loss only in tuples, lists and dicts.

    Attributes:
        loss: scalar with a gradient, the mean of `sample_losses`.
        sample_losses: `b`, one loss per clip, detached.
        domain_sums: `3` (rgb, normal, depth), each domain's losses summed over the clips that have it, before the
            domains are weighted, detached.
        domain_counts: `3`, the number of clips in each of `domain_sums`.
    """

    loss: Tensor
    sample_losses: Tensor
    domain_sums: Tensor
    domain_counts: Tensor

    def sums(self) -> Tensor:
        """Sums to add over micro batches and ranks, `8`, float64: losses, number of clips, then both by domain."""
        count = self.sample_losses.new_tensor([len(self.sample_losses)])
        parts = (self.sample_losses.sum().reshape(1), count, self.domain_sums, self.domain_counts)
        return torch.cat([part.to(torch.float64) for part in parts])


def no_grad_if_frozen(*networks: nn.Module) -> AbstractContextManager[object]:
    """A context that records nothing for a backward pass if no parameter of `networks` is trainable."""
    trainable = any(parameter.requires_grad for network in networks for parameter in network.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trainable)


class Objective(nn.Module, ABC):
    """An objective on the latents of a frozen autoencoder, which keeps float32 when the networks are cast."""

    unet: ModelMixin
    vae: Autoencoder
    image_encoder: ImageEncoder

    @abstractmethod
    def make_pipeline(self) -> DiffusionPipeline:
        """The pipeline that samples with the same networks (shared, not copied)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Implements all casts and moves, such as `to` and `bfloat16`, except that the autoencoder stays in float32."""
        with keep_in_float32(self.vae):
            super()._apply(fn, *args, **kwargs)
        return self

    def encode_targets(self, images: Tensor, keys: Sequence[Sequence[int]], form: Literal["sample", "mode"]) -> Tensor:
        """The targets to denoise: scaled latents of pictures, as the base networks were trained on.

        Args:
            images: `(b k) 3 H W` in [0, 1], k pictures for each of the b samples.
            keys: `b` keys; every random draw is keyed by its sample.
            form: `"sample"` draws latents from their distribution, `"mode"` takes its mode and draws nothing.

        Returns:
            `(b k) c h w`, float32.
        """
        moments = encode_moments(self.vae, images, chunk_size=ENCODE_CHUNK_SIZE)
        return self.draw_targets(torch.stack(moments, dim=1), keys, form)

    def draw_targets(self, moments: Tensor, keys: Sequence[Sequence[int]], form: Literal["sample", "mode"]) -> Tensor:
        """The targets to denoise, from the moments of their distributions; see `encode_targets`.

        Args:
            moments: `(b k) 2 c h w`, mean and standard deviation, not scaled.
            keys: `b` keys.
            form: see `encode_targets`.

        Returns:
            `(b k) c h w`, float32.
        """
        mean, deviation = moments.unbind(dim=1)
        noise = None
        if form == "sample" and not isinstance(self.vae, PatchAutoencoder):  # its distribution is a single point
            per_sample = (len(mean) // len(keys), *mean.shape[1:])
            noise = rearrange(draw_noise(keys, per_sample, purpose="target latents"), "b k c h w -> (b k) c h w")
        return latents_from_moments(self.vae, mean, deviation, noise=noise).float()
