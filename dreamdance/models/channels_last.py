"""Switches networks to channels_last: activations keep their channels innermost, as fast GPU convolutions need."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dreamdance.models.fused_group_norm import fuse_group_norms

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


def use_channels_last(network: nn.Module) -> None:
    """Switch a network to channels_last: its weights, group norms, and the inputs of convolutions and residual blocks.

    Convolutions, sums, attention (`n h w c` to `n (h w) c` is then a view) and fused norms keep the layout. Hooks
    convert the tensors that lose it: sharding flattens weights, and diffusers makes inputs of shortcuts and outputs of
    SVD's transformers contiguous. Outputs on CPU are equal up to rounding. Call this function before the network is
    wrapped or compiled.

    Args:
        network: a diffusers UNet, a ControlNet or one of this package's networks; changed in place.
    """
    for weight in network.parameters():
        if (layout := _LAYOUTS.get(weight.dim())) is not None:
            weight.data = weight.data.contiguous(memory_format=layout)
    fuse_group_norms(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | ResnetBlock2D):
            module.register_forward_pre_hook(_turn_input)


@contextmanager
def contiguous_weights(network: nn.Module) -> Iterator[None]:
    """In the block every weight is contiguous: DeepSpeed views the weights that it broadcasts as bytes.

    Afterwards frozen weights have their layout again. Those that train keep what the block gave them: ZeRO has made
    them views of flat buffers.
    """
    layouts = {weight: _LAYOUTS[weight.dim()] for weight in network.parameters() if not weight.is_contiguous()}
    for weight in layouts:
        weight.data = weight.data.contiguous()
    yield
    for weight, layout in layouts.items():
        if not weight.requires_grad:
            weight.data = weight.data.contiguous(memory_format=layout)


def _turn_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=_LAYOUTS[inputs[0].dim()]), *inputs[1:])
