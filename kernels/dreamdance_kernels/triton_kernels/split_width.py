"""Head widths that are no power of two, held as two parts that are: 40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32.

Triton's tiles have powers of two as sides and its matrix products are at least 16 deep. One tile of the next power of
two would spend up to half of them on zeros (40 in 64, 80 in 128); two parts waste at most the end of the second.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

MAX_HEAD_WIDTH = 256
_MIN_PART = 16


@dataclass(frozen=True)
class SplitWidth:
    """Columns of a head in the first and in the second part, both powers of two; a second of 0 is not there.

    Columns beyond the head's width are read as zero and not written.
    """

    first: int
    second: int


def split_width(head_width: int) -> SplitWidth:
    """The largest power of two in the width and, padded to a power of two of at least 16, what is left of it.

    Raises:
        ValueError: the width is not in 1...256.
    """
    if not 1 <= head_width <= MAX_HEAD_WIDTH:
        raise ValueError(f"head width {head_width} is not in 1...{MAX_HEAD_WIDTH}; change num_heads or the width")
    first = 1 << (head_width.bit_length() - 1)
    rest = head_width - first
    if first < _MIN_PART:
        return SplitWidth(_MIN_PART, 0)
    return SplitWidth(first, max(_MIN_PART, triton.next_power_of_2(rest)) if rest else 0)


@triton.jit
def load_part(
    pointer: tl.tensor,
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    block_rows: tl.constexpr,
    first_column: tl.constexpr,
    width: tl.constexpr,
    head_width: tl.constexpr,
    mask_rows: tl.constexpr,
    wide_rows: tl.constexpr,
) -> tl.tensor:
    """`(block_rows, width)` of one head from the row that `pointer` stands at; zero beyond `num_rows` and the head.

    Offsets are taken from the block's first row, so that 32 bits hold them; `wide_rows` where even these pass 2^31.
    """
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
def store_part(
    pointer: tl.tensor,
    part: tl.tensor,
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    block_rows: tl.constexpr,
    first_column: tl.constexpr,
    width: tl.constexpr,
    head_width: tl.constexpr,
) -> None:
    """Write what `load_part` reads, in the pointer's dtype, and nothing beyond `num_rows` and the head."""
    rows = tl.arange(0, block_rows)
    columns = first_column + tl.arange(0, width)
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < head_width)[None, :]
    tl.store(pointer + offsets, part.to(pointer.dtype.element_ty), mask)
