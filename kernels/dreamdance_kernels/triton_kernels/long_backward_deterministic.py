"""Path L, backward: a separate pass for the query gradient, one block of queries per program.

The deterministic form runs it over all keys, the fast form over a shared segment whose own gradient nobody needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamdance_kernels.triton_kernels.builds import KernelBuild
from dreamdance_kernels.triton_kernels.long_launch import (
    FLOAT32_TILE,
    BackwardProblem,
    launch,
    model_builds,
    tensor_arguments,
    tile_from,
)
from dreamdance_kernels.triton_kernels.split_width import add_weighted, dot_heads, load_head, store_head, zero_head
from dreamdance_kernels.triton_kernels.tiles import Tile, architecture_of

# Tiles by architecture, then by the width of both parts of a head together.
TILES = {
    (8, 0): {
        48: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        64: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        80: Tile(block_queries=128, block_keys=32, num_warps=8, num_stages=2),
        160: Tile(block_queries=64, block_keys=32, num_warps=8, num_stages=2),
        256: Tile(block_queries=64, block_keys=16, num_warps=8, num_stages=1),
    },
    (9, 0): {
        48: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        64: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        80: Tile(block_queries=128, block_keys=64, num_warps=8, num_stages=2),
        160: Tile(block_queries=128, block_keys=32, num_warps=8, num_stages=2),
        256: Tile(block_queries=64, block_keys=32, num_warps=8, num_stages=1),
    },
}
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def query_gradient(problem: BackwardProblem, *, tile: Tile | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of the queries, `(b, i, l, heads*d)`, in their order of dimensions; `dtype` None takes theirs."""
    query, lengths = problem.query, problem.lengths
    tile = tile or tile_for(problem.head_width, architecture_of(query.device), dtype=query.dtype)
    grad_query = torch.empty_like(query, dtype=dtype)
    launch(
        long_backward_queries,
        problem.arguments() | tensor_arguments(grad_query=grad_query),
        lengths=lengths,
        num_programs=query.shape[0]
        * query.shape[1]
        * problem.num_heads
        * triton.cdiv(lengths.queries, tile.block_queries),
        head_width=problem.head_width,
        tile=tile,
    )
    return grad_query


def tile_for(head_width: int, architecture: tuple[int, int], *, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The tile of the pass over the queries for a head width and an architecture."""
    return FLOAT32_TILE if dtype == torch.float32 else tile_from(TILES, head_width, architecture)


def builds(architecture: tuple[int, int]) -> list[KernelBuild]:
    """Every variant of this pass that the models launch; `long_backward.builds` lists the first pass."""
    float32 = frozenset({"log_sum_exp", "delta"})
    name = "long_backward_deterministic_queries"
    found = model_builds(long_backward_queries, architecture, name=name, tiles=TILES, float32=float32)
    # The fast form's part of a shared segment without gradient is one segment.
    name, float32 = "long_backward_shared_queries", float32 | {"grad_query"}
    of_shared = model_builds(long_backward_queries, architecture, name=name, tiles=TILES, float32=float32)
    return found + [build for build in of_shared if not build.constants["two_segments"]]


@triton.jit(do_not_specialize=["num_outer", "num_inner", "num_heads", "num_queries", "num_keys", "num_shared"])
def long_backward_queries(
    query: tl.tensor, query_outer: tl.tensor, query_inner: tl.tensor, query_row: tl.tensor,
    key: tl.tensor, key_outer: tl.tensor, key_inner: tl.tensor, key_row: tl.tensor,
    value: tl.tensor, value_outer: tl.tensor, value_inner: tl.tensor, value_row: tl.tensor,
    shared_key: tl.tensor, shared_key_outer: tl.tensor, shared_key_row: tl.tensor,
    shared_value: tl.tensor, shared_value_outer: tl.tensor, shared_value_row: tl.tensor,
    grad_output: tl.tensor, grad_output_outer: tl.tensor, grad_output_inner: tl.tensor, grad_output_row: tl.tensor,
    log_sum_exp: tl.tensor, delta: tl.tensor,
    num_outer: tl.tensor, num_inner: tl.tensor, num_heads: tl.tensor,
    num_queries: tl.tensor, num_keys: tl.tensor, num_shared: tl.tensor,
    grad_query: tl.tensor, grad_query_outer: tl.tensor, grad_query_inner: tl.tensor, grad_query_row: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr, two_segments: tl.constexpr,
    mask_queries: tl.constexpr, mask_keys: tl.constexpr, mask_shared: tl.constexpr, wide_rows: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a block of queries of one head: first from its own keys, then from the shared keys."""
    num_blocks = tl.cdiv(num_queries, block_queries)
    start = (tl.program_id(0) % num_blocks) * block_queries
    head = tl.program_id(0) // num_blocks % num_heads
    sample = tl.program_id(0) // num_blocks // num_heads
    outer, inner, column = (sample // num_inner).to(tl.int64), (sample % num_inner).to(tl.int64), head * head_width
    left, row = num_queries - start, start.to(tl.int64)
    query += outer * query_outer + inner * query_inner + row * query_row + column
    grad_output += outer * grad_output_outer + inner * grad_output_inner + row * grad_output_row + column
    first_query, second_query = load_head(
        query, query_row, left, block_queries, first_width, second_width, head_width, mask_queries, wide_rows
    )
    first_grad, second_grad = load_head(
        grad_output, grad_output_row, left, block_queries, first_width, second_width, head_width,
        mask_queries, wide_rows,
    )  # fmt: skip
    rows = start + tl.arange(0, block_queries)
    statistics = (sample * num_heads + head).to(tl.int64) * num_queries
    log_sums = tl.load(log_sum_exp + statistics + rows, rows < num_queries, other=float("inf")) * _LOG2_E
    deltas = tl.load(delta + statistics + rows, rows < num_queries, other=0.0)
    first, second = zero_head(block_queries, first_width, second_width)
    first, second = _pass_over_keys(
        first, second, first_query, second_query, first_grad, second_grad, log_sums, deltas,
        key + outer * key_outer + inner * key_inner + column, key_row,
        value + outer * value_outer + inner * value_inner + column, value_row, num_keys,
        scale, head_width, first_width, second_width, block_keys, mask_keys, wide_rows,
    )  # fmt: skip
    if two_segments:
        first, second = _pass_over_keys(
            first, second, first_query, second_query, first_grad, second_grad, log_sums, deltas,
            shared_key + outer * shared_key_outer + column, shared_key_row,
            shared_value + outer * shared_value_outer + column, shared_value_row, num_shared,
            scale, head_width, first_width, second_width, block_keys, mask_shared, wide_rows,
        )  # fmt: skip
    grad_query += outer * grad_query_outer + inner * grad_query_inner + row * grad_query_row + column
    store_head(
        grad_query, first * scale, second * scale, grad_query_row, left, block_queries,
        first_width, second_width, head_width,
    )  # fmt: skip


@triton.jit
def _pass_over_keys(
    first: tl.tensor, second: tl.tensor, first_query: tl.tensor, second_query: tl.tensor,
    first_grad: tl.tensor, second_grad: tl.tensor, log_sums: tl.tensor, deltas: tl.tensor,
    key: tl.tensor, key_row: tl.tensor, value: tl.tensor, value_row: tl.tensor, num_keys: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_keys: tl.constexpr, mask_keys: tl.constexpr, wide_rows: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add a segment's part to the gradient of a block of queries, still without the scale."""
    for start in range(0, num_keys, block_keys):
        left, row = num_keys - start, tl.cast(start, tl.int64)
        first_key, second_key = load_head(
            key + row * key_row, key_row, left, block_keys, first_width, second_width, head_width,
            mask_keys, wide_rows,
        )  # fmt: skip
        first_value, second_value = load_head(
            value + row * value_row, value_row, left, block_keys, first_width, second_width, head_width,
            mask_keys, wide_rows,
        )  # fmt: skip
        scores = dot_heads(first_query, second_query, first_key, second_key, second_width)
        weights = tl.exp2(scores * (scale * _LOG2_E) - log_sums[:, None])
        weight_grads = dot_heads(first_grad, second_grad, first_value, second_value, second_width)
        score_grads = weights * (weight_grads - deltas[:, None])
        if mask_keys:  # columns beyond the last key: keys of zero, but weights that may be infinite
            score_grads = tl.where(tl.arange(0, block_keys)[None, :] < left, score_grads, 0.0)
        first, second = add_weighted(score_grads, first_key, second_key, first, second, second_width)
    return first, second
