"""diffusers' gated feed-forward activation with a backward pass that copies nothing.

The projection's result is split into values and gates; the output is value * gelu(gate). torch computes the gradients
of both halves on their own and then copies them into one tensor, the gradient of the projection's result. Here they are
computed where they belong. Every bit is the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def join_gate_gradients(network: nn.Module) -> None:
    """Makes a network compute the gradients of its gated activations in place; the results are bit-identical.

    Args:
        network: a UNet of either stage, a ControlNet or another network; changed in place.
    """
    for module in network.modules():
        if type(module) is GEGLU:
            module.__class__ = JoinedGatedGelu


class JoinedGatedGelu(GEGLU):
    """`GEGLU` whose backward pass writes both halves of the gradient into one tensor."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`... c` to `... d`. Further arguments are ignored by diffusers."""
        projected = self.proj(hidden_states)
        if torch.compiler.is_compiling():  # a compiler joins all of it by itself, and does not trace writes into halves
            value, gate = projected.chunk(2, dim=-1)
            return value * F.gelu(gate)
        output: Tensor = _GatedGelu.apply(projected)  # type: ignore[no-untyped-call]  # torch has no types for it
        return output


class _GatedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        value, gate = projected.chunk(2, dim=-1)
        activated = F.gelu(gate)
        ctx.save_for_backward(projected, activated)
        return value * activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        projected, activated = ctx.saved_tensors
        value, gate = projected.chunk(2, dim=-1)
        joined = torch.empty_like(projected)
        of_value, of_gate = joined.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_value)
        torch.mul(gradient, value, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return joined
