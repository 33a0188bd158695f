"""Kernels of path L's backward: rows of output times gradient, and the pass over blocks of keys."""

import triton
import triton.language as tl

from dreamdance_kernels.triton_kernels.split_width import (
    add_weighted,
    atomic_add_head,
    dot_heads,
    load_head,
    store_head,
    zero_head,
)

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_inner", "num_heads", "num_queries"])
def output_dot_gradient(
    output: tl.tensor, output_outer: tl.tensor, output_inner: tl.tensor, output_row: tl.tensor,
    grad_output: tl.tensor, grad_output_outer: tl.tensor, grad_output_inner: tl.tensor, grad_output_row: tl.tensor,
    delta: tl.tensor,
    num_inner: tl.tensor, num_heads: tl.tensor, num_queries: tl.tensor,
    head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_queries: tl.constexpr, mask_queries: tl.constexpr, wide_rows: tl.constexpr,
) -> None:  # fmt: skip
    """A block of rows of one head."""
    num_blocks = tl.cdiv(num_queries, block_queries)
    start = (tl.program_id(0) % num_blocks) * block_queries
    head = tl.program_id(0) // num_blocks % num_heads
    sample = tl.program_id(0) // num_blocks // num_heads
    outer, inner, column = (sample // num_inner).to(tl.int64), (sample % num_inner).to(tl.int64), head * head_width
    output += outer * output_outer + inner * output_inner + start.to(tl.int64) * output_row + column
    grad_output += outer * grad_output_outer + inner * grad_output_inner + start.to(tl.int64) * grad_output_row + column
    left = num_queries - start
    first, second = load_head(
        output, output_row, left, block_queries, first_width, second_width, head_width, mask_queries, wide_rows
    )
    first_grad, second_grad = load_head(
        grad_output, grad_output_row, left, block_queries, first_width, second_width, head_width,
        mask_queries, wide_rows,
    )  # fmt: skip
    products = tl.sum(first.to(tl.float32) * first_grad.to(tl.float32), 1)
    if second_width:
        products += tl.sum(second.to(tl.float32) * second_grad.to(tl.float32), 1)
    rows = start + tl.arange(0, block_queries)
    tl.store(delta + (sample * num_heads + head).to(tl.int64) * num_queries + rows, products, rows < num_queries)


@triton.jit(do_not_specialize=["num_outer", "num_inner", "num_heads", "num_queries", "num_keys", "num_shared"])
def long_backward(
    query: tl.tensor, query_outer: tl.tensor, query_inner: tl.tensor, query_row: tl.tensor,
    key: tl.tensor, key_outer: tl.tensor, key_inner: tl.tensor, key_row: tl.tensor,
    value: tl.tensor, value_outer: tl.tensor, value_inner: tl.tensor, value_row: tl.tensor,
    shared_key: tl.tensor, shared_key_outer: tl.tensor, shared_key_row: tl.tensor,
    shared_value: tl.tensor, shared_value_outer: tl.tensor, shared_value_row: tl.tensor,
    grad_output: tl.tensor, grad_output_outer: tl.tensor, grad_output_inner: tl.tensor, grad_output_row: tl.tensor,
    log_sum_exp: tl.tensor, delta: tl.tensor,
    num_outer: tl.tensor, num_inner: tl.tensor, num_heads: tl.tensor,
    num_queries: tl.tensor, num_keys: tl.tensor, num_shared: tl.tensor,
    query_sums: tl.tensor, query_sums_outer: tl.tensor, query_sums_inner: tl.tensor, query_sums_row: tl.tensor,
    grad_key: tl.tensor, grad_key_outer: tl.tensor, grad_key_inner: tl.tensor, grad_key_row: tl.tensor,
    grad_value: tl.tensor, grad_value_outer: tl.tensor, grad_value_inner: tl.tensor, grad_value_row: tl.tensor,
    grad_shared_key: tl.tensor, grad_shared_key_outer: tl.tensor, grad_shared_key_row: tl.tensor,
    grad_shared_value: tl.tensor, grad_shared_value_outer: tl.tensor, grad_shared_value_row: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr, two_segments: tl.constexpr,
    mask_queries: tl.constexpr, mask_keys: tl.constexpr, mask_shared: tl.constexpr, wide_rows: tl.constexpr,
    add_query_gradient: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of a block of keys of one head, from all queries of its sample or, if shared, of all its samples."""
    program, num_samples, is_shared = tl.program_id(0), 1, False
    if two_segments:  # programs of shared keys have the most work and start first
        num_shared_programs = tl.cdiv(num_shared, block_keys) * num_heads * num_outer
        is_shared = program < num_shared_programs
        program = tl.where(is_shared, program, program - num_shared_programs)
        num_keys = tl.where(is_shared, num_shared, num_keys)
        num_samples = tl.where(is_shared, num_inner, 1)
    num_blocks = tl.cdiv(num_keys, block_keys)
    start = (program % num_blocks) * block_keys
    head = program // num_blocks % num_heads
    sample = program // num_blocks // num_heads
    outer, inner, column = (sample // num_inner).to(tl.int64), (sample % num_inner).to(tl.int64), head * head_width
    if two_segments:
        outer, inner = tl.where(is_shared, sample.to(tl.int64), outer), tl.where(is_shared, 0, inner)
    key += outer * key_outer + inner * key_inner
    value += outer * value_outer + inner * value_inner
    grad_key += outer * grad_key_outer + inner * grad_key_inner
    grad_value += outer * grad_value_outer + inner * grad_value_inner
    if two_segments:
        key = tl.where(is_shared, shared_key + outer * shared_key_outer, key)
        key_row = tl.where(is_shared, shared_key_row, key_row)
        value = tl.where(is_shared, shared_value + outer * shared_value_outer, value)
        value_row = tl.where(is_shared, shared_value_row, value_row)
        grad_key = tl.where(is_shared, grad_shared_key + outer * grad_shared_key_outer, grad_key)
        grad_key_row = tl.where(is_shared, grad_shared_key_row, grad_key_row)
        grad_value = tl.where(is_shared, grad_shared_value + outer * grad_shared_value_outer, grad_value)
        grad_value_row = tl.where(is_shared, grad_shared_value_row, grad_value_row)
    first_key_grad, second_key_grad, first_value_grad, second_value_grad = _pass_over_queries(
        query + outer * query_outer + column, query_inner, query_row,
        key + start.to(tl.int64) * key_row + column, key_row,
        value + start.to(tl.int64) * value_row + column, value_row,
        grad_output + outer * grad_output_outer + column, grad_output_inner, grad_output_row,
        query_sums + outer * query_sums_outer + column, query_sums_inner, query_sums_row,
        log_sum_exp + (outer * num_inner * num_heads + head) * num_queries,
        delta + (outer * num_inner * num_heads + head) * num_queries,
        inner, num_samples, num_heads, num_queries, num_keys - start,
        scale, head_width, first_width, second_width, block_queries, block_keys,
        mask_queries, mask_keys or mask_shared, wide_rows, add_query_gradient,
    )  # fmt: skip
    grad_key += start.to(tl.int64) * grad_key_row + column
    grad_value += start.to(tl.int64) * grad_value_row + column
    store_head(
        grad_key, first_key_grad * scale, second_key_grad * scale, grad_key_row, num_keys - start, block_keys,
        first_width, second_width, head_width,
    )  # fmt: skip
    store_head(
        grad_value, first_value_grad, second_value_grad, grad_value_row, num_keys - start, block_keys,
        first_width, second_width, head_width,
    )  # fmt: skip


@triton.jit
def _pass_over_queries(
    query: tl.tensor, query_inner: tl.tensor, query_row: tl.tensor,
    key: tl.tensor, key_row: tl.tensor, value: tl.tensor, value_row: tl.tensor,
    grad_output: tl.tensor, grad_output_inner: tl.tensor, grad_output_row: tl.tensor,
    query_sums: tl.tensor, query_sums_inner: tl.tensor, query_sums_row: tl.tensor,
    log_sum_exp: tl.tensor, delta: tl.tensor,
    first_sample: tl.tensor, num_samples: tl.tensor, num_heads: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor,
    scale: tl.constexpr, head_width: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
    mask_queries: tl.constexpr, mask_keys: tl.constexpr, wide_rows: tl.constexpr, add_query_gradient: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Both parts of the gradients of a block of keys (still unscaled) and of values.

    Scores have a row for each key, so that weights and their gradients are the first factor of a product, in registers.
    """
    first_key, second_key = load_head(
        key, key_row, num_keys, block_keys, first_width, second_width, head_width, mask_keys, wide_rows
    )
    first_value, second_value = load_head(
        value, value_row, num_keys, block_keys, first_width, second_width, head_width, mask_keys, wide_rows
    )
    first_key_grad, second_key_grad = zero_head(block_keys, first_width, second_width)
    first_value_grad, second_value_grad = zero_head(block_keys, first_width, second_width)
    num_blocks = tl.cdiv(num_queries, block_queries)
    for step in tl.range(num_samples * num_blocks, disable_licm=True):
        sample, start = tl.cast(first_sample + step // num_blocks, tl.int64), step % num_blocks * block_queries
        left, row = num_queries - start, tl.cast(start, tl.int64)
        first_query, second_query = load_head(
            query + sample * query_inner + row * query_row, query_row, left, block_queries,
            first_width, second_width, head_width, mask_queries, wide_rows,
        )  # fmt: skip
        first_grad, second_grad = load_head(
            grad_output + sample * grad_output_inner + row * grad_output_row, grad_output_row, left, block_queries,
            first_width, second_width, head_width, mask_queries, wide_rows,
        )  # fmt: skip
        rows = sample * num_heads * num_queries + row + tl.arange(0, block_queries)
        if mask_queries:  # an infinite denominator gives a weight of zero
            log_sums = tl.load(log_sum_exp + rows, tl.arange(0, block_queries) < left, other=float("inf"))
            deltas = tl.load(delta + rows, tl.arange(0, block_queries) < left, other=0.0)
        else:
            log_sums, deltas = tl.load(log_sum_exp + rows), tl.load(delta + rows)
        scores = dot_heads(first_key, second_key, first_query, second_query, second_width)
        weights = tl.exp2(scores * (scale * _LOG2_E) - (log_sums * _LOG2_E)[None, :])
        first_value_grad, second_value_grad = add_weighted(
            weights, first_grad, second_grad, first_value_grad, second_value_grad, second_width
        )
        weight_grads = dot_heads(first_value, second_value, first_grad, second_grad, second_width)
        score_grads = weights * (weight_grads - deltas[None, :])
        first_key_grad, second_key_grad = add_weighted(
            score_grads, first_query, second_query, first_key_grad, second_key_grad, second_width
        )
        if add_query_gradient:
            if mask_keys:  # beyond the last key: the keys are zero, but the weights may be infinite
                score_grads = tl.where(tl.arange(0, block_keys)[:, None] < num_keys, score_grads, 0.0)
            first_sum, second_sum = zero_head(block_queries, first_width, second_width)
            first_sum, second_sum = add_weighted(
                tl.trans(score_grads.to(first_key.dtype)), first_key, second_key, first_sum, second_sum, second_width
            )
            atomic_add_head(
                query_sums + sample * query_sums_inner + row * query_sums_row, first_sum, second_sum, query_sums_row,
                left, block_queries, first_width, second_width, head_width, mask_queries, wide_rows,
            )  # fmt: skip
    return first_key_grad, second_key_grad, first_value_grad, second_value_grad
