"""Path S of the attention operator in Triton's interpreter, against float64 and beside plain torch in the same dtype.

float32 and float16 only: the interpreter multiplies the bit patterns of bfloat16 and would test nothing. It runs the
programs one after the other, so it can show only that no program reads or writes the rows of another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dreamdance_kernels import reference
from dreamdance_kernels.triton_kernels import short, tiles
from dreamdance_kernels.triton_kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_ERROR_RATIO = 1.1
MACHINES = {"sm_80": (8, 0), "sm_90": (9, 0)}  # tiles of 32 and of 64 rows


@dataclass(frozen=True)
class Sizes:
    """Two clips with the given numbers of frames, places and heads."""

    frames: int
    places: int
    heads: int
    head_width: int

    def __str__(self) -> str:
        return f"f{self.frames}-n{self.places}-h{self.heads}-d{self.head_width}"


# A tile of 32 rows holds 32 // frames places: 32, 16, 4, 2 or 1, and rows are left over at 7, 17 and 24 frames.
SIZES = [
    Sizes(frames=1, places=63, heads=2, head_width=40),
    Sizes(frames=2, places=63, heads=1, head_width=5),
    Sizes(frames=7, places=17, heads=2, head_width=64),
    Sizes(frames=16, places=1, heads=2, head_width=160),
    Sizes(frames=16, places=17, heads=3, head_width=40),
    Sizes(frames=16, places=63, heads=1, head_width=80),
    Sizes(frames=17, places=17, heads=1, head_width=80),
    Sizes(frames=24, places=17, heads=2, head_width=40),
    Sizes(frames=32, places=5, heads=1, head_width=160),
]
# The same; the larger ones take seconds in the interpreter.
SIZES_BY_COST = [
    sizes if sizes.frames * sizes.places < 200 else pytest.param(sizes, marks=pytest.mark.slow) for sizes in SIZES
]


def packed(sizes: Sizes, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """A projection `(b f) n 3c` of two clips."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * sizes.frames, sizes.places, 3 * sizes.heads * sizes.head_width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def cotangent(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """A gradient of the output, `(b f) n c`."""
    return packed(sizes, dtype, seed=1).chunk(3, dim=-1)[0].contiguous()


def by_place(tensor: Tensor, frames: int) -> Tensor:
    return rearrange(tensor, "(b f) n c -> b n f c", f=frames)


def by_frame(tensor: Tensor) -> Tensor:
    return rearrange(tensor, "b n f c -> (b f) n c")


def run(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, num_heads: int) -> list[Tensor]:
    """The output and the gradients of query, key and value; all `b n f c`."""
    output = short.forward(query, key, value, num_heads=num_heads)
    gradients = short.backward(grad_output, query, key, value, num_heads=num_heads)
    return [output, gradients.query, gradients.key, gradients.value]


def from_kernel(projection: Tensor, grad_output: Tensor, sizes: Sizes) -> list[Tensor]:
    """The output and the three gradients, `(b f) n c`."""
    operands = [by_place(x, sizes.frames) for x in (*projection.chunk(3, dim=-1), grad_output)]
    return [by_frame(x) for x in run(*operands, sizes.heads)]


def from_torch(projection: Tensor, grad_output: Tensor, sizes: Sizes) -> list[Tensor]:
    """The same four in plain torch, in the dtype of its arguments."""
    inputs = [x.detach().clone().requires_grad_() for x in projection.chunk(3, dim=-1)]
    output = reference.temporal_attention(*inputs, num_frames=sizes.frames, num_heads=sizes.heads)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]


def assert_as_exact_as_torch(projection: Tensor, grad_output: Tensor, sizes: Sizes) -> None:
    """Root mean square and largest error of the output and of each gradient, against float64.

    The random difference between two correct orders of summation is allowed: in the root mean square a quarter of a
    float32 unit in the last place (negligible beside the errors of float16), and in the largest of some thousand errors
    two of these units and a quarter of one in the dtype of the result.
    """
    ours = from_kernel(projection, grad_output, sizes)
    plain = from_torch(projection, grad_output, sizes)
    truth = from_torch(projection.double(), grad_output.double(), sizes)
    unit = torch.finfo(torch.float32).eps
    largest_luck = 2 * unit + torch.finfo(projection.dtype).eps / 4
    for name, got, theirs, exact in zip(("output", "query", "key", "value"), ours, plain, truth, strict=True):
        error, their_error = got - exact, theirs - exact
        assert got.dtype == projection.dtype
        assert error.norm() <= MAX_ERROR_RATIO * their_error.norm() + 0.25 * unit * exact.norm(), name
        assert error.abs().max() <= MAX_ERROR_RATIO * their_error.abs().max() + largest_luck * exact.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES_BY_COST, ids=str)
def test_output_and_gradients_err_no_more_than_plain_torch_in_the_same_precision(sizes, dtype):
    assert_as_exact_as_torch(packed(sizes, dtype), cotangent(sizes, dtype), sizes)


@pytest.mark.parametrize("frames", [7, 16, 24])
def test_the_larger_tiles_of_newer_machines_err_no_more_than_plain_torch(frames, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED_ARCHITECTURE", MACHINES["sm_90"])
    sizes = Sizes(frames=frames, places=17, heads=1, head_width=40)
    assert_as_exact_as_torch(packed(sizes, torch.float16), cotangent(sizes, torch.float16), sizes)


def test_scores_far_from_zero_err_no_more_than_plain_torch():
    sizes = Sizes(frames=16, places=3, heads=1, head_width=40)
    projection = packed(sizes, torch.float16) * 30  # scores in the thousands: without their maximum, infinite weights
    assert_as_exact_as_torch(projection, cotangent(sizes, torch.float16), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_over_one_frame_the_output_is_the_value_and_its_gradient_the_outputs_to_the_bit(dtype):
    sizes = Sizes(frames=1, places=63, heads=2, head_width=40)
    projection, grad_output = packed(sizes, dtype), cotangent(sizes, dtype)
    output, grad_query, grad_key, grad_value = from_kernel(projection, grad_output, sizes)
    assert torch.equal(output, projection.chunk(3, dim=-1)[2])
    assert torch.equal(grad_value, grad_output)
    assert not grad_query.any()
    assert not grad_key.any()


STRIDED = Sizes(frames=7, places=5, heads=2, head_width=24)


def test_a_packed_projection_gives_the_bits_of_contiguous_inputs_and_dense_results_in_its_own_order():
    projection, grad_output = packed(STRIDED, torch.float32), cotangent(STRIDED, torch.float32)
    views = [by_place(x, STRIDED.frames) for x in (*projection.chunk(3, dim=-1), grad_output)]
    results = run(*views, STRIDED.heads)
    expected = run(*(x.contiguous() for x in views), STRIDED.heads)
    for result, plain in zip(results, expected, strict=True):
        assert by_frame(result).is_contiguous()
        assert plain.is_contiguous()
        assert torch.equal(result, plain)


def test_every_tensor_may_have_strides_of_its_own():
    projection, grad_output = packed(STRIDED, torch.float32), cotangent(STRIDED, torch.float32)
    views = [by_place(x, STRIDED.frames) for x in (*projection.chunk(3, dim=-1), grad_output)]
    expected = run(*views, STRIDED.heads)
    orders = ("n b f c", "f n b c", "b n f c", "n f b c")
    laid_out = [
        rearrange(rearrange(x, f"b n f c -> {order}").contiguous(), f"{order} -> b n f c")
        for x, order in zip(views, orders, strict=True)
    ]
    assert len({x.stride() for x in laid_out}) == 4
    for result, plain in zip(run(*laid_out, STRIDED.heads), expected, strict=True):
        assert torch.equal(result, plain)


def test_nothing_outside_of_the_inputs_is_read():
    """NaN surrounds every row, place and frame; one read of it would show in its tile."""
    projection, grad_output = packed(STRIDED, torch.float32), cotangent(STRIDED, torch.float32)
    operands = [by_place(x, STRIDED.frames) for x in (*projection.chunk(3, dim=-1), grad_output)]
    among_nan = []
    for operand in operands:
        surrounded = operand.new_full([size + 2 for size in operand.shape], float("nan"))
        inner = surrounded[1:-1, 1:-1, 1:-1, 1:-1]
        inner.copy_(operand)
        among_nan.append(inner)
    for result, expected in zip(run(*among_nan, STRIDED.heads), run(*operands, STRIDED.heads), strict=True):
        assert torch.equal(result, expected)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("frames", [1, 7, 24])
def test_every_element_of_the_results_is_written(frames):
    sizes = Sizes(frames=frames, places=17, heads=1, head_width=40)
    assert torch.empty_like(cotangent(sizes, torch.float32)).isnan().all()
    for result in from_kernel(packed(sizes, torch.float32), cotangent(sizes, torch.float32), sizes):
        assert result.isfinite().all()


def test_the_same_inputs_give_the_same_bits():
    sizes = Sizes(frames=24, places=5, heads=2, head_width=40)
    once, again = (from_kernel(packed(sizes, torch.float16), cotangent(sizes, torch.float16), sizes) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_a_place_does_not_depend_on_those_that_share_its_tile():
    sizes = Sizes(frames=7, places=9, heads=1, head_width=40)
    alone = Sizes(frames=7, places=1, heads=1, head_width=40)
    projection, grad_output = packed(sizes, torch.float32), cotangent(sizes, torch.float32)
    together = from_kernel(projection, grad_output, sizes)
    for place in (0, 3, 8):
        one = slice(place, place + 1)
        for result, single in zip(together, from_kernel(projection[:, one], grad_output[:, one], alone), strict=True):
            torch.testing.assert_close(result[:, one], single)


@pytest.mark.slow
def test_more_places_than_a_second_grid_axis_has_are_all_computed(monkeypatch):
    """66,000 places of two frames in one launch, in a tile that lets the interpreter do so in seconds.

    With equal keys a place's weights are 1/2 and 1/2, which makes its result known without another attention.
    """
    monkeypatch.setattr(short, "FLOAT32_TILE", Tile(128, 128, 4, 1))
    value = (torch.arange(66_000 * 2) % 1024).float().reshape(1, 66_000, 2, 1)
    ones = torch.ones_like(value)
    output = short.forward(ones, ones, value, num_heads=1)
    assert torch.equal(output, value.mean(dim=2, keepdim=True).expand_as(value))


@pytest.mark.parametrize("axis", ["clip", "place", "frame"])
def test_clips_places_and_frames_may_lie_more_than_2_to_the_31_elements_away(axis):
    """Uses a buffer of 4 GiB, of which only the used pages take memory."""
    far = 2**30 + 64  # the offset is below 2^31; twice the offset is not
    buffer = torch.empty(2 * far + 1024, dtype=torch.float16)
    shape = {"clip": (3, 2, 2, 16), "place": (2, 3, 2, 16), "frame": (2, 2, 3, 16)}[axis]
    strides = {"clip": (far, 64, 16, 1), "place": (64, far, 16, 1), "frame": (64, 16, far, 1)}[axis]
    query, key, value, grad_output = (buffer.as_strided(shape, strides, 128 * number) for number in range(4))
    generator = torch.Generator().manual_seed(0)
    for operand in (query, key, value, grad_output):
        operand.copy_(torch.randn(shape, generator=generator))
    near = [x.contiguous() for x in (query, key, value, grad_output)]
    for result, expected in zip(run(query, key, value, grad_output, 1), run(*near, 1), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("clips", "places"), [(0, 3), (2, 0)])
def test_no_clips_or_no_places_give_empty_results(clips, places):
    empty = torch.zeros(clips, places, 4, 16)
    assert [x.shape for x in run(empty, empty, empty, empty, 1)] == [empty.shape] * 4


def test_inputs_that_the_kernel_cannot_take_are_refused():
    fits = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=r"\(1, 2, 33, 16\); path S takes .* l in 1\.\.\.32"):
        short.forward(*[torch.zeros(1, 2, 33, 16)] * 3, num_heads=1)
    with pytest.raises(ValueError, match="num_heads=3 does not divide the width 16"):
        short.forward(fits, fits, fits, num_heads=3)
    with pytest.raises(ValueError, match="head width 272 is not in"):
        short.forward(*[torch.zeros(1, 2, 4, 272)] * 3, num_heads=1)
    with pytest.raises(ValueError, match="float64; the kernels take"):
        short.forward(fits.double(), fits.double(), fits.double(), num_heads=1)
    with pytest.raises(ValueError, match=r"key is \(1, 2, 3, 16\).* it must be as query"):
        short.forward(fits, fits[:, :, :3], fits, num_heads=1)
    with pytest.raises(ValueError, match=r"grad_output has strides .* the last must be 1"):
        short.backward(fits.transpose(2, 3).contiguous().transpose(2, 3), fits, fits, fits, num_heads=1)


@pytest.mark.parametrize("architecture", MACHINES.values(), ids=MACHINES)
def test_the_builds_cover_the_models_and_name_every_argument_of_their_kernel(architecture):
    builds = short.builds(architecture)
    variants = {(x.function, x.constants["head_width"], x.constants["length"]) for x in builds}
    assert len(variants) == len({x.name for x in builds}) == len(builds) == 2 * 4 * 2
    for build in builds:
        assert sorted([*build.signature, *build.constants]) == sorted(build.function.arg_names)
