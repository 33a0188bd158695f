"""Path L, backward: gradients of own and of shared keys in one pass, with one program for each block of keys.

Fast form: the pass also adds each block's part of the query gradient to float32 sums, in the order in which the
programs happen to run. Deterministic form: a second pass, `long_backward_deterministic`, computes the query gradient.
In both forms one program adds up the gradient of a block of shared keys, sample after sample. If nobody needs that
gradient, the pass leaves the shared segment out, and its part of the query gradient comes from the second pass.
"""

import torch
import triton
from torch import Tensor

from dreamdance_kernels.triton_kernels import long_backward_deterministic
from dreamdance_kernels.triton_kernels.builds import KernelBuild
from dreamdance_kernels.triton_kernels.gradients import Gradients
from dreamdance_kernels.triton_kernels.long_backward_kernels import long_backward, output_dot_gradient
from dreamdance_kernels.triton_kernels.long_launch import (
    FLOAT32_TILE,
    BackwardProblem,
    Lengths,
    check_operands,
    launch,
    lengths_of,
    model_builds,
    tensor_arguments,
    tile_from,
)
from dreamdance_kernels.triton_kernels.tiles import Tile, architecture_of

# Tiles by architecture, then by the width of both parts of a head together.
TILES = {
    (8, 0): {
        48: Tile(block_queries=32, block_keys=128, num_warps=8, num_stages=2),
        64: Tile(block_queries=32, block_keys=128, num_warps=8, num_stages=2),
        80: Tile(block_queries=64, block_keys=128, num_warps=8, num_stages=3),
        160: Tile(block_queries=16, block_keys=64, num_warps=8, num_stages=2),
        256: Tile(block_queries=16, block_keys=64, num_warps=8, num_stages=1),
    },
    (9, 0): {
        48: Tile(block_queries=64, block_keys=128, num_warps=8, num_stages=2),
        64: Tile(block_queries=64, block_keys=128, num_warps=8, num_stages=2),
        80: Tile(block_queries=64, block_keys=128, num_warps=8, num_stages=2),
        160: Tile(block_queries=64, block_keys=64, num_warps=8, num_stages=2),
        256: Tile(block_queries=32, block_keys=64, num_warps=8, num_stages=1),
    },
}
_ROWS_TILE = Tile(block_queries=64, block_keys=1, num_warps=4, num_stages=1)
_ROWS_TILES = {architecture: dict.fromkeys(tiles, _ROWS_TILE) for architecture, tiles in TILES.items()}


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    num_heads: int,
    deterministic: bool,
    needs_shared: bool = True,
    tile: Tile | None = None,
) -> Gradients:
    """The gradient of each input of the forward.

    Args:
        grad_output: `(b, i, l, heads*d)`, gradient of the forward's output; any strides but for a last one of 1.
        query: as in the forward; likewise key, value, shared_key and shared_value.
        key: see query.
        value: see query.
        shared_key: see query.
        shared_value: see query.
        output: the forward's output.
        log_sum_exp: as the forward returned it.
        num_heads: as in the forward.
        deterministic: give the same bits each time, with seven matrix products instead of five.
        needs_shared: compute the gradients of the shared segment, which nobody needs if it comes from a frozen network.
        tile: a tile to use instead of the table's, for both passes.

    Returns:
        Each gradient, dense, in its input's dtype, shape and order of dimensions; None for a shared segment that does
        not exist or needs none.

    Raises:
        ValueError: as in the forward.
    """
    writes_shared = needs_shared and shared_key is not None
    if shared_key is None or shared_value is None:
        shared_key = shared_value = query.new_empty((query.shape[0], 0, query.shape[-1]))
    lengths = lengths_of(query, key, shared_key)
    check_operands(lengths, query=query, key=key, value=value, grad_output=grad_output, output=output)
    check_operands(lengths, shared_key=shared_key, shared_value=shared_value)
    delta = _output_dot_gradient(output, grad_output, num_heads=num_heads)
    problem = BackwardProblem(query, key, value, shared_key, shared_value, grad_output, log_sum_exp, delta, num_heads)
    with_gradient = problem if writes_shared else problem.of_own_keys()
    if deterministic:
        grads = _key_gradients(with_gradient, query_sums=None, tile=tile)
        grad_query = long_backward_deterministic.query_gradient(problem, tile=tile)
    else:
        query_sums = torch.zeros_like(query, dtype=torch.float32)
        grads = _key_gradients(with_gradient, query_sums=query_sums, tile=tile)
        grad_query = torch.empty_like(query)
        if writes_shared or lengths.shared == 0:
            torch.mul(query_sums, problem.head_width**-0.5, out=grad_query)
        else:
            from_shared = long_backward_deterministic.query_gradient(
                problem.of_shared_keys(), tile=tile, dtype=torch.float32
            )
            torch.add(from_shared, query_sums, alpha=problem.head_width**-0.5, out=grad_query)
    return Gradients(
        query=grad_query,
        key=grads["grad_key"],
        value=grads["grad_value"],
        shared_key=grads["grad_shared_key"] if writes_shared else None,
        shared_value=grads["grad_shared_value"] if writes_shared else None,
    )


def tile_for(head_width: int, architecture: tuple[int, int], *, dtype: torch.dtype = torch.bfloat16) -> Tile:
    """The tile of the pass over the keys for a head width and an architecture."""
    return FLOAT32_TILE if dtype == torch.float32 else tile_from(TILES, head_width, architecture)


def builds(architecture: tuple[int, int]) -> list[KernelBuild]:
    """Every variant that the models launch: the fast pass, the deterministic form's first pass, and the row sums."""
    statistics = frozenset({"log_sum_exp", "delta", "query_sums"})
    forms = {"long_backward": True, "long_backward_deterministic_keys": False}
    found = model_builds(
        output_dot_gradient, architecture, name="output_dot_gradient", tiles=_ROWS_TILES, float32=statistics
    )
    for name, add_query_gradient in forms.items():
        found += model_builds(
            long_backward,
            architecture,
            name=name,
            tiles=TILES,
            float32=statistics,
            add_query_gradient=add_query_gradient,
        )
    return found


def _output_dot_gradient(output: Tensor, grad_output: Tensor, *, num_heads: int) -> Tensor:
    """Sum over d of the output times its gradient, `(b, i, heads, l)` in float32; softmax's backward subtracts it."""
    num_outer, num_inner, num_rows, width = output.shape
    delta = output.new_empty((num_outer, num_inner, num_heads, num_rows), dtype=torch.float32)
    arguments = tensor_arguments(output=output, grad_output=grad_output) | {
        "delta": delta,
        "num_inner": num_inner,
        "num_heads": num_heads,
        "num_queries": num_rows,
    }
    num_programs = num_outer * num_inner * num_heads * triton.cdiv(num_rows, _ROWS_TILE.block_queries)
    launch(
        output_dot_gradient,
        arguments,
        lengths=Lengths(num_rows, 0),
        num_programs=num_programs,
        head_width=width // num_heads,
        tile=_ROWS_TILE,
    )
    return delta


def _key_gradients(problem: BackwardProblem, *, query_sums: Tensor | None, tile: Tile | None) -> dict[str, Tensor]:
    """Gradients of own and shared keys and values; adds the query's, still unscaled, to `query_sums` if not None."""
    tile = tile or tile_for(problem.head_width, architecture_of(problem.query.device), dtype=problem.query.dtype)
    grads = {
        "grad_key": torch.empty_like(problem.key),
        "grad_value": torch.empty_like(problem.value),
        "grad_shared_key": torch.empty_like(problem.shared_key),
        "grad_shared_value": torch.empty_like(problem.shared_value),
    }
    not_written = problem.query
    arguments = tensor_arguments(query_sums=not_written if query_sums is None else query_sums, **grads)
    num_outer, num_inner = problem.query.shape[:2]
    num_own_blocks = num_inner * triton.cdiv(problem.lengths.keys, tile.block_keys)
    num_shared_blocks = triton.cdiv(problem.lengths.shared, tile.block_keys)
    launch(
        long_backward,
        problem.arguments() | arguments,
        lengths=problem.lengths,
        num_programs=num_outer * problem.num_heads * (num_own_blocks + num_shared_blocks),
        head_width=problem.head_width,
        tile=tile,
        add_query_gradient=query_sums is not None,
    )
    return grads
