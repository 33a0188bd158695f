"""Which activations a network computes again in its backward pass, by level. Gradients are the same bits at each."""

from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from dreamdance_kernels import checkpoint_keeping_attention

Level = Literal["none", "blocks", "keep_attention", "transformers"]


def set_checkpointing_level(network: ModelMixin, level: Level) -> None:
    """Sets what a network computes again in its backward pass.

    Args:
        network: a UNet, a ControlNet or a controller that has no level yet; changed in place. A network that supports
            no checkpointing stays as it is.
        level: `"none"` nothing; `"blocks"` the inside of residual and transformer blocks, as diffusers does, which
            leaves out SVD's temporal blocks; `"keep_attention"` the same, without the results of attention;
            `"transformers"` residual blocks, and whole transformers with their projections and temporal blocks.
    """
    if level == "none" or not network._supports_gradient_checkpointing:
        return
    network.enable_gradient_checkpointing(checkpoint_keeping_attention if level == "keep_attention" else None)
    if level == "transformers":
        for module in network.modules():
            if isinstance(module, Transformer2DModel | TransformerSpatioTemporalModel):
                module.gradient_checkpointing = False  # otherwise its blocks would be computed three times
                _compute_again(module)


class _ComputedAgain(nn.Module):
    """Keeps the inputs of a module alone, and computes the rest again in the backward pass."""

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """As the module's own."""
        if not torch.is_grad_enabled():
            return super().forward(*inputs, **named_inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False, **named_inputs)


# The class of a module -> the same with `_ComputedAgain` before it.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _compute_again(module: nn.Module) -> None:
    """Changes a module's class; weights, their names and hooks stay."""
    kind: type[nn.Module] = type(module)
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Checkpointed{kind.__name__}", (_ComputedAgain, kind), {})
    module.__class__ = _CLASSES[kind]
