"""Compiles the repeated blocks of a network by torch.compile (regional compilation): one graph serves equal blocks."""

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from torch import nn

from dreamdance.models.geometry_unet import GeometryTransformerBlock
from dreamdance.models.reference_unet import ReferenceTransformerBlock

# Class -> the method that is compiled. Our blocks' `forward` finds tensors by the block's name, so that no two blocks
# would have one graph; `compute` gets them as arguments.
_COMPILED_METHODS: dict[type[nn.Module], str] = {
    GeometryTransformerBlock: "compute",
    ReferenceTransformerBlock: "compute",
    BasicTransformerBlock: "forward",
    TemporalBasicTransformerBlock: "forward",
    SpatioTemporalResBlock: "forward",
    ResnetBlock2D: "forward",
}
# Graphs of one class: widths times sizes times training and inference. torch's own limit of 8 would end the run.
_MAX_GRAPHS = 256


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> int:
    """Compiles residual and transformer blocks at their first call for each shape; returns the number of blocks.

    Weights and their names stay. What a graph cannot contain raises an error; nothing runs uncompiled silently.

    Args:
        network: a UNet, a ControlNet, a part of one, or a controller, which has no such blocks; changed in place.
        backend: the compiler, as `torch.compile` names it.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    return _compile_children(network, backend)


def _compile_children(module: nn.Module, backend: str) -> int:
    """Compiles the outermost blocks: an inner one becomes part of its block's graph."""
    count = 0
    for child in module.children():
        method = next((name for kind, name in _COMPILED_METHODS.items() if isinstance(child, kind)), None)
        if method is None:
            count += _compile_children(child, backend)
            continue
        compiled = torch.compile(getattr(child, method), backend=backend, fullgraph=True, dynamic=False)
        setattr(child, method, compiled)
        count += 1
    return count
