"""What both objectives hand to the trainer, and what they share. Knows nothing of ranks, optimizers or recipes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_DOMAINS = 3
ENCODE_CHUNK_SIZE = 8
"""Pictures that the frozen autoencoder encodes at once: its activations at full size are larger than the UNet's."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of one micro batch.

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


def no_grad_if_frozen(*networks: nn.Module) -> AbstractContextManager[object]:
    """A context which records nothing for a backward pass where none of `networks` has a trainable parameter."""
    trainable = any(parameter.requires_grad for network in networks for parameter in network.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trainable)
