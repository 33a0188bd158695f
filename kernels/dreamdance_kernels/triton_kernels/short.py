"""Path S: attention over sequences of at most 32, such as one place of a video over its frames; many fit one tile.

A tile holds whole places, so its square of scores is block diagonal: a row attends to the rows of its own place. One
program computes all heads of its places and reads the inputs in place (a packed projection, frames outermost). The
backward computes the weights again in registers. The forward saves nothing for it, there are no atomics, and the same
inputs give the same bits. A value that is not finite may spread to the other places of its tile.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from dreamdance_kernels.triton_kernels.builds import KernelBuild
from dreamdance_kernels.triton_kernels.gradients import Gradients
from dreamdance_kernels.triton_kernels.long_launch import (
    Lengths,
    TileTable,
    check_operands,
    tensor_arguments,
    tile_from,
)
from dreamdance_kernels.triton_kernels.short_kernels import backward_kernel, forward_kernel
from dreamdance_kernels.triton_kernels.split_width import split_width
from dreamdance_kernels.triton_kernels.tiles import Tile, architecture_of

MAX_LENGTH = 32

# Tiles by the largest width of a split head; block_keys is block_queries, because the scores of a tile are a square.
# Chosen by ptxas's report: no spills at 16 and 24 frames, two stages where the registers suffice, and on sm_90 the 64
# rows of a wgmma. Their speed against other tiles is not measured.
_FORWARD_TILES = {
    (8, 0): {96: Tile(32, 32, 2, 2), 160: Tile(32, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    (9, 0): {192: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},
}
_BACKWARD_TILES = {
    (8, 0): {80: Tile(32, 32, 2, 2), 192: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
    (9, 0): {96: Tile(64, 64, 4, 2), 192: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
# Full float32 products use no matrix unit: they serve for checks, not for speed. A tile holds the longest sequence.
FLOAT32_TILE = Tile(block_queries=MAX_LENGTH, block_keys=MAX_LENGTH, num_warps=8, num_stages=1)


def forward(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
    """Self-attention of each sequence.

    Args:
        query: `b i l c`, c = heads*d: b clips, i places, l <= 32 frames; any strides with a unit last one, such as
            `rearrange(chunk_of_packed_projection, "(b f) n c -> b n f c", ...)`.
        key: as `query`.
        value: as `query`.
        num_heads: heads; any d up to 256.

    Returns:
        `b i l c`, dense in the order of the query's axes; for the view above it is contiguous as `(b f) n c`.

    Raises:
        ValueError: the kernel does not support the length, the head width, a dtype or a stride.
    """
    _check(num_heads, query=query, key=key, value=value)
    output = torch.empty_like(query)
    _launch(forward_kernel, _FORWARD_TILES, num_heads, query=query, key=key, value=value, output=output)
    return output


def backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Gradients:
    """The gradient of each input of `forward`, dense in the order of the input's axes; arguments as in `forward`.

    Raises:
        ValueError: the kernel does not support the length, the head width, a dtype or a stride.
    """
    _check(num_heads, query=query, key=key, value=value, grad_output=grad_output)
    gradients = Gradients(*(torch.empty_like(x) for x in (query, key, value)))
    _launch(
        backward_kernel,
        _BACKWARD_TILES,
        num_heads,
        query=query,
        key=key,
        value=value,
        grad_output=grad_output,
        grad_query=gradients.query,
        grad_key=gradients.key,
        grad_value=gradients.value,
    )
    return gradients


def builds(architecture: tuple[int, int]) -> list[KernelBuild]:
    """Every variant that the models launch in bfloat16: 16 and 24 frames, each head width, aligned strides."""
    kernels = (("forward", forward_kernel, _FORWARD_TILES), ("backward", backward_kernel, _BACKWARD_TILES))
    return [
        _build(kernel, architecture, f"short_{name}_d{head_width}_{length}_frames", head_width, length, tiles)
        for name, kernel, tiles in kernels
        for head_width in (40, 64, 80, 160)
        for length in (16, 24)
    ]


def _build(
    kernel: Any, architecture: tuple[int, int], name: str, head_width: int, length: int, tiles: TileTable
) -> KernelBuild:
    tile = tile_from(tiles, head_width, architecture)
    constants = _constants(head_width, length, tile)
    run_time = set(kernel.arg_names) - set(constants)
    counts = {"num_places", "num_heads"}
    strides = {argument for argument in run_time if argument.endswith(("_outer", "_inner", "_row"))}
    pointers = run_time - counts - strides
    return KernelBuild(
        name=name,
        function=kernel,
        architecture=architecture,
        signature=dict.fromkeys(pointers, "*bf16") | dict.fromkeys(strides | counts, "i32"),
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=frozenset(pointers | strides),
    )


def _check(num_heads: int, **tensors: Tensor) -> None:
    """Refuse inputs that the kernels cannot read correctly."""
    shape, dtype = tensors["query"].shape, tensors["query"].dtype
    if len(shape) != 4 or not 1 <= shape[2] <= MAX_LENGTH:
        raise ValueError(f"query has shape {tuple(shape)}; path S takes (b, i, l, c) with l in 1...{MAX_LENGTH}")
    if num_heads < 1 or shape[3] % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {shape[3]}")
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; it must be as query, {tuple(shape)} of {dtype}"
            )
    check_operands(Lengths(shape[2], shape[2]), **tensors)


def _constants(head_width: int, length: int, tile: Tile) -> dict[str, int]:
    split = split_width(head_width)
    return {
        "head_width": head_width,
        "first_width": split.first,
        "second_width": split.second,
        "length": length,
        "block_rows": tile.block_queries,
    }


def _launch(kernel: Any, tiles: TileTable, num_heads: int, *, query: Tensor, **tensors: Tensor) -> None:
    """Run a kernel on all places, with all programs on the grid's first axis, because the other two end at 65,535."""
    num_clips, num_places, length, width = query.shape
    head_width = width // num_heads
    if query.dtype == torch.float32:
        tile = FLOAT32_TILE
    else:
        tile = tile_from(tiles, head_width, architecture_of(query.device))
    num_programs = num_clips * triton.cdiv(num_places, tile.block_queries // length)
    if num_programs == 0:
        return
    with torch.cuda.device_of(query):
        kernel[(num_programs,)](
            **tensor_arguments(query=query, **tensors),
            num_places=num_places,
            num_heads=num_heads,
            **_constants(head_width, length, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
