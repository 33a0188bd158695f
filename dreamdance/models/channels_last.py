"""Networks whose activations lie with their channels innermost, as a GPU's convolutions want them."""

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dreamdance.models.fused_group_norm import fuse_group_norms

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


def use_channels_last(network: nn.Module) -> None:
    """Turn a network to channels_last: its weights, its group norms, what enters its convolutions and residual blocks.

    What lies so stays so through convolutions, sums, attention (`n h w c` to `n (h w) c` is a view then) and fused
    norms. What does not is turned on its way in: sharding flattens weights and forgets how they lay, diffusers makes
    inputs of shortcuts and outputs of SVD's transformers contiguous. Outputs on CPU are the same to rounding.
    Call it before the network is wrapped or compiled.

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


def _turn_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=_LAYOUTS[inputs[0].dim()]), *inputs[1:])
