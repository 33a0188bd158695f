"""The output and the base class of both objectives. This module does not know ranks, optimizers or recipes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from einops import rearrange
from torch import Tensor, nn

from dreamdance.data.loading.batch import ClipBatch
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
        count = self.sample_losses.new_full((1,), len(self.sample_losses))
        parts = (self.sample_losses.sum().reshape(1), count, self.domain_sums, self.domain_counts)
        return torch.cat([part.to(torch.float64) for part in parts])


@dataclass(frozen=True)
class EncodedClips:
    """What the frozen encoders make of a micro batch; no noise level has a part in it.

    Attributes:
        targets: `(b k) c h w`, the latents to denoise, float32.
        reference: `b c h w`, the latents of the reference; None in a step that does not read them.
        embeddings: `b 1 c`, its image embedding.
    """

    targets: Tensor
    reference: Tensor | None
    embeddings: Tensor


@dataclass(frozen=True)
class PreparedBatch:
    """A micro batch on the networks' device, with all that `forward` reads.

    Attributes:
        clips: the clips; their keys are on the CPU.
        draws: random numbers about them by name, see `Objective.draw`.
        encoder_pictures: see `Objective.resize_reference`.
        encoded: what the encoders made of the clips; None lets `forward` encode them.
    """

    clips: ClipBatch
    draws: Mapping[str, Tensor]
    encoder_pictures: Tensor | None
    encoded: EncodedClips | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors on the device."""
        clips = [values for name, values in self.clips.tensors.items() if name != "keys"]
        pictures = [] if self.encoder_pictures is None else [self.encoder_pictures]
        return [*clips, *self.draws.values(), *pictures]


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

    @abstractmethod
    def forward(self, batch: ClipBatch | PreparedBatch, *, noise_quantile: float | None = None) -> ObjectiveOutput:
        """The loss of one micro batch; in evaluation mode no condition is dropped.

        Args:
            batch: clips with the maps that the objective reads, or with their stored latents, on any device; or what
                `prepare` made of them, which contains the noise level.
            noise_quantile: the quantile, in (0, 1), of training's distribution of noise levels at which all clips are
                measured; None draws a level for each clip by its key, as training does.
        """

    @abstractmethod
    def describe_noise(self, quantile: float) -> str:
        """The noise level at a quantile, as TensorBoard names it: `timestep_62` or `sigma_0.17`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Implements all casts and moves, such as `to` and `bfloat16`, except that the autoencoder stays in float32."""
        with keep_in_float32(self.vae):
            super()._apply(fn, *args, **kwargs)
        return self

    @abstractmethod
    def draw(self, batch: ClipBatch, *, noise_quantile: float | None = None) -> dict[str, Tensor]:
        """All random numbers about a batch's clips, by name, and other numbers that `forward` reads; on the CPU (C8).

        Args:
            batch: the clips.
            noise_quantile: see `forward`.
        """

    @abstractmethod
    def resize_reference(self, batch: ClipBatch) -> Tensor | None:
        """The reference as the image encoder needs it, on the batch's device; None if its embedding is stored."""

    def prepare(
        self, batch: ClipBatch, *, non_blocking: bool = False, noise_quantile: float | None = None
    ) -> PreparedBatch:
        """Everything of a training step that copies to the device: `forward` of the result copies nothing.

        Args:
            batch: clips on any device; in page-locked memory if copies shall not block.
            non_blocking: whether the copies may still run at the return; the current stream then orders them.
            noise_quantile: see `forward`.
        """
        device = self.unet.device
        draws = self.draw(batch, noise_quantile=noise_quantile)
        if non_blocking:
            draws = {name: values.pin_memory() for name, values in draws.items()}
        clips = batch.to(device, non_blocking=non_blocking)
        moved = {name: values.to(device, non_blocking=non_blocking) for name, values in draws.items()}
        return PreparedBatch(clips, moved, self.resize_reference(clips))

    @abstractmethod
    def encode(self, prepared: PreparedBatch) -> EncodedClips:
        """Runs the frozen encoders, or takes what the batch has stored of them; drops no condition."""

    def prepare_levels(self, batch: ClipBatch, quantiles: Sequence[float]) -> Iterator[PreparedBatch]:
        """Yields a batch at several noise levels, encoded once.

        `forward` of each gives the same bits as of the batch at that `noise_quantile`. Keyed draws are the same at all
        levels, but for the level itself.

        Args:
            batch: clips on any device.
            quantiles: one or more, see `forward`.
        """
        prepared = self.prepare(batch, noise_quantile=quantiles[0])
        prepared = replace(prepared, encoded=self.encode(prepared))
        for quantile in quantiles:
            draws = self.draw(prepared.clips, noise_quantile=quantile)
            yield replace(prepared, draws={name: values.to(self.unet.device) for name, values in draws.items()})

    def draw_target_noise(
        self, keys: Sequence[Sequence[int]], shape: Sequence[int], form: Literal["sample", "mode"]
    ) -> dict[str, Tensor]:
        """The noise of `draw_targets` under the name "target latents", `(b k) c h w`; empty if it needs none.

        Args:
            keys: `b` keys.
            shape: `k c h w`, k pictures for each sample.
            form: `"sample"` draws latents from their distribution, `"mode"` takes its mode and draws nothing.
        """
        if form == "mode" or isinstance(self.vae, PatchAutoencoder):  # its distribution is a single point
            return {}
        noise = draw_noise(keys, shape, purpose="target latents")
        return {"target latents": rearrange(noise, "b k c h w -> (b k) c h w")}

    def encode_targets(self, images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The targets to denoise: scaled latents of pictures, as the base networks were trained on.

        Args:
            images: `(b k) 3 H W` in [0, 1], k pictures for each of the b samples.
            draws: the noise from `draw_target_noise`, on the autoencoder's device, if any.

        Returns:
            `(b k) c h w`, float32.
        """
        moments = encode_moments(self.vae, images, chunk_size=ENCODE_CHUNK_SIZE)
        return self.draw_targets(torch.stack(moments, dim=1), draws)

    def draw_targets(self, moments: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The targets to denoise, from the moments of their distributions; see `encode_targets`.

        Args:
            moments: `(b k) 2 c h w`, mean and standard deviation, not scaled.
            draws: see `encode_targets`.

        Returns:
            `(b k) c h w`, float32.
        """
        mean, deviation = moments.unbind(dim=1)
        return latents_from_moments(self.vae, mean, deviation, noise=draws.get("target latents")).float()
