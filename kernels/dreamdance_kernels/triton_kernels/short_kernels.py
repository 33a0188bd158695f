"""The kernels of path S: one program computes all heads of the few places in its tile.

`split_width` splits a head into parts of `first_width` and `second_width` (0: none) columns. Strides are named after
their tensor: `query_outer` (clips), `query_inner` (places), `query_row` (frames).
"""

import triton
import triton.language as tl


@triton.jit
def _inside(exists: tl.tensor, start: tl.constexpr, width: tl.constexpr, head_width: tl.constexpr) -> tl.tensor:
    """The mask of a part of the head; it tests columns only if the head does not fill the part."""
    inside = exists[:, None]
    if start + width > head_width:
        inside = inside & (start + tl.arange(0, width) < head_width)[None, :]
    return inside


@triton.jit
def _load(
    rows: tl.tensor, exists: tl.tensor, start: tl.constexpr, width: tl.constexpr, head_width: tl.constexpr
) -> tl.tensor:
    """Load columns `start` to `start + width` of a head; zero for rows that do not exist and beyond the head."""
    columns = start + tl.arange(0, width)
    return tl.load(rows[:, None] + columns[None, :], mask=_inside(exists, start, width, head_width), other=0.0)


@triton.jit
def _store(
    rows: tl.tensor,
    exists: tl.tensor,
    part: tl.tensor,
    start: tl.constexpr,
    width: tl.constexpr,
    head_width: tl.constexpr,
) -> None:
    """Write the elements that `_load` would read, in the dtype of the pointers."""
    columns = start + tl.arange(0, width)
    part = part.to(rows.dtype.element_ty)
    tl.store(rows[:, None] + columns[None, :], part, mask=_inside(exists, start, width, head_width))


@triton.jit
def _dot(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """left @ right, summed in float32; float32 inputs are not rounded to TF32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _weights(scores: tl.tensor, own: tl.tensor, head_width: tl.constexpr) -> tl.tensor:
    """exp(scaled scores - the row's largest), not normalised, for rows of the same place; zero for others."""
    log2_e_scale: tl.constexpr = 1.4426950408889634 * head_width**-0.5
    scores = tl.where(own, scores, -float("inf"))
    return tl.exp2((scores - tl.max(scores, 1)[:, None]) * log2_e_scale)


@triton.jit
def _inverse_sum(weights: tl.tensor) -> tl.tensor:
    """1 / sum of each row, correctly rounded, so that with one frame the output equals the value bit for bit."""
    return tl.div_rn(1.0, tl.sum(weights, 1))


@triton.jit
def _row_pointers(
    tensor: tl.tensor,
    clip: tl.tensor,
    place: tl.tensor,
    frame: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    row: tl.tensor,
) -> tl.tensor:
    """A pointer to each row; clip, place and frame are 64-bit, because offsets may exceed 2^31 elements."""
    return tensor + (clip * outer + place * inner + frame * row)


@triton.jit
def _tile(num_places: tl.tensor, length: tl.constexpr, block_rows: tl.constexpr) -> tl.tuple:
    """This program's clip and, for each row of its tile, the place, the frame and whether the row exists."""
    places: tl.constexpr = block_rows // length
    num_tiles = tl.cdiv(num_places, places)
    row = tl.arange(0, block_rows)
    place = (tl.program_id(0) % num_tiles).to(tl.int64) * places + row // length
    exists = (row < places * length) & (place < num_places)
    return (tl.program_id(0) // num_tiles).to(tl.int64), place, (row % length).to(tl.int64), exists


@triton.jit
def _own_rows(length: tl.constexpr, block_rows: tl.constexpr) -> tl.tensor:
    """The rows to which each row attends. The unused rows at a tile's end attend to each other, so no row has none."""
    place = tl.arange(0, block_rows) // length
    return place[:, None] == place[None, :]


@triton.jit(do_not_specialize=["num_places", "num_heads"])
def forward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    output: tl.tensor,
    query_outer: tl.tensor,
    query_inner: tl.tensor,
    query_row: tl.tensor,
    key_outer: tl.tensor,
    key_inner: tl.tensor,
    key_row: tl.tensor,
    value_outer: tl.tensor,
    value_inner: tl.tensor,
    value_row: tl.tensor,
    output_outer: tl.tensor,
    output_inner: tl.tensor,
    output_row: tl.tensor,
    num_places: tl.tensor,
    num_heads: tl.tensor,
    head_width: tl.constexpr,
    first_width: tl.constexpr,
    second_width: tl.constexpr,
    length: tl.constexpr,
    block_rows: tl.constexpr,
) -> None:
    """Compute the output of the places of one tile."""
    clip, place, frame, exists = _tile(num_places, length, block_rows)
    query = _row_pointers(query, clip, place, frame, query_outer, query_inner, query_row)
    key = _row_pointers(key, clip, place, frame, key_outer, key_inner, key_row)
    value = _row_pointers(value, clip, place, frame, value_outer, value_inner, value_row)
    output = _row_pointers(output, clip, place, frame, output_outer, output_inner, output_row)
    own = _own_rows(length, block_rows)

    for head in range(num_heads):
        start = head * head_width
        q1 = _load(query + start, exists, 0, first_width, head_width)
        k1 = _load(key + start, exists, 0, first_width, head_width)
        v1 = _load(value + start, exists, 0, first_width, head_width)
        scores = _dot(q1, tl.trans(k1))
        if second_width > 0:
            q2 = _load(query + start, exists, first_width, second_width, head_width)
            k2 = _load(key + start, exists, first_width, second_width, head_width)
            v2 = _load(value + start, exists, first_width, second_width, head_width)
            scores += _dot(q2, tl.trans(k2))

        weights = _weights(scores, own, head_width)
        inverse_sum = _inverse_sum(weights)[:, None]
        weights = weights.to(v1.dtype)
        _store(output + start, exists, _dot(weights, v1) * inverse_sum, 0, first_width, head_width)
        if second_width > 0:
            _store(output + start, exists, _dot(weights, v2) * inverse_sum, first_width, second_width, head_width)


@triton.jit(do_not_specialize=["num_places", "num_heads"])
def backward_kernel(
    grad_output: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    grad_query: tl.tensor,
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    grad_output_outer: tl.tensor,
    grad_output_inner: tl.tensor,
    grad_output_row: tl.tensor,
    query_outer: tl.tensor,
    query_inner: tl.tensor,
    query_row: tl.tensor,
    key_outer: tl.tensor,
    key_inner: tl.tensor,
    key_row: tl.tensor,
    value_outer: tl.tensor,
    value_inner: tl.tensor,
    value_row: tl.tensor,
    grad_query_outer: tl.tensor,
    grad_query_inner: tl.tensor,
    grad_query_row: tl.tensor,
    grad_key_outer: tl.tensor,
    grad_key_inner: tl.tensor,
    grad_key_row: tl.tensor,
    grad_value_outer: tl.tensor,
    grad_value_inner: tl.tensor,
    grad_value_row: tl.tensor,
    num_places: tl.tensor,
    num_heads: tl.tensor,
    head_width: tl.constexpr,
    first_width: tl.constexpr,
    second_width: tl.constexpr,
    length: tl.constexpr,
    block_rows: tl.constexpr,
) -> None:
    """Compute the gradients of the places of one tile, from the inputs alone."""
    clip, place, frame, exists = _tile(num_places, length, block_rows)
    grad_output = _row_pointers(grad_output, clip, place, frame, grad_output_outer, grad_output_inner, grad_output_row)
    query = _row_pointers(query, clip, place, frame, query_outer, query_inner, query_row)
    key = _row_pointers(key, clip, place, frame, key_outer, key_inner, key_row)
    value = _row_pointers(value, clip, place, frame, value_outer, value_inner, value_row)
    grad_query = _row_pointers(grad_query, clip, place, frame, grad_query_outer, grad_query_inner, grad_query_row)
    grad_key = _row_pointers(grad_key, clip, place, frame, grad_key_outer, grad_key_inner, grad_key_row)
    grad_value = _row_pointers(grad_value, clip, place, frame, grad_value_outer, grad_value_inner, grad_value_row)
    own = _own_rows(length, block_rows)
    scale: tl.constexpr = head_width**-0.5

    for head in range(num_heads):
        start = head * head_width
        q1 = _load(query + start, exists, 0, first_width, head_width)
        k1 = _load(key + start, exists, 0, first_width, head_width)
        v1 = _load(value + start, exists, 0, first_width, head_width)
        g1 = _load(grad_output + start, exists, 0, first_width, head_width)
        scores = _dot(q1, tl.trans(k1))
        grad_weights = _dot(g1, tl.trans(v1))
        if second_width > 0:
            q2 = _load(query + start, exists, first_width, second_width, head_width)
            k2 = _load(key + start, exists, first_width, second_width, head_width)
            v2 = _load(value + start, exists, first_width, second_width, head_width)
            g2 = _load(grad_output + start, exists, first_width, second_width, head_width)
            scores += _dot(q2, tl.trans(k2))
            grad_weights += _dot(g2, tl.trans(v2))

        weights = _weights(scores, own, head_width)
        weights *= _inverse_sum(weights)[:, None]
        # Softmax's backward subtracts a sum that the weights give; the forward's output is not needed.
        grad_scores = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None])
        weights, grad_scores = tl.trans(weights.to(v1.dtype)), grad_scores.to(v1.dtype)
        _store(grad_value + start, exists, _dot(weights, g1), 0, first_width, head_width)
        _store(grad_query + start, exists, _dot(grad_scores, k1) * scale, 0, first_width, head_width)
        _store(grad_key + start, exists, _dot(tl.trans(grad_scores), q1) * scale, 0, first_width, head_width)
        if second_width > 0:
            _store(grad_value + start, exists, _dot(weights, g2), first_width, second_width, head_width)
            _store(grad_query + start, exists, _dot(grad_scores, k2) * scale, first_width, second_width, head_width)
            _store(
                grad_key + start, exists, _dot(tl.trans(grad_scores), q2) * scale, first_width, second_width, head_width
            )
