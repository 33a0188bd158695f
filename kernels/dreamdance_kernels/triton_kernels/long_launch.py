"""Shared by the launchers of path L: checks, arguments under the kernels' names, tiles by head width, builds.

Kernels name a tensor's strides after it: `query`, `query_outer` (b), `query_inner` (i), `query_row` (l).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from dreamdance_kernels.triton_kernels.builds import KernelBuild
from dreamdance_kernels.triton_kernels.split_width import split_width
from dreamdance_kernels.triton_kernels.tiles import Tile

# Token counts at which the models attend with each head width: one domain's tokens, and three domains' merged.
MODEL_LENGTHS = {40: (1536, 4608), 64: (6144, 18432, 1536, 384, 96), 80: (384, 1152), 160: (96, 288, 24, 72)}
# Full float32 products use no matrix unit and need twice the bytes: they serve for checks, not for speed.
FLOAT32_TILE = Tile(block_queries=16, block_keys=32, num_warps=8, num_stages=1)
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_AXES = {4: ("outer", "inner", "row"), 3: ("outer", "row")}

TileTable = Mapping[tuple[int, int], Mapping[int, Tile]]


@dataclass(frozen=True)
class Lengths:
    """Numbers of rows of one sample: queries, own keys, and shared keys (0: no shared segment)."""

    queries: int
    keys: int
    shared: int = 0


def lengths_of(query: Tensor, key: Tensor, shared_key: Tensor) -> Lengths:
    """Lengths of `(b, i, l, c)` queries, `(b, i, k, c)` keys and `(b, s, c)` shared keys."""
    return Lengths(query.shape[2], key.shape[2], shared_key.shape[1])


def tile_from(table: TileTable, head_width: int, architecture: tuple[int, int]) -> Tile:
    """The table's tile for the narrowest entry that holds this head; newer architectures take the newest entry."""
    split = split_width(head_width)
    entries = table[max((known for known in table if known <= architecture), default=min(table))]
    return entries[min(width for width in entries if width >= split.first + split.second)]


def check_operands(lengths: Lengths, **operands: Tensor) -> None:
    """Refuse inputs that the kernels cannot read correctly.

    Raises:
        ValueError: a tensor has an unsupported dtype or last stride, or there are queries but no keys.
    """
    for name, tensor in operands.items():
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(f"{name} is {tensor.dtype}; the kernels take {', '.join(str(x) for x in FLOAT_TYPES)}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1 (contiguous() makes it so)")
    if lengths.queries and not lengths.keys + lengths.shared:
        raise ValueError(f"{lengths.queries} queries and no key to attend to")


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """Every tensor and all its strides except the last, under the names of the kernels' arguments."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        strides = zip(_AXES[tensor.dim()], tensor.stride(), strict=False)
        arguments |= {f"{name}_{axis}": stride for axis, stride in strides}
    return arguments


def constants_of(kernel: Any, lengths: Lengths, *, head_width: int, tile: Tile, row_stride: int = 0) -> dict[str, Any]:
    """The value of each compile-time argument of the kernel; `row_stride` is the largest stride between two rows."""
    split = split_width(head_width)
    constants = {
        "scale": head_width**-0.5,
        "head_width": head_width,
        "first_width": split.first,
        "second_width": split.second,
        "block_queries": tile.block_queries,
        "block_keys": tile.block_keys,
        "two_segments": lengths.shared > 0,
        "mask_queries": lengths.queries % tile.block_queries > 0,
        "mask_keys": lengths.keys % tile.block_keys > 0,
        "mask_shared": lengths.shared % tile.block_keys > 0,
        "wide_rows": max(tile.block_queries, tile.block_keys) * row_stride >= 2**31,
    }
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


@dataclass(frozen=True)
class BackwardProblem:
    """The tensors that the passes of the backward read.

    These are the forward's inputs (an empty shared segment for none), its log-sum-exp and delta, the sum over d of its
    output times the output's gradient; the last two are `(b, i, heads, l)` in float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor
    shared_value: Tensor
    grad_output: Tensor
    log_sum_exp: Tensor
    delta: Tensor
    num_heads: int

    @property
    def head_width(self) -> int:
        return self.query.shape[-1] // self.num_heads

    @property
    def lengths(self) -> Lengths:
        return lengths_of(self.query, self.key, self.shared_key)

    def of_own_keys(self) -> "BackwardProblem":
        """The same queries without the shared segment."""
        return replace(self, shared_key=self.shared_key[:, :0], shared_value=self.shared_value[:, :0])

    def of_shared_keys(self) -> "BackwardProblem":
        """The same queries with the shared keys alone: as each sample's own, through an expanded view."""
        num_inner = self.query.shape[1]
        key, value = (repeat(x, "b s c -> b i s c", i=num_inner) for x in (self.shared_key, self.shared_value))
        return replace(self.of_own_keys(), key=key, value=value)

    def operands(self) -> dict[str, Tensor]:
        """The tensors in the dtype of the model, by name."""
        names = ("query", "key", "value", "shared_key", "shared_value", "grad_output")
        return {name: getattr(self, name) for name in names}

    def arguments(self) -> dict[str, Any]:
        """The arguments that both passes have in common."""
        return tensor_arguments(**self.operands()) | {
            "log_sum_exp": self.log_sum_exp,
            "delta": self.delta,
            "num_outer": self.query.shape[0],
            "num_inner": self.query.shape[1],
            "num_heads": self.num_heads,
            "num_queries": self.lengths.queries,
            "num_keys": self.lengths.keys,
            "num_shared": self.lengths.shared,
        }


def launch(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    lengths: Lengths,
    num_programs: int,
    head_width: int,
    tile: Tile,
    **constants: bool,
) -> None:
    """Run `num_programs` programs, all on the grid's first axis, because the other two end at 65,535."""
    if num_programs == 0:
        return
    row_stride = max(value for name, value in arguments.items() if name.endswith("_row"))
    constants |= constants_of(kernel, lengths, head_width=head_width, tile=tile, row_stride=row_stride)
    with torch.cuda.device_of(next(iter(arguments.values()))):
        kernel[(num_programs,)](**arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


def model_builds(
    kernel: Any,
    architecture: tuple[int, int],
    *,
    name: str,
    tiles: TileTable,
    float32: frozenset[str],
    **constants: bool,
) -> list[KernelBuild]:
    """Every variant of a kernel that the models launch in bfloat16; `float32` names its float32 tensors."""
    builds: dict[str, KernelBuild] = {}
    for head_width, choices in MODEL_LENGTHS.items():
        tile = tile_from(tiles, head_width, architecture)
        for num_tokens, num_shared in ((count, shared) for count in choices for shared in (0, count)):
            lengths = Lengths(num_tokens, num_tokens, num_shared)
            values = constants | constants_of(kernel, lengths, head_width=head_width, tile=tile)
            build = _build(kernel, architecture, f"{name}_d{head_width}", values, tile=tile, float32=float32)
            builds.setdefault(build.name, build)
    return list(builds.values())


def _build(
    kernel: Any,
    architecture: tuple[int, int],
    name: str,
    constants: Mapping[str, Any],
    *,
    tile: Tile,
    float32: frozenset[str],
) -> KernelBuild:
    if "two_segments" in constants:
        name += "_two_segments" if constants["two_segments"] else "_one_segment"
    masks = [key.removeprefix("mask_") for key, value in constants.items() if key.startswith("mask_") and value]
    run_time = [argument for argument in kernel.arg_names if argument not in constants]
    strides = {argument for argument in run_time if argument.rsplit("_", 1)[-1] in _AXES[4]}
    pointers = {argument for argument in run_time if argument not in strides and not argument.startswith("num_")}
    types = {argument: "*fp32" if argument in float32 else "*bf16" for argument in pointers}
    return KernelBuild(
        name="_".join([name, "ragged", *masks]) if masks else name,
        function=kernel,
        architecture=architecture,
        signature={argument: types.get(argument, "i32") for argument in run_time},
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=frozenset(pointers | strides),
    )
