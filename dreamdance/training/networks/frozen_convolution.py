"""Convolutions that keep their input for the backward pass only if their weight trains.

torch's linear layers do this already. torch's convolutions always keep their input; in a frozen UNet through which the
gradient passes, these inputs are about a third of all activations. This module does not know which network trains.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv3d_input

from dreamdance.models.temporal_convolution import FoldedConv3d

Sizes = tuple[int, ...]


def replace_convolutions(network: nn.Module) -> None:
    """Replaces plain convolutions in place: weights, names, hooks and modes stay."""
    for module in network.modules():
        if type(module) in _FROZEN_CLASSES and _is_replaceable(module):
            module.__class__ = _FROZEN_CLASSES[type(module)]


def _is_replaceable(convolution: Any) -> bool:
    """Whether a class of this module computes the same convolution: only zero padding, given as numbers."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


class FrozenConv2d(nn.Conv2d):
    """`nn.Conv2d`; while weight and bias are frozen, only the weight is kept for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`: `n c h w` to `n c h w`."""
        return _convolve(self, input) if _is_frozen(self) else super().forward(input)


class FrozenConv3d(nn.Conv3d):
    """`nn.Conv3d`; while weight and bias are frozen, only the weight is kept for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv3d`: `n c f h w` to `n c f h w`."""
        return _convolve(self, input) if _is_frozen(self) else super().forward(input)


class FrozenFoldedConv3d(FoldedConv3d):
    """`FoldedConv3d`; while weight and bias are frozen, only the weight is kept for the backward pass."""

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """As `FoldedConv3d`."""
        if not _is_frozen(self):
            return super().convolve(input, weight)
        convolved: Tensor = _FrozenConvolution.apply(input, weight, self.bias, *self.settings)
        return convolved


# Exactly these classes: a subclass may compute something else.
_FROZEN_CLASSES: dict[type, type] = {
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
    FoldedConv3d: FrozenFoldedConv3d,
}


def _is_frozen(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    return not convolution.weight.requires_grad and (convolution.bias is None or not convolution.bias.requires_grad)


def _convolve(convolution: nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    convolved: Tensor = _FrozenConvolution.apply(inputs, convolution.weight, convolution.bias, *settings)
    return convolved


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with a gradient for its input only; the backward pass needs the weight and the input's shape."""

    @staticmethod
    def forward(
        inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
    ) -> Tensor:
        convolve = nn.functional.conv2d if weight.ndim == 4 else nn.functional.conv3d
        return convolve(inputs, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, weight, _, *ctx.settings = inputs
        ctx.shape, ctx.layout = images.shape, suggest_memory_format(images)
        ctx.save_for_backward(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if ctx.layout == torch.contiguous_format:
            input_gradient = conv2d_input if weight.ndim == 4 else conv3d_input
            return input_gradient(ctx.shape, weight, gradient, *ctx.settings), *(None,) * 6
        # cuDNN takes the layout from the input, whose values it does not read; with that of torch.nn.grad, which has no
        # layout, it would copy the gradient to the contiguous layout and back
        images = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout)
        stride, padding, dilation, groups = ctx.settings
        no_output_padding, only_input = (0,) * (weight.ndim - 2), (True, False, False)
        found = torch.ops.aten.convolution_backward(
            gradient, images, weight, None, stride, padding, dilation, False, no_output_padding, groups, only_input
        )
        return found[0], *(None,) * 6
