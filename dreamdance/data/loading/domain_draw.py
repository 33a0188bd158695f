"""The domain that a sample of stage 1's first step trains on: one of rgb, normal and depth, drawn by the sample's key.

The loader draws it, so that only this domain is read and decoded; the objective draws the same one by the same key.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipSample
from dreamdance.data.shards.latents import PREFIX
from dreamdance.errors import UserError
from dreamdance.modalities import DOMAINS
from dreamdance.runtime.sample_random import sample_generator

# The name of the drawn domain among the maps of a sample.
TARGET = "target"


def normalise_weights(in_order: Sequence[float], key: str) -> Tensor:
    """Weights of the domains as `3` numbers that sum to 1, in the order of `DOMAINS`.

    Args:
        in_order: the weights of a recipe.
        key: the recipe's key, for the error text.

    Raises:
        UserError: all weights are zero.
    """
    values = torch.tensor(in_order, device="cpu")
    if values.sum() == 0:
        raise UserError(
            f"{key} gives every domain the weight 0; give at least one of {', '.join(DOMAINS)} a positive weight"
        )
    return values / values.sum()


def draw_domain(weights: Tensor, key: Sequence[int]) -> Tensor:
    """The number of the domain that a sample trains on, in the order of `DOMAINS`; shape `1`, on the CPU."""
    return torch.multinomial(weights, 1, generator=sample_generator(key, "domain"))


def name_target(sample: ClipSample, drawn: str) -> ClipSample:
    """The sample with its drawn domain, or that domain's latents, under the name of the target."""
    names = {drawn: TARGET, PREFIX + drawn: PREFIX + TARGET}
    return replace(sample, maps={names.get(name, name): values for name, values in sample.maps.items()})
