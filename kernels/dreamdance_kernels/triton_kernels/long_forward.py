"""Path L, forward: one softmax over a sample's own keys and over a segment of keys that samples share.

One program holds a block of queries of one head and passes once over all keys (online softmax). It gets strides and
assumes no layout, so it reads packed projections and permuted views in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamdance_kernels.triton_kernels.builds import KernelBuild
from dreamdance_kernels.triton_kernels.long_launch import (
    FLOAT32_TILE,
    check_operands,
    launch,
    lengths_of,
    model_builds,
    tensor_arguments,
    tile_from,
)
from dreamdance_kernels.triton_kernels.split_width import add_weighted, dot_heads, load_head, store_head, zero_head
from dreamdance_kernels.triton_kernels.tiles import Tile, architecture_of

# Tiles by architecture, then by the width of both parts of a head together.
TILES = {
    (8, 0): {
        48: Tile(block_queries=128, block_keys=64, num_warps=4, num_stages=2),
        64: Tile(block_queries=128, block_keys=64, num_warps=4, num_stages=2),
        80: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        160: Tile(block_queries=128, block_keys=32, num_warps=8, num_stages=2),
        256: Tile(block_queries=64, block_keys=32, num_warps=8, num_stages=2),
    },
    (9, 0): {
        48: Tile(block_queries=128, block_keys=128, num_warps=8, num_stages=2),
        64: Tile(block_queries=128, block_keys=128, num_warps=8, num_stages=2),
        80: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        160: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        256: Tile(block_queries=128, block_keys=32, num_warps=8, num_stages=2),
    },
}
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    *,
    num_heads: int,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample (b, i) attends to its own k keys and to the s keys of its b, in one softmax.

    Args:
        query: `(b, i, l, heads*d)`, float16, bfloat16 or float32, any strides but for a last one of 1.
        key: `(b, i, k, heads*d)`, likewise.
        value: as `key`.
        shared_key: `(b, s, heads*d)`, likewise, or None for no shared segment.
        shared_value: as `shared_key`.
        num_heads: heads; d at most 256.
        tile: a tile to use instead of the table's.

    Returns:
        The output, dense, in query's shape and order of dimensions; and the natural log of the softmax's denominator,
        `(b, i, heads, l)` in float32, which the backward needs.

    Raises:
        ValueError: the kernel does not support a dtype, a stride or the head width, or there are no keys.
    """
    num_outer, num_inner, _, width = query.shape
    head_width = width // num_heads
    if shared_key is None or shared_value is None:
        shared_key = shared_value = query.new_empty((num_outer, 0, width))
    lengths = lengths_of(query, key, shared_key)
    check_operands(lengths, query=query, key=key, value=value, shared_key=shared_key, shared_value=shared_value)
    if tile is None:
        tile = tile_for(head_width, architecture_of(query.device), dtype=query.dtype)
    output = torch.empty_like(query)
    log_sum_exp = query.new_empty((num_outer, num_inner, num_heads, lengths.queries), dtype=torch.float32)
    arguments = tensor_arguments(
        query=query, key=key, value=value, shared_key=shared_key, shared_value=shared_value, output=output
    ) | {
        "log_sum_exp": log_sum_exp,
        "num_inner": num_inner,
        "num_heads": num_heads,
        "num_queries": lengths.queries,
        "num_keys": lengths.keys,
        "num_shared": lengths.shared,
    }
    num_programs = num_outer * num_inner * num_heads * triton.cdiv(lengths.queries, tile.block_queries)
    launch(long_forward, arguments, lengths=lengths, num_programs=num_programs, head_width=head_width, tile=tile)
    return output, log_sum_exp


def tile_for(head_width: int, architecture: tuple[int, int], *, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The tile of the forward for a head width and an architecture."""
    return FLOAT32_TILE if dtype == torch.float32 else tile_from(TILES, head_width, architecture)


def builds(architecture: tuple[int, int]) -> list[KernelBuild]:
    """Every variant of the forward that the models launch."""
    float32 = frozenset({"log_sum_exp"})
    return model_builds(long_forward, architecture, name="long_forward", tiles=TILES, float32=float32)


@triton.jit(do_not_specialize=["num_inner", "num_heads", "num_queries", "num_keys", "num_shared"])
def long_forward(
    query: tl.tensor, query_outer: tl.tensor, query_inner: tl.tensor, query_row: tl.tensor,
    key: tl.tensor, key_outer: tl.tensor, key_inner: tl.tensor, key_row: tl.tensor,
    value: tl.tensor, value_outer: tl.tensor, value_inner: tl.tensor, value_row: tl.tensor,
    shared_key: tl.tensor, shared_key_outer: tl.tensor, shared_key_row: tl.tensor,
    shared_value: tl.tensor, shared_value_outer: tl.tensor, shared_value_row: tl.tensor,
    output: tl.tensor, output_outer: tl.tensor, output_inner: tl.tensor, output_row: tl.tensor,
    log_sum_exp: tl.tensor,
    num_inner: tl.tensor, num_heads: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, num_shared: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr, two_segments: tl.constexpr,
    mask_queries: tl.constexpr, mask_keys: tl.constexpr, mask_shared: tl.constexpr, wide_rows: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with a block of queries of one head to all keys; programs that share keys are neighbours in the grid."""
    num_blocks = tl.cdiv(num_queries, block_queries)
    start = (tl.program_id(0) % num_blocks) * block_queries
    head = tl.program_id(0) // num_blocks % num_heads
    sample = tl.program_id(0) // num_blocks // num_heads
    outer, inner, column = (sample // num_inner).to(tl.int64), (sample % num_inner).to(tl.int64), head * head_width
    query += outer * query_outer + inner * query_inner + start.to(tl.int64) * query_row + column
    key += outer * key_outer + inner * key_inner + column
    value += outer * value_outer + inner * value_inner + column
    output += outer * output_outer + inner * output_inner + start.to(tl.int64) * output_row + column
    first_query, second_query = load_head(
        query, query_row, num_queries - start, block_queries, first_width, second_width, head_width,
        mask_queries, wide_rows,
    )  # fmt: skip
    first, second = zero_head(block_queries, first_width, second_width)
    row_max = tl.full([block_queries], float("-inf"), tl.float32)
    row_sum = tl.zeros([block_queries], tl.float32)
    first, second, row_max, row_sum = _attend_segment(
        first, second, row_max, row_sum, first_query, second_query, key, key_row, value, value_row, num_keys,
        scale, head_width, first_width, second_width, block_keys, mask_keys, wide_rows,
    )  # fmt: skip
    if two_segments:
        first, second, row_max, row_sum = _attend_segment(
            first, second, row_max, row_sum, first_query, second_query,
            shared_key + outer * shared_key_outer + column, shared_key_row,
            shared_value + outer * shared_value_outer + column, shared_value_row, num_shared,
            scale, head_width, first_width, second_width, block_keys, mask_shared, wide_rows,
        )  # fmt: skip
    first, second = first / row_sum[:, None], second / row_sum[:, None]
    store_head(
        output, first, second, output_row, num_queries - start, block_queries, first_width, second_width, head_width
    )
    rows = start + tl.arange(0, block_queries)
    log_sum_exp += (sample * num_heads + head).to(tl.int64) * num_queries
    tl.store(log_sum_exp + rows, row_max * _LN_2 + tl.log(row_sum), rows < num_queries)


@triton.jit
def _attend_segment(
    first: tl.tensor, second: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor,
    first_query: tl.tensor, second_query: tl.tensor,
    key: tl.tensor, key_row: tl.tensor, value: tl.tensor, value_row: tl.tensor, num_keys: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_keys: tl.constexpr, mask_keys: tl.constexpr, wide_rows: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add a segment's keys to the running sums, maxima (in base 2) and denominators of a block of queries."""
    for start in range(0, num_keys, block_keys):
        left, start = num_keys - start, tl.cast(start, tl.int64)
        first_key, second_key = load_head(
            key + start * key_row, key_row, left, block_keys, first_width, second_width, head_width,
            mask_keys, wide_rows,
        )  # fmt: skip
        first_value, second_value = load_head(
            value + start * value_row, value_row, left, block_keys, first_width, second_width, head_width,
            mask_keys, wide_rows,
        )  # fmt: skip
        scores = dot_heads(first_query, second_query, first_key, second_key, second_width)
        if mask_keys:
            scores = tl.where(tl.arange(0, block_keys)[None, :] < left, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * _LOG2_E))
        weights = tl.exp2(scores * (scale * _LOG2_E) - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        first, second = add_weighted(
            weights, first_value, second_value, first * correction[:, None], second * correction[:, None], second_width
        )
    return first, second, row_max, row_sum
