"""Path L of the attention operator in Triton's interpreter, against float64 and beside plain torch in the same dtype.

float32 and float16 only: the interpreter multiplies the bit patterns of bfloat16 and would test nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from einops import rearrange
from torch import Tensor
from triton.runtime import interpreter

from dreamdance_kernels import reference
from dreamdance_kernels.triton_kernels import long_backward, long_forward
from dreamdance_kernels.triton_kernels.gradients import Gradients
from dreamdance_kernels.triton_kernels.split_width import split_width
from dreamdance_kernels.triton_kernels.tiles import Tile

HEADS = 2
SMALL_TILE = Tile(block_queries=32, block_keys=16, num_warps=4, num_stages=1)  # 63 rows: several blocks, a ragged end
MAX_ERROR_RATIO = 1.1
# The unavoidable error of float32, compared with plain torch in float32, which keeps its weights. Here the weights
# are computed again from the log-sum-exp, which is around 8 and rounded three times (from base 2, saved, to base 2):
# half a unit in the last place is 4 eps of a weight each time. Relative to the exact norm; negligible in float16.
FLOAT32_COST = 12 * torch.finfo(torch.float32).eps


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
    Sizes(outer=3, inner=2, queries=1, keys=1, shared=2, head_width=40),
    Sizes(outer=2, inner=1, queries=63, keys=63, shared=None, head_width=64),
    Sizes(outer=1, inner=3, queries=63, keys=63, shared=17, head_width=40),
    Sizes(outer=2, inner=2, queries=17, keys=17, shared=63, head_width=80),
    Sizes(outer=1, inner=2, queries=32, keys=16, shared=32, head_width=160),  # nothing ragged
    Sizes(outer=1, inner=1, queries=17, keys=63, shared=1, head_width=24),
    Sizes(outer=1, inner=2, queries=17, keys=17, shared=0, head_width=8),
]
# The same; the gradients of the larger ones take seconds in the interpreter.
SIZES_BY_COST = [
    sizes if sizes.queries * sizes.head_width < 1000 else pytest.param(sizes, marks=pytest.mark.slow) for sizes in SIZES
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every newly allocated tensor with NaN, also those of the launchers."""
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
    if operands.shared_key is None:  # samples without a shared segment, given as an empty one
        shared = (operands.key[:, 0, :0], operands.value[:, 0, :0])
    output = reference.reference_attention(*own, *shared, num_heads=HEADS)
    return rearrange(output, "(b i) n c -> b i n c", b=operands.query.shape[0])


def plain_gradients(operands: Operands, grad_output: Tensor) -> list[Tensor]:
    leaves = Operands(*(None if x is None else x.detach().requires_grad_() for x in operands))
    return list(torch.autograd.grad(plain_attention(leaves), [x for x in leaves if x is not None], grad_output))


def our_gradients(
    operands: Operands, grad_output: Tensor, *, deterministic: bool, needs_shared: bool = True
) -> list[Tensor]:
    """The given operands in their order; without the shared ones if they need none."""
    output, log_sum_exp = long_forward.forward(*operands, num_heads=HEADS, tile=SMALL_TILE)
    gradients = long_backward.backward(
        grad_output,
        *operands,
        output,
        log_sum_exp,
        num_heads=HEADS,
        deterministic=deterministic,
        needs_shared=needs_shared,
        tile=SMALL_TILE,
    )
    assert isinstance(gradients, Gradients)
    return [gradient for gradient in vars(gradients).values() if gradient is not None]


def random_gradient(operands: Operands) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(operands.query.shape, generator=generator).to(operands.query.dtype)


def in_float64(operands: Operands) -> Operands:
    return Operands(*(None if x is None else x.double() for x in operands))


def largest(errors: Tensor) -> Tensor:
    return errors.abs().max()


def assert_as_exact_as(plain: Tensor, *, ours: Tensor, exact: Tensor) -> None:
    """Checks that largest element and Frobenius norm of the error are at most 1.1 times those of plain torch."""
    assert ours.dtype == plain.dtype
    assert ours.shape == exact.shape
    # The error of one element is random below the rounding of the result to its dtype.
    granted = {torch.linalg.vector_norm: FLOAT32_COST, largest: max(FLOAT32_COST, torch.finfo(plain.dtype).eps / 2)}
    for norm, share in granted.items():
        error, plain_error = norm(ours - exact), norm(plain - exact)
        accepted = max(MAX_ERROR_RATIO * plain_error, share * norm(exact))
        assert error <= accepted, f"{error:.3g} beside plain torch's {plain_error:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_is_as_exact_as_plain_torch(sizes, dtype):
    operands = random_operands(sizes, dtype)
    ours = long_forward.forward(*operands, num_heads=HEADS, tile=SMALL_TILE)
    assert_as_exact_as(plain_attention(operands), ours=ours[0], exact=plain_attention(in_float64(operands)))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES_BY_COST, ids=str)
def test_every_gradient_is_as_exact_as_plain_torch(sizes, dtype, deterministic):
    operands = random_operands(sizes, dtype)
    grad_output = random_gradient(operands)
    ours = our_gradients(operands, grad_output, deterministic=deterministic)
    plain = plain_gradients(operands, grad_output)
    exact = plain_gradients(in_float64(operands), grad_output.double())
    assert len(ours) == (3 if sizes.shared is None else 5)
    for one, plain_one, exact_one in zip(ours, plain, exact, strict=True):
        if one.numel():
            assert_as_exact_as(plain_one, ours=one, exact=exact_one)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES_BY_COST, ids=str)
def test_without_the_shared_segments_gradient_the_others_stay_the_same(sizes, dtype, deterministic):
    operands = random_operands(sizes, dtype)
    grad_output = random_gradient(operands)
    every = our_gradients(operands, grad_output, deterministic=deterministic)
    ours = our_gradients(operands, grad_output, deterministic=deterministic, needs_shared=False)
    assert len(ours) == 3
    assert all(torch.equal(one, other) for one, other in zip(ours[1:], every[1:3], strict=True))
    if deterministic:
        assert torch.equal(ours[0], every[0])
    else:  # the shared part is added in another order
        exact = plain_gradients(in_float64(operands), grad_output.double())[0]
        assert_as_exact_as(plain_gradients(operands, grad_output)[0], ours=ours[0], exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_program_computes_a_shared_gradient_that_nobody_needs(deterministic, monkeypatch):
    launch, programs = long_backward.launch, {}

    def counting(kernel, *arguments, num_programs, **others):
        programs[kernel.fn.__name__] = num_programs
        launch(kernel, *arguments, num_programs=num_programs, **others)

    monkeypatch.setattr(long_backward, "launch", counting)
    operands = random_operands(Sizes(1, 3, 63, 63, 17, head_width=40), torch.float32)
    found = []
    for needs_shared in (True, False):
        our_gradients(operands, random_gradient(operands), deterministic=deterministic, needs_shared=needs_shared)
        found.append(programs["long_backward"])
    # In each of two heads: four blocks of 16 own keys of each of three samples, and two blocks of shared keys.
    assert found == [HEADS * (3 * 4 + 2), HEADS * 3 * 4]


@pytest.fixture
def reversed_programs(monkeypatch):
    """Runs the last program of every grid first, which a GPU may do."""
    builder = interpreter.interpreter_builder
    in_order = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: in_order(builder.grid_dim[0] - 1 - x, y, z))


def gradients_in_both_orders(request, *, deterministic: bool) -> list[tuple[Tensor, Tensor]]:
    operands = random_operands(Sizes(1, 2, 33, 33, 17, head_width=24), torch.float32)
    grad_output = random_gradient(operands)
    in_order = our_gradients(operands, grad_output, deterministic=deterministic)
    request.getfixturevalue("reversed_programs")
    return list(zip(in_order, our_gradients(operands, grad_output, deterministic=deterministic), strict=True))


@pytest.mark.slow
def test_deterministic_backward_is_the_same_to_the_bit_whichever_program_runs_first(request):
    assert all(torch.equal(one, other) for one, other in gradients_in_both_orders(request, deterministic=True))


def test_fast_backward_leaves_only_the_query_gradient_to_the_order_of_programs(request):
    (query, query_reversed), *others = gradients_in_both_orders(request, deterministic=False)
    assert not torch.equal(query, query_reversed)  # otherwise the test above would prove nothing
    assert all(torch.equal(one, other) for one, other in others)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_key_that_is_alone_gets_all_the_weight(deterministic):
    operands = random_operands(Sizes(outer=1, inner=2, queries=1, keys=1, shared=None, head_width=40), torch.float32)
    grad_output = random_gradient(operands)
    output, _ = long_forward.forward(*operands, num_heads=HEADS, tile=SMALL_TILE)
    assert torch.equal(output, operands.value)
    query, key, value = our_gradients(operands, grad_output, deterministic=deterministic)
    assert torch.equal(value, grad_output)
    # The exact value is zero, the difference of two sums of the same 40 products: the result is their rounding.
    rounding = torch.finfo(torch.float32).eps * (grad_output * operands.value).abs().sum() * 40**-0.5
    assert query.abs().max() <= rounding * operands.key.abs().max()
    assert key.abs().max() <= rounding * operands.query.abs().max()


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
    chunks = packed.chunk(3, dim=-1)
    views = Operands(*(rearrange(x, "(b m) n c -> b 1 (m n) c", m=num_domains) for x in chunks))
    assert_views_are_as_exact_as_plain_torch(
        views,
        chunks,
        back=lambda x: rearrange(x, "b 1 (m n) c -> (b m) n c", m=num_domains),
        plain=partial(reference.geometry_attention, num_domains=num_domains, num_heads=HEADS),
    )


@pytest.mark.slow
def test_frames_behind_tokens_are_read_and_written_in_place():
    packed = torch.randn(2 * 33, 3, 3 * HEADS * 40, generator=torch.Generator().manual_seed(3)).half()
    chunks = packed.chunk(3, dim=-1)
    views = Operands(*(rearrange(x, "(b f) n c -> b n f c", f=33) for x in chunks))
    assert_views_are_as_exact_as_plain_torch(
        views,
        chunks,
        back=lambda x: rearrange(x, "b n f c -> (b f) n c"),
        plain=partial(reference.temporal_attention, num_frames=33, num_heads=HEADS),
    )


def assert_views_are_as_exact_as_plain_torch(
    views: Operands, chunks: Sequence[Tensor], *, back: Callable[[Tensor], Tensor], plain: Callable[..., Tensor]
) -> None:
    """Output and gradients on views of a packed projection; rearranged back they are contiguous, never copied."""
    assert all(x.untyped_storage().data_ptr() == chunks[0].untyped_storage().data_ptr() for x in views[:3])
    grad_output = random_gradient(views)
    ours = [long_forward.forward(*views, num_heads=HEADS, tile=SMALL_TILE)[0]]
    ours += our_gradients(views, grad_output, deterministic=True)
    assert all(back(x).is_contiguous() and back(x).data_ptr() == x.data_ptr() for x in ours)
    expected = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in chunks]
        output = plain(*leaves)
        expected.append([output, *torch.autograd.grad(output, leaves, back(grad_output).to(dtype))])
    for one, plain_one, exact_one in zip(ours, *expected, strict=True):
        assert_as_exact_as(plain_one, ours=back(one), exact=exact_one)


@pytest.mark.slow
@pytest.mark.parametrize("head_width", [40, 160])
def test_the_table_s_tiles_span_several_blocks_too(head_width):
    operands = random_operands(Sizes(1, 1, 200, 150, 70, head_width), torch.float16)
    grad_output = random_gradient(operands)
    output, log_sum_exp = long_forward.forward(*operands, num_heads=HEADS)
    exact = in_float64(operands)
    assert_as_exact_as(plain_attention(operands), ours=output, exact=plain_attention(exact))
    plain = plain_gradients(operands, grad_output)
    for deterministic in (False, True):
        ours = long_backward.backward(
            grad_output, *operands, output, log_sum_exp, num_heads=HEADS, deterministic=deterministic
        )
        exact_gradients = plain_gradients(exact, grad_output.double())
        for one, plain_one, exact_one in zip(vars(ours).values(), plain, exact_gradients, strict=True):
            assert_as_exact_as(plain_one, ours=one, exact=exact_one)


def test_rows_that_lie_two_gibi_elements_apart_are_reached(tmp_path):
    width, row = (
        HEADS * 24,
        2**31 // 31 + 1,
    )  # one block of 32 rows crosses 2^31; only the used rows of the sparse file take space
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=32 * row + 3 * width, dtype=torch.float16)
    far = Operands(*(storage.as_strided((1, 1, 33, width), (1, 1, row, 1), part * width) for part in range(3)))
    near = random_operands(Sizes(1, 1, 33, 33, None, head_width=24), torch.float16)
    for one, other in zip(far[:3], near[:3], strict=True):
        one.copy_(other)
    grad_output = random_gradient(near)
    ours = long_forward.forward(*far, num_heads=HEADS, tile=SMALL_TILE)[0]
    assert torch.equal(ours, long_forward.forward(*near, num_heads=HEADS, tile=SMALL_TILE)[0])
    for deterministic in (False, True):
        ours = our_gradients(far, grad_output, deterministic=deterministic)
        expected = our_gradients(near, grad_output, deterministic=deterministic)
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
def test_padded_keys_leave_no_trace_where_every_score_is_far_below_zero(deterministic):
    operands = random_operands(Sizes(1, 2, 17, 17, 3, head_width=24), torch.float16)
    keys = [None if x is None else x * 0 + 16 for x in (operands.key, operands.shared_key)]
    operands = operands._replace(query=operands.query * 0 - 16, key=keys[0], shared_key=keys[1])
    scores = -16 * 16 * 24**0.5  # a padded key's score is 0: exp(0 - log_sum_exp) overflows
    assert torch.exp(torch.tensor(-scores)).isinf()
    ours = our_gradients(operands, random_gradient(operands), deterministic=deterministic)
    assert all(one.isfinite().all() for one in ours)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the number of samples is not used then
@pytest.mark.parametrize("deterministic", [False, True])
def test_without_queries_or_samples_there_is_no_gradient(deterministic):
    for sizes in (Sizes(1, 2, 0, 5, 3, 40), Sizes(0, 2, 5, 5, 3, 40), Sizes(1, 0, 5, 5, 3, 40)):
        operands = random_operands(sizes, torch.float32)
        ours = our_gradients(operands, random_gradient(operands), deterministic=deterministic)
        assert all(torch.equal(one, torch.zeros_like(operand)) for one, operand in zip(ours, operands, strict=True))


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


def test_inputs_that_the_kernels_would_misread_are_refused():
    operands = random_operands(SIZES[0], torch.float32)
    query, key, value, _, _ = operands
    with pytest.raises(ValueError, match="query has strides"):
        long_forward.forward(torch.zeros(1, 1, 80, 3).mT, key, value, None, None, num_heads=HEADS)
    with pytest.raises(ValueError, match="float64; the kernels take"):
        long_forward.forward(query.double(), key, value, None, None, num_heads=HEADS)
    with pytest.raises(ValueError, match="no key to attend to"):
        long_forward.forward(query, key[:, :, :0], value[:, :, :0], None, None, num_heads=HEADS)
