"""Path L of the attention operator in Triton's interpreter, against float64 and beside plain torch in the same dtype.

float32 and float16 only: the interpreter multiplies the bit patterns of bfloat16 and would test nothing.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dreamdance_kernels import reference
from dreamdance_kernels.triton_kernels import long_forward
from dreamdance_kernels.triton_kernels.split_width import split_width
from dreamdance_kernels.triton_kernels.tiles import Tile

HEADS = 2
SMALL_TILE = Tile(block_queries=32, block_keys=16, num_warps=4, num_stages=1)  # 63 rows: several blocks, a ragged end
MAX_ERROR_RATIO = 1.1


class Operands(NamedTuple):
    """`(b, i, l, c)` queries, `(b, i, k, c)` keys and values, `(b, s, c)` shared ones or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor | None = None
    shared_value: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Outer and inner batch, rows of queries, of own and of shared keys, head width."""

    outer: int
    inner: int
    queries: int
    keys: int
    shared: int | None
    head_width: int

    def __str__(self) -> str:
        return "-".join(f"{name[0]}{size}" for name, size in self.__dict__.items())


SIZES = [
    Sizes(outer=1, inner=1, queries=1, keys=1, shared=None, head_width=40),
    Sizes(outer=2, inner=1, queries=63, keys=63, shared=None, head_width=64),
    Sizes(outer=1, inner=3, queries=63, keys=63, shared=17, head_width=40),
    Sizes(outer=2, inner=2, queries=17, keys=17, shared=63, head_width=80),
    Sizes(outer=1, inner=2, queries=32, keys=1, shared=32, head_width=160),
    Sizes(outer=1, inner=1, queries=17, keys=63, shared=1, head_width=24),
    Sizes(outer=1, inner=2, queries=17, keys=17, shared=0, head_width=8),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every tensor allocated and not yet written holds NaN, those of the launchers too."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_operands(sizes: Sizes, dtype: torch.dtype) -> Operands:
    """Chunks of packed projections, so that no operand is dense."""
    generator = torch.Generator().manual_seed(1)
    width = HEADS * sizes.head_width

    def projection(*shape: int, parts: int) -> tuple[Tensor, ...]:
        return torch.randn(*shape, parts * width, generator=generator).to(dtype).chunk(parts, dim=-1)

    query = projection(sizes.outer, sizes.inner, sizes.queries, parts=3)[1]
    key_value = projection(sizes.outer, sizes.inner, sizes.keys, parts=2)
    shared = () if sizes.shared is None else projection(sizes.outer, sizes.shared, parts=2)
    return Operands(query, *key_value, *shared)


def plain_attention(operands: Operands) -> Tensor:
    """The backend `reference`, which takes both batch axes as one."""
    own = (rearrange(x, "b i n c -> (b i) n c") for x in (operands.query, operands.key, operands.value))
    shared = operands.shared_key, operands.shared_value
    if operands.shared_key is None:  # samples without a shared segment, said through an empty one
        shared = (operands.key[:, 0, :0], operands.value[:, 0, :0])
    output = reference.reference_attention(*own, *shared, num_heads=HEADS)
    return rearrange(output, "(b i) n c -> b i n c", b=operands.query.shape[0])


def in_float64(operands: Operands) -> Operands:
    return Operands(*(None if x is None else x.double() for x in operands))


def largest(errors: Tensor) -> Tensor:
    return errors.abs().max()


def assert_as_exact_as(plain: Tensor, *, ours: Tensor, exact: Tensor) -> None:
    """At most 1.1 times plain torch's error, in the largest element and in the Frobenius norm."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    for norm in (torch.linalg.vector_norm, largest):
        # With a few keys plain torch may round nothing at all; one rounding of the result is granted in any case.
        granted = torch.finfo(plain.dtype).eps * norm(exact)
        error, plain_error = norm(ours - exact), norm(plain - exact)
        assert error <= max(MAX_ERROR_RATIO * plain_error, granted), f"{error:.3g} beside {plain_error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_is_as_exact_as_plain_torch(sizes, dtype):
    operands = random_operands(sizes, dtype)
    ours = long_forward.forward(*operands, num_heads=HEADS, tile=SMALL_TILE)
    assert_as_exact_as(plain_attention(operands), ours=ours[0], exact=plain_attention(in_float64(operands)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_sum_exp_is_that_of_all_scores_in_natural_units(dtype):
    operands = random_operands(SIZES[2], dtype)
    ours = long_forward.forward(*operands, num_heads=HEADS, tile=SMALL_TILE)[1]
    query, key = (
        rearrange(x.double(), "b i n (heads d) -> b i heads n d", heads=HEADS) for x in (operands.query, operands.key)
    )
    shared = rearrange(operands.shared_key.double(), "b n (heads d) -> b 1 heads n d", heads=HEADS)
    scores = torch.cat([query @ key.mT, query @ shared.mT], dim=-1) * SIZES[2].head_width ** -0.5
    assert (ours - scores.logsumexp(-1)).abs().max() < 2e-6


@pytest.mark.parametrize("num_domains", [1, 2, 3])
def test_domains_of_a_packed_projection_are_merged_without_a_copy(num_domains):
    packed = torch.randn(2 * num_domains, 21, 3 * HEADS * 40, generator=torch.Generator().manual_seed(2)).half()
    query, key, value = packed.chunk(3, dim=-1)
    merged = [rearrange(x, "(b m) n c -> b 1 (m n) c", m=num_domains) for x in (query, key, value)]
    assert all(x.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for x in merged)
    ours = long_forward.forward(*merged, None, None, num_heads=HEADS)[0]
    plain, exact = (
        reference.geometry_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), num_domains=num_domains, num_heads=HEADS
        )
        for dtype in (torch.float16, torch.float64)
    )
    assert_as_exact_as(plain, ours=rearrange(ours, "b 1 (m n) c -> (b m) n c", m=num_domains), exact=exact)


def test_frames_behind_tokens_are_read_and_written_in_place():
    packed = torch.randn(2 * 33, 3, 3 * HEADS * 40, generator=torch.Generator().manual_seed(3)).half()
    query, key, value = packed.chunk(3, dim=-1)
    views = [rearrange(x, "(b f) n c -> b n f c", f=33) for x in (query, key, value)]
    ours = long_forward.forward(*views, None, None, num_heads=HEADS, tile=SMALL_TILE)[0]
    ours = rearrange(ours, "b n f c -> b f n c")
    assert ours.is_contiguous()
    plain, exact = (
        reference.temporal_attention(query.to(dtype), key.to(dtype), value.to(dtype), num_frames=33, num_heads=HEADS)
        for dtype in (torch.float16, torch.float64)
    )
    assert_as_exact_as(plain, ours=rearrange(ours, "b f n c -> (b f) n c"), exact=exact)


def test_the_table_s_tiles_span_several_blocks_too():
    operands = random_operands(Sizes(1, 1, 200, 150, 70, 40), torch.float16)
    ours = long_forward.forward(*operands, num_heads=HEADS)
    assert_as_exact_as(plain_attention(operands), ours=ours[0], exact=plain_attention(in_float64(operands)))


def test_heads_are_split_into_powers_of_two():
    widths = {
        40: (32, 16),
        80: (64, 16),
        160: (128, 32),
        64: (64, 0),
        24: (16, 16),
        8: (16, 0),
        1: (16, 0),
        96: (64, 32),
    }
    assert {width: astuple(split_width(width)) for width in widths} == widths
    with pytest.raises(ValueError, match="head width 257 is not in"):
        split_width(257)


def test_what_the_kernels_would_misread_is_refused():
    operands = random_operands(SIZES[0], torch.float32)
    query, key, value, _, _ = operands
    with pytest.raises(ValueError, match="query has strides"):
        long_forward.forward(torch.zeros(1, 1, 80, 3).mT, key, value, None, None, num_heads=HEADS)
    with pytest.raises(ValueError, match="float64; the kernels take"):
        long_forward.forward(query.double(), key, value, None, None, num_heads=HEADS)
    with pytest.raises(ValueError, match="no key to attend to"):
        long_forward.forward(query, key[:, :, :0], value[:, :, :0], None, None, num_heads=HEADS)
