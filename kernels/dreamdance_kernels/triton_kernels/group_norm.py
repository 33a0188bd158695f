"""Group normalisation, affine, optionally SiLU, of channels_last tensors: one pass for statistics, one to normalise.

The positions (h * w) are cut into splits. A program reads some positions of some channels and writes partial sums; a
small kernel combines them. There are no atomics, and the order of every sum depends on the shape alone, not on the
device's number of cores.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dreamdance_kernels.triton_kernels import group_norm_kernels as kernels
from dreamdance_kernels.triton_kernels.builds import KernelBuild

BLOCK_POSITIONS = 32
MAX_BLOCK_CHANNELS = 64  # a row of 64 channels is a whole 128-byte line in half precision
SPLIT_POSITIONS = 128  # so partial sums take at most 1/16 of the bytes of a bfloat16 input
MAX_SPLITS = 64  # rows in one tile of the combining kernels; larger inputs get longer splits
MODEL_GROUP_SIZES = (10, 20, 40)
NUM_WARPS = 4


@dataclass(frozen=True)
class Normalised:
    """Output `n c h w`, channels_last, in the input's dtype; mean and reciprocal deviation `n groups`, float32."""

    output: Tensor
    mean: Tensor
    reciprocal_deviation: Tensor


@dataclass(frozen=True)
class NormGradients:
    """The gradient of each input, in its shape, dtype and layout."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Grid:
    """How an input is cut into programs; `positions_per_split` is a multiple of the block."""

    samples: int
    positions: int
    channels: int
    splits: int
    positions_per_split: int
    block_channels: int

    @property
    def channel_blocks(self) -> int:
        return _ceil_divide(self.channels, self.block_channels)

    @property
    def position_blocks(self) -> int:
        return _ceil_divide(self.positions, BLOCK_POSITIONS)


def forward(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float, activation: bool
) -> Normalised:
    """Normalise every group of channels of every sample, scale and shift each channel, and apply SiLU if `activation`.

    Args:
        hidden_states: `n c h w`, dense channels_last, not empty; float32, float16 or bfloat16.
        weight: `c`, contiguous.
        bias: as `weight`.
        num_groups: divides c.
        eps: added to the variance.
        activation: whether to apply SiLU.

    Raises:
        ValueError: `hidden_states` is not channels_last.
    """
    grid = _cut(hidden_states)
    group_size = grid.channels // num_groups
    partial_mean = _float32(hidden_states, grid.samples, grid.splits, grid.channels)
    partial_square = torch.empty_like(partial_mean)
    mean = _float32(hidden_states, grid.samples, num_groups)
    reciprocal_deviation = torch.empty_like(mean)
    output = torch.empty_like(hidden_states)
    with torch.cuda.device_of(hidden_states):
        kernels.sum_statistics[(grid.samples * grid.splits * grid.channel_blocks,)](
            hidden_states, partial_mean, partial_square,
            grid.positions, grid.channels, grid.splits, grid.positions_per_split,
            block_positions=BLOCK_POSITIONS, block_channels=grid.block_channels, num_warps=NUM_WARPS,
        )  # fmt: skip
        kernels.combine_statistics[(grid.samples * num_groups,)](
            partial_mean, partial_square, mean, reciprocal_deviation,
            grid.positions, grid.channels, num_groups, grid.splits, grid.positions_per_split, eps,
            group_size=group_size, max_splits=MAX_SPLITS, block_channels=_group_block(group_size), num_warps=NUM_WARPS,
        )  # fmt: skip
        kernels.normalise[(grid.samples * grid.position_blocks * grid.channel_blocks,)](
            hidden_states, mean, reciprocal_deviation, weight, bias, output,
            grid.positions, grid.channels, num_groups,
            group_size=group_size, activation=activation,
            block_positions=BLOCK_POSITIONS, block_channels=grid.block_channels, num_warps=NUM_WARPS,
        )  # fmt: skip
    return Normalised(output, mean, reciprocal_deviation)


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    mean: Tensor,
    reciprocal_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: bool,
) -> NormGradients:
    """The gradients of `forward`, which computes the normalised values again from the input and its statistics.

    Args:
        grad_output: `n c h w`, dense channels_last.
        hidden_states: as in `forward`.
        mean: `n groups`, as `forward` returned it.
        reciprocal_deviation: as `mean`.
        weight: as in `forward`.
        bias: as in `forward`.
        activation: as in `forward`.

    Raises:
        ValueError: `hidden_states` or `grad_output` is not channels_last.
    """
    grid = _cut(hidden_states)
    _cut(grad_output)
    num_groups = mean.shape[1]
    group_size = grid.channels // num_groups
    partial_sums = _float32(hidden_states, 2, grid.samples, grid.splits, grid.channels)
    channel_sums = _float32(hidden_states, 2, grid.samples, grid.channels)
    group_means = _float32(hidden_states, 2, grid.samples, num_groups)
    grad_hidden_states = torch.empty_like(hidden_states)
    with torch.cuda.device_of(hidden_states):
        kernels.sum_gradients[(grid.samples * grid.splits * grid.channel_blocks,)](
            grad_output, hidden_states, mean, reciprocal_deviation, weight, bias, partial_sums[0], partial_sums[1],
            grid.positions, grid.channels, num_groups, grid.splits, grid.positions_per_split,
            group_size=group_size, activation=activation,
            block_positions=BLOCK_POSITIONS, block_channels=grid.block_channels, num_warps=NUM_WARPS,
        )  # fmt: skip
        kernels.combine_gradients[(grid.samples * num_groups,)](
            partial_sums[0], partial_sums[1], weight,
            channel_sums[0], channel_sums[1], group_means[0], group_means[1],
            grid.positions, grid.channels, num_groups, grid.splits,
            group_size=group_size, max_splits=MAX_SPLITS, block_channels=_group_block(group_size), num_warps=NUM_WARPS,
        )  # fmt: skip
        kernels.differentiate[(grid.samples * grid.position_blocks * grid.channel_blocks,)](
            grad_output, hidden_states, mean, reciprocal_deviation, weight, bias, group_means[0], group_means[1],
            grad_hidden_states, grid.positions, grid.channels, num_groups,
            group_size=group_size, activation=activation,
            block_positions=BLOCK_POSITIONS, block_channels=grid.block_channels, num_warps=NUM_WARPS,
        )  # fmt: skip
    grad_bias, grad_weight = (
        sums.sum(dim=0) for sums in channel_sums
    )  # separate tensors: an operator's results must not share memory
    return NormGradients(grad_hidden_states, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))


def builds(architecture: tuple[int, int]) -> list[KernelBuild]:
    """Every variant that the launchers call for the UNets' group sizes in bfloat16; the tile is the same everywhere."""
    half, single, integer = "*bf16", "*fp32", "i32"
    counts = {"positions": integer, "channels": integer}
    per_group = {"mean": single, "reciprocal_deviation": single, "weight": half, "bias": half}
    split = {"splits": integer, "positions_per_split": integer}
    rows = {"block_positions": BLOCK_POSITIONS, "block_channels": MAX_BLOCK_CHANNELS}
    statistics = {"hidden_states": half, "partial_mean": single, "partial_square": single, **counts, **split}
    found = [_build("norm_sum_statistics", kernels.sum_statistics, architecture, statistics, rows)]
    for group_size in MODEL_GROUP_SIZES:
        combine = {"group_size": group_size, "max_splits": MAX_SPLITS, "block_channels": _group_block(group_size)}
        arguments = {"partial_mean": single, "partial_square": single, "mean": single, "reciprocal_deviation": single}
        arguments |= {**counts, "num_groups": integer, **split, "eps": "fp32"}
        found.append(_build("norm_combine_statistics", kernels.combine_statistics, architecture, arguments, combine))
        names = ("partial_bias", "partial_weight", "weight", "sum_bias", "sum_weight", "mean_gradient", "mean_product")
        arguments = {name: half if name == "weight" else single for name in names}
        arguments |= {**counts, "num_groups": integer, "splits": integer}
        found.append(_build("norm_combine_gradients", kernels.combine_gradients, architecture, arguments, combine))
        apply = {"group_size": group_size, "activation": True, **rows}
        arguments = {"hidden_states": half, **per_group, "output": half, **counts, "num_groups": integer}
        found.append(_build("norm_normalise", kernels.normalise, architecture, arguments, apply))
        both = {"grad_output": half, "hidden_states": half, **per_group}
        arguments = {**both, "partial_bias": single, "partial_weight": single, **counts, "num_groups": integer, **split}
        found.append(_build("norm_sum_gradients", kernels.sum_gradients, architecture, arguments, apply))
        arguments = {**both, "mean_gradient": single, "mean_product": single, "grad_hidden_states": half}
        arguments |= {**counts, "num_groups": integer}
        found.append(_build("norm_differentiate", kernels.differentiate, architecture, arguments, apply))
    return found


def _build(
    name: str, function: Any, architecture: tuple[int, int], signature: dict[str, str], constants: dict[str, Any]
) -> KernelBuild:
    group_size = constants.get("group_size")
    return KernelBuild(
        name=name if group_size is None else f"{name}_d{group_size}",
        function=function,
        architecture=architecture,
        signature=signature,
        constants=constants,
        num_warps=NUM_WARPS,
        num_stages=3,
        divisible_by_16=frozenset(key for key, kind in signature.items() if kind.startswith("*") or key == "channels"),
    )


def _cut(hidden_states: Tensor) -> _Grid:
    if hidden_states.dim() != 4 or not hidden_states.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"the kernel needs a dense channels_last (n, c, h, w); got {tuple(hidden_states.shape)} "
            f"with strides {hidden_states.stride()}"
        )
    samples, channels, height, width = hidden_states.shape
    positions = height * width
    fewest = _ceil_divide(_ceil_divide(positions, MAX_SPLITS), BLOCK_POSITIONS) * BLOCK_POSITIONS
    length = max(SPLIT_POSITIONS, fewest)
    return _Grid(
        samples=samples,
        positions=positions,
        channels=channels,
        splits=_ceil_divide(positions, length),
        positions_per_split=length,
        block_channels=min(MAX_BLOCK_CHANNELS, triton.next_power_of_2(channels)),
    )


def _group_block(group_size: int) -> int:
    """The number of a group's channels that a combining kernel holds at a time."""
    return min(MAX_BLOCK_CHANNELS, int(triton.next_power_of_2(group_size)))


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
