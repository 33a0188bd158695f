"""What both objectives hand to the trainer, and what they share. Knows nothing of ranks, optimizers or recipes."""

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
from dreamdance.models.autoencoding import Autoencoder, encode_latents, keep_in_float32, latent_shape

# Pictures that the frozen autoencoder encodes at once: its activations at full size are larger than the UNet's.
ENCODE_CHUNK_SIZE = 8


class ObjectiveOutput(NamedTuple):
    """The loss of one micro batch; a tuple, because DeepSpeed looks for the loss in tuples, lists and dicts alone.

    Attributes:
        loss: scalar with a gradient, the mean of `sample_losses`.
        sample_losses: `b`, one loss per clip, detached.
        domain_sums: `3` (rgb, normal, depth), each domain's losses summed over the clips that have it, before the
            domains are weighted, detached.
        domain_counts: `3`, over how many clips each of `domain_sums` is a sum.
    """

    loss: Tensor
    sample_losses: Tensor
    domain_sums: Tensor
    domain_counts: Tensor

    def sums(self) -> Tensor:
        """All that adds up over micro batches and ranks, `8`, float64: losses, number of clips, and both by domain."""
        count = self.sample_losses.new_tensor([len(self.sample_losses)])
        parts = (self.sample_losses.sum().reshape(1), count, self.domain_sums, self.domain_counts)
        return torch.cat([part.to(torch.float64) for part in parts])


def no_grad_if_frozen(*networks: nn.Module) -> AbstractContextManager[object]:
    """A context which records nothing for a backward pass where none of `networks` has a trainable parameter."""
    trainable = any(parameter.requires_grad for network in networks for parameter in network.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trainable)


class Objective(nn.Module, ABC):
    """An objective on the latents of a frozen autoencoder, which keeps float32 when the networks are cast."""

    unet: ModelMixin
    vae: Autoencoder

    @abstractmethod
    def make_pipeline(self) -> DiffusionPipeline:
        """The pipeline that samples from these very networks (shared, not copied)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """What `to`, `bfloat16` and all casts and moves go through."""
        with keep_in_float32(self.vae):
            super()._apply(fn, *args, **kwargs)
        return self

    def encode_targets(self, images: Tensor, keys: Sequence[Sequence[int]], form: Literal["sample", "mode"]) -> Tensor:
        """The targets to denoise: scaled latents of pictures, drawn from their distribution as the base networks' were.

        Args:
            images: `(b k) 3 H W` in [0, 1], k for each of the b samples.
            keys: `b` keys, to which the draws belong.
            form: `"mode"` draws nothing.

        Returns:
            `(b k) c h w`, float32.
        """
        noise = None
        if form == "sample" and not isinstance(self.vae, PatchAutoencoder):  # whose distribution is a point
            per_sample = (len(images) // len(keys), *latent_shape(self.vae, images))
            noise = rearrange(draw_noise(keys, per_sample, purpose="target latents"), "b k c h w -> (b k) c h w")
        return encode_latents(self.vae, images, chunk_size=ENCODE_CHUNK_SIZE, noise=noise).float()
