"""Convolutions that keep their input only for a weight that trains.

torch's linear layers do so by themselves; its convolutions keep their input whatever is frozen, which in a frozen UNet
on the gradient's path is about a third of all activations. Knows nothing of which network trains.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.grad import conv2d_input, conv3d_input


def replace_convolutions(network: nn.Module) -> None:
    """Puts lean convolutions in the place of plain ones, on the same parameters, under the same names."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Conv3d) and _can_be_lean(child):
                lean_class = LeanConv2d if isinstance(child, nn.Conv2d) else LeanConv3d
                setattr(parent, name, lean_class.sharing(child))


def _can_be_lean(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether it is exactly what a lean convolution computes: no subclass, no padding but with a number of zeros."""
    plain = type(convolution) in (nn.Conv2d, nn.Conv3d)
    return plain and convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


class LeanConv2d(nn.Conv2d):
    """`nn.Conv2d`; while weight and bias are frozen it keeps its weight alone for the backward pass."""

    @classmethod
    def sharing(cls, convolution: nn.Module) -> "LeanConv2d":
        """The lean form of a convolution, on its very parameters."""
        return _share(convolution, cls)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`: `n c h w` to `n c h w`."""
        return _convolve(self, input) if _is_frozen(self) else super().forward(input)


class LeanConv3d(nn.Conv3d):
    """`nn.Conv3d`; while weight and bias are frozen it keeps its weight alone for the backward pass."""

    @classmethod
    def sharing(cls, convolution: nn.Module) -> "LeanConv3d":
        """The lean form of a convolution, on its very parameters."""
        return _share(convolution, cls)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv3d`: `n c f h w` to `n c f h w`."""
        return _convolve(self, input) if _is_frozen(self) else super().forward(input)


def _share(convolution: nn.Module, lean_class: type) -> Any:
    """A `lean_class` with the settings, parameters and mode of `convolution`; allocates nothing."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    settings = {name: getattr(convolution, name) for name in names}
    lean = lean_class(**settings, bias=convolution.bias is not None, device="meta")
    lean.weight, lean.bias = convolution.weight, convolution.bias
    return lean.train(convolution.training)


def _is_frozen(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    return not convolution.weight.requires_grad and (convolution.bias is None or not convolution.bias.requires_grad)


def _convolve(convolution: nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    settings = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return _FrozenConvolution.apply(inputs, convolution.weight, convolution.bias, *settings)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with a gradient for its input only, for which its weight and its input's shape are enough."""

    @staticmethod
    def forward(
        inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, dilation: tuple, groups: int
    ) -> Tensor:
        convolve = nn.functional.conv2d if weight.ndim == 4 else nn.functional.conv3d
        return convolve(inputs, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, weight, _, *ctx.settings = inputs  # type: ignore[attr-defined]
        ctx.shape = images.shape  # type: ignore[attr-defined]
        ctx.save_for_backward(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        input_gradient = conv2d_input if weight.ndim == 4 else conv3d_input
        return input_gradient(ctx.shape, weight, gradient, *ctx.settings), *(None,) * 6
