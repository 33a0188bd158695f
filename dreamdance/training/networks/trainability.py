"""Names of the parameters that train in each step (dreamdance/README.md, "The method").

The autoencoder and the image encoder never train. This module does not know optimizers.

Paper: both UNets train in the first step. Here: the layers before the softmax of cross-attention stay frozen. Over the
single token of the image embedding that softmax is 1; its gradient is rounding noise, which Adam would turn into steps.
"""

import fnmatch
import re
from collections.abc import Collection, Sequence

from torch import nn

from dreamdance.errors import RecipeError
from dreamdance.training.networks.frozen_convolution import replace_convolutions
from dreamdance.training.objectives.output import Objective

# Cross-attention reads a single token, the image embedding: its softmax is 1 for every query and key.
_NO_GRADIENT_WITH_ONE_TOKEN = re.compile(r"\.(attn2\.to_q|attn2\.to_k|norm2)\.(weight|bias)$")
_TRANSFORMER_BLOCK = re.compile(r"transformer_blocks\.\d+\.")


def train_only(objective: Objective, names: Collection[str], patterns: Sequence[str] = ()) -> list[str]:
    """Sets `requires_grad` of every parameter: only `names` train.

    Networks that train get training mode, the others evaluation mode. The denoiser's convolutions are replaced by
    classes that keep their input only if their weight trains.

    Args:
        objective: changed in place.
        names: names of parameters.
        patterns: the recipe's `optimizer.only`: of `names`, those that match one of them train; empty for all.

    Returns:
        The sorted names.

    Raises:
        RecipeError: a pattern matches none of `names`.
    """
    names = _matching(names, patterns) if patterns else names
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name in names)
    replace_convolutions(objective.unet)
    set_modes(objective)
    return sorted(names)


def _matching(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    found = {pattern: set(fnmatch.filter(names, pattern)) for pattern in patterns}
    if unused := [pattern for pattern, matches in found.items() if not matches]:
        beginnings = sorted({".".join(name.split(".")[:2]) for name in names})
        raise RecipeError(
            f"optimizer.only: no parameter that this step trains matches {', '.join(unused)}; their names begin with "
            f"{', '.join(beginnings)}"
        )
    return set().union(*found.values())


def set_modes(objective: Objective) -> None:
    """Sets training mode, and evaluation mode for the networks that are frozen as a whole."""
    objective.train()
    for network in objective.children():
        network.train(any(parameter.requires_grad for parameter in network.parameters()))


def names_with_gradient(network: nn.Module) -> set[str]:
    """Names of the parameters whose gradient is not zero by construction."""
    return {
        name
        for name, _ in network.named_parameters()
        if not (_TRANSFORMER_BLOCK.search(name) and _NO_GRADIENT_WITH_ONE_TOKEN.search(name))
    }
