"""Splits a head width into two powers of two: 40 = 32 + 16 (8 of them masked), 80 = 64 + 16, 160 = 128 + 32.

The sides of Triton's tiles are powers of two, and its matrix products are at least 16 deep. A single tile of the next
power of two would spend up to half of its work on zeros (40 in 64, 80 in 128); two parts waste only the second's end.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

MAX_HEAD_WIDTH = 256
_MIN_PART = 16


@dataclass(frozen=True)
class SplitWidth:
    """Columns of a head in its first and second part, both powers of two; 0 in the second means a single part.

    Columns beyond the head's width are read as zero and never written.
    """

    first: int
    second: int


def split_width(head_width: int) -> SplitWidth:
    """Split a width: the largest power of two in it, and the rest, padded to a power of two of at least 16.

    Raises:
        ValueError: the width is not in 1...256.
    """
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise ValueError(f"head width {head_width} is not in 1...{MAX_HEAD_WIDTH}; change num_heads or the width")
    first = 1 << (head_width.bit_length() - 1)
    rest = head_width - first
    if first < _MIN_PART:
        return SplitWidth(_MIN_PART, 0)
    return SplitWidth(first, max(_MIN_PART, int(triton.next_power_of_2(rest))) if rest else 0)


@triton.jit
def load_head(
    pointer: tl.tensor, row_stride: tl.tensor, num_rows: tl.tensor, block_rows: tl.constexpr,
    first_width: tl.constexpr, second_width: tl.constexpr, head_width: tl.constexpr,
    mask_rows: tl.constexpr, wide_rows: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Load both parts of `block_rows` rows of a head, from the row at `pointer`; rows beyond `num_rows` are zero.

    Offsets count from the block's first row, so that 32 bits hold them; `wide_rows`: even these exceed 2^31.
    Without a second part the first is returned in its place, and is not used.
    """
    first = _load_part(pointer, row_stride, num_rows, block_rows, 0, first_width, head_width, mask_rows, wide_rows)
    second = first
    if second_width:
        second = _load_part(
            pointer, row_stride, num_rows, block_rows, first_width, second_width, head_width, mask_rows, wide_rows
        )
    return first, second


@triton.jit
def _load_part(
    pointer: tl.tensor, row_stride: tl.tensor, num_rows: tl.tensor, block_rows: tl.constexpr,
    first_column: tl.constexpr, width: tl.constexpr, head_width: tl.constexpr,
    mask_rows: tl.constexpr, wide_rows: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    rows = tl.arange(0, block_rows)
    columns = first_column + tl.arange(0, width)
    offsets = (rows.to(tl.int64) if wide_rows else rows)[:, None] * row_stride + columns[None, :]
    if mask_rows:
        if first_column + width > head_width:
            part = tl.load(pointer + offsets, (rows < num_rows)[:, None] & (columns < head_width)[None, :], other=0.0)
        else:
            part = tl.load(pointer + offsets, (rows < num_rows)[:, None], other=0.0)
    elif first_column + width > head_width:
        part = tl.load(pointer + offsets, (columns < head_width)[None, :], other=0.0)
    else:
        part = tl.load(pointer + offsets)
    return part


@triton.jit
def zero_head(block_rows: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr) -> tl.tuple:
    """Both parts of a block of float32 sums, zero."""
    first = tl.zeros([block_rows, first_width], tl.float32)
    second = tl.zeros([block_rows, second_width if second_width else 1], tl.float32)
    return first, second


@triton.jit
def dot_heads(
    first: tl.tensor, second: tl.tensor, other_first: tl.tensor, other_second: tl.tensor, second_width: tl.constexpr
) -> tl.tensor:
    """Products of all rows of one head block with all rows of another, `(rows, other rows)` in float32."""
    products = tl.dot(first, tl.trans(other_first), input_precision="ieee")
    if second_width:
        products = tl.dot(second, tl.trans(other_second), products, input_precision="ieee")
    return products


@triton.jit
def add_weighted(
    weights: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    first_sum: tl.tensor,
    second_sum: tl.tensor,
    second_width: tl.constexpr,
) -> tl.tuple:
    """Add `weights`, `(sum rows, rows)`, times the rows of a head block to both parts of the sums."""
    weights = weights.to(first.dtype)
    first_sum = tl.dot(weights, first, first_sum, input_precision="ieee")
    if second_width:
        second_sum = tl.dot(weights, second, second_sum, input_precision="ieee")
    return first_sum, second_sum


@triton.jit
def store_head(
    pointer: tl.tensor, first: tl.tensor, second: tl.tensor, row_stride: tl.tensor, num_rows: tl.tensor,
    block_rows: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr, head_width: tl.constexpr,
) -> None:  # fmt: skip
    """Write both parts in the pointer's dtype; write nothing beyond `num_rows` or beyond the head."""
    rows = tl.arange(0, block_rows)
    pointers = pointer + rows.to(tl.int64)[:, None] * row_stride
    columns = tl.arange(0, first_width)[None, :]
    mask = (rows < num_rows)[:, None]
    tl.store(pointers + columns, first.to(pointer.dtype.element_ty), mask & (columns < head_width))
    if second_width:
        columns = first_width + tl.arange(0, second_width)[None, :]
        tl.store(pointers + columns, second.to(pointer.dtype.element_ty), mask & (columns < head_width))


@triton.jit
def atomic_add_head(
    pointer: tl.tensor, first: tl.tensor, second: tl.tensor, row_stride: tl.tensor, num_rows: tl.tensor,
    block_rows: tl.constexpr, first_width: tl.constexpr, second_width: tl.constexpr, head_width: tl.constexpr,
    mask_rows: tl.constexpr, wide_rows: tl.constexpr,
) -> None:  # fmt: skip
    """Add both parts atomically to float32 sums, to which other programs add too."""
    _atomic_add_part(pointer, first, row_stride, num_rows, block_rows, 0, first_width, head_width, mask_rows, wide_rows)
    if second_width:
        _atomic_add_part(
            pointer, second, row_stride, num_rows, block_rows, first_width, second_width, head_width,
            mask_rows, wide_rows,
        )  # fmt: skip


@triton.jit
def _atomic_add_part(
    pointer: tl.tensor, part: tl.tensor, row_stride: tl.tensor, num_rows: tl.tensor, block_rows: tl.constexpr,
    first_column: tl.constexpr, width: tl.constexpr, head_width: tl.constexpr,
    mask_rows: tl.constexpr, wide_rows: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.arange(0, block_rows)
    columns = first_column + tl.arange(0, width)
    offsets = (rows.to(tl.int64) if wide_rows else rows)[:, None] * row_stride + columns[None, :]
    if mask_rows:
        tl.atomic_add(
            pointer + offsets, part, (rows < num_rows)[:, None] & (columns < head_width)[None, :], sem="relaxed"
        )
    elif first_column + width > head_width:
        tl.atomic_add(pointer + offsets, part, (columns < head_width)[None, :], sem="relaxed")
    else:
        tl.atomic_add(pointer + offsets, part, sem="relaxed")
