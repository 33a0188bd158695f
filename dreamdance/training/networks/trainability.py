"""Which parameters train in which step (dreamdance/README.md, "The method"), by name. Knows nothing of optimizers.

Never among them: the autoencoder and the image encoder.
Paper: both UNets train in the first step; here: all but what precedes the softmax of cross-attention, because over the
single token of the image embedding that softmax is 1 and its gradient rounding noise, which Adam would turn into steps.
"""

import re
from collections.abc import Collection

from torch import nn

from dreamdance.training.networks.frozen_convolution import replace_convolutions
from dreamdance.training.objectives.output import Objective

# Cross-attention reads a single token, the image embedding: its softmax is 1 whatever the query and the key are.
_NO_GRADIENT_WITH_ONE_TOKEN = re.compile(r"\.(attn2\.to_q|attn2\.to_k|norm2)\.(weight|bias)$")
_TRANSFORMER_BLOCK = re.compile(r"transformer_blocks\.\d+\.")


def train_only(objective: Objective, names: Collection[str]) -> list[str]:
    """Sets `requires_grad` of every parameter: only `names` train.

    Also sets the modes that go with it: training mode for the networks that train, evaluation mode for the others; and
    has the denoiser's frozen convolutions keep no input for a weight gradient.

    Returns:
        The sorted names.
    """
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name in names)
    replace_convolutions(objective.unet)
    set_modes(objective)
    return sorted(names)


def set_modes(objective: Objective) -> None:
    """Training mode, except for the networks that are frozen as a whole."""
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
