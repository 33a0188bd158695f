"""Group normalisation with SiLU: Triton's kernels (interpreted) beside torch's, both against float64; the operator.

float32 and float16 only: the interpreter truncates to bfloat16, while a GPU rounds.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dreamdance_kernels import group_norm_operator, group_norm_silu
from dreamdance_kernels.triton_kernels import group_norm

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")
# unavoidable roundings: those of intermediate values in single precision, that of the result in half precision
FLOOR = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.float16: torch.finfo(torch.float16).eps / 2}
OPERATORS = torch.ops.dreamdance


@dataclass(frozen=True)
class Case:
    """An input `n c h w` and its groups; values around `mean` with deviation 1."""

    shape: tuple[int, int, int, int]
    num_groups: int
    mean: float = 0.0
    activation: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Input, weight, bias and the gradient of the output, channels_last."""
        generator = torch.Generator().manual_seed(0)
        channels = self.shape[1]
        images = torch.randn(2, *self.shape, generator=generator)
        weight, bias = torch.randn(2, channels, generator=generator)
        hidden_states, gradient = (images[0] + self.mean).to(dtype), images[1].to(dtype)
        weight, bias = (1 + 0.2 * weight).to(dtype), (0.2 * bias).to(dtype)
        return [channels_last(hidden_states), weight, bias, channels_last(gradient)]


CASES = [
    Case((2, 80, 7, 9), 8),  # groups of 10 across two blocks of channels, the second cut off
    Case((1, 80, 1, 17), 4),  # groups of 20
    Case((2, 160, 1, 1), 4),  # groups of 40 at a single position
    Case((2, 40, 17, 1), 40, mean=1.0),  # every channel is its own group
    Case((1, 200, 3, 5), 2),  # groups wider than the number of channels that are combined at once
    Case((1, 80, 12, 25), 8, mean=1000.0),  # three splits; a variance that E[x^2] - E[x]^2 has no digits for
    Case((2, 6, 9, 7), 1, mean=-3.0, activation=False),
]


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills new memory with NaN, so that elements which a kernel does not write show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run_kernels(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of the launchers, on CPU in the interpreter."""
    hidden_states, weight, bias, gradient = case.inputs(dtype)
    found = group_norm.forward(
        hidden_states, weight, bias, num_groups=case.num_groups, eps=1e-5, activation=case.activation
    )
    statistics = found.mean, found.reciprocal_deviation
    gradients = group_norm.backward(gradient, hidden_states, *statistics, weight, bias, activation=case.activation)
    return [found.output, gradients.hidden_states, gradients.weight, gradients.bias]


def run_torch(case: Case, dtype: torch.dtype, *, computed_in: torch.dtype) -> list[Tensor]:
    """torch's own result, contiguous: its CPU kernel for channels_last loses large means and would allow any error."""
    *inputs, gradient = (x.to(computed_in).contiguous() for x in case.inputs(dtype))
    inputs = [x.requires_grad_() for x in inputs]
    output = F.group_norm(inputs[0], case.num_groups, *inputs[1:], eps=1e-5)
    output = F.silu(output) if case.activation else output
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def check_errors(case: Case, dtype: torch.dtype) -> None:
    """Checks that norm and maximum of the error are at most 1.1 times torch's, or unavoidable roundings."""
    exact = run_torch(case, dtype, computed_in=torch.float64)
    plain = run_torch(case, dtype, computed_in=dtype)
    for name, ours, theirs, truth in zip(NAMES, run_kernels(case, dtype), plain, exact, strict=True):
        assert ours.dtype == dtype, name
        for measure in (Tensor.norm, lambda x: x.abs().max()):
            error, bar = (float(measure(x.double() - truth) / measure(truth)) for x in (ours, theirs))
            assert error <= max(1.1 * bar, FLOOR[dtype]), f"{name}: {error:.2e}, torch's {bar:.2e}"


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poison")
def test_kernels_are_as_exact_as_torch_in_the_same_dtype(case, dtype):
    check_errors(case, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("poison")
def test_a_large_image_is_cut_into_longer_splits_and_not_into_more():
    check_errors(Case((1, 4, 91, 91), 2, mean=10.0), torch.float32)


@pytest.mark.usefixtures("poison")
def test_outputs_and_gradients_are_channels_last_and_the_same_bits_each_time():
    first, second = (run_kernels(CASES[0], torch.float16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in first[:2])
    assert not any(images.is_contiguous() for images in first[:2])


def test_one_outlier_in_front_does_not_spoil_the_deviation_of_the_rest():
    """The sums are shifted by the first value of a channel; squares around a single outlier would lose all digits."""
    hidden_states, weight, bias, _ = Case((1, 4, 16, 16), 4).inputs()
    hidden_states[..., 0, 0] = 1e4
    found = group_norm.forward(hidden_states, weight, bias, num_groups=4, eps=1e-5, activation=False)
    variance = hidden_states.double().var(dim=(2, 3), correction=0)
    torch.testing.assert_close(found.reciprocal_deviation.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_the_kernels_refuse_another_layout():
    hidden_states, weight, bias, _ = CASES[0].inputs()
    with pytest.raises(ValueError, match=r"channels_last.*\(2, 80, 7, 9\)"):
        group_norm.forward(hidden_states.contiguous(), weight, bias, num_groups=8, eps=1e-5, activation=True)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_the_operator_gives_the_same_on_a_gpu_and_on_cpu(dtype):
    """The functions registered for GPUs, called here on CPU; a gradient may come in any layout."""
    hidden_states, weight, bias, gradient = CASES[1].inputs(dtype)
    arguments = hidden_states, weight, bias, 4, 1e-5, True
    ours, theirs = group_norm_operator._run_triton(*arguments), OPERATORS.group_norm_silu(*arguments)
    check_alike(ours, theirs)
    arguments = gradient.contiguous(), hidden_states, *ours[1:], weight, bias, True
    gradients = group_norm_operator._run_triton_backward(*arguments)
    check_alike(gradients, OPERATORS.group_norm_silu_backward(*arguments))
    for results in (ours, gradients):  # torch refuses an operator whose results share memory
        assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)


def check_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Checks that results agree within ten roundings, and in dtype and strides."""
    tolerance = 10 * torch.finfo(found[0].dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", [(8, 0), (9, 0)])
def test_builds_name_every_argument_of_every_kernel(architecture):
    builds = group_norm.builds(architecture)
    assert len({build.name for build in builds}) == len(builds)
    assert {build.constants.get("group_size") for build in builds} == {None, 10, 20, 40}
    for build in builds:
        assert set(build.signature) | set(build.constants) == set(build.function.arg_names), build.name


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_cpu_the_output_is_torchs_own_bit_for_bit(dtype, layout, activation):
    hidden_states, weight, bias, _ = Case((2, 24, 5, 7), 4, mean=1.0).inputs(dtype)
    hidden_states = hidden_states.contiguous(memory_format=layout)
    for images in (hidden_states, hidden_states[:, ::2], hidden_states[:, :, 0]):
        arguments = images, 4, weight[: images.shape[1]], bias[: images.shape[1]], 1e-5
        expected = F.silu(F.group_norm(*arguments)) if activation else F.group_norm(*arguments)
        found = group_norm_silu(*arguments, activation=activation)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_under_autocast_on_cpu_it_is_torchs_own_too():
    hidden_states, weight, bias, _ = CASES[0].inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for images in (hidden_states, hidden_states.bfloat16()):
            expected = F.silu(F.group_norm(images, 8, weight, bias))
            found = group_norm_silu(images, 8, weight, bias)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_under_autocast_on_a_gpu_it_returns_float32_as_torchs_own_does():
    with FakeTensorMode():
        images = torch.empty(2, 8, 5, 3, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        weight = torch.empty(8, device="cuda")
        arguments = images, weight, weight, 4, 1e-5, True
        assert OPERATORS.group_norm_silu(*arguments)[0].dtype == torch.bfloat16
        torch.set_autocast_enabled("cuda", True)
        try:
            output = OPERATORS.group_norm_silu(*arguments)[0]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert output.dtype == torch.float32
    assert output.stride() == images.stride()


class NormalisedInputs(TorchDispatchMode):
    """Lists the inputs of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is OPERATORS.group_norm_silu.default:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", [True, False])
def test_clips_with_channels_innermost_run_as_pictures_that_hold_their_frames_as_rows(activation):
    generator = torch.Generator().manual_seed(0)
    clips, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 8, 3, 5, 2), 8, 8))
    inputs = [clips.contiguous(memory_format=torch.channels_last_3d), weight, bias]
    inputs = [x.requires_grad_() for x in inputs]
    with NormalisedInputs() as normalised:
        output = group_norm_silu(inputs[0], 4, *inputs[1:], activation=activation)
    assert [x.shape for x in normalised.inputs] == [(2, 8, 15, 2)]
    assert normalised.inputs[0].is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    expected = F.group_norm(inputs[0], 4, *inputs[1:])
    expected = F.silu(expected) if activation else expected
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close((output, *gradients), (expected, *expected_gradients), rtol=1e-5, atol=1e-5)
    for found in (output, gradients[0]):
        assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 3, 2), (3, 8), (1, 8, 2, 3, 2)], ids=str)
def test_gradients_on_cpu_are_those_of_finite_differences(shape, activation):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, 8, 8)]

    def normalise(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(hidden_states, 4, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(normalise, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_on_cpu_keep_dtype_and_layout_of_their_inputs(dtype):
    inputs = [x.requires_grad_() for x in CASES[0].inputs(dtype)[:3]]
    gradients = torch.autograd.grad(group_norm_silu(inputs[0], 8, *inputs[1:]).sum(), inputs)
    expected = torch.autograd.grad(F.silu(F.group_norm(inputs[0], 8, *inputs[1:])).sum(), inputs)
    check_alike(gradients, expected)
    assert [x.stride() for x in gradients] == [x.stride() for x in inputs]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", [True, False])
def test_both_operators_pass_torchs_checks(layout, activation):
    hidden_states, weight, bias, gradient = Case((2, 8, 5, 3), 4).inputs()
    inputs = [x.requires_grad_() for x in (hidden_states.contiguous(memory_format=layout), weight, bias)]
    torch.library.opcheck(OPERATORS.group_norm_silu, (*inputs, 4, 1e-5, activation))
    hidden_states, weight, bias = (x.detach() for x in inputs)
    _, *statistics = OPERATORS.group_norm_silu(hidden_states, weight, bias, 4, 1e-5, activation)
    torch.library.opcheck(
        OPERATORS.group_norm_silu_backward, (gradient, hidden_states, *statistics, weight, bias, activation)
    )


def test_a_compiler_sees_one_operator_and_no_break():
    inputs = [x.requires_grad_() for x in CASES[0].inputs()[:3]]

    def normalise(hidden_states: Tensor) -> Tensor:
        return 2 * group_norm_silu(hidden_states * 3, 8, *inputs[1:])

    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    outputs = [function(inputs[0]) for function in (normalise, compiled)]
    assert torch.equal(*outputs)
    eager, traced = (torch.autograd.grad(output.square().sum(), inputs) for output in outputs)
    assert all(torch.equal(one, other) for one, other in zip(eager, traced, strict=True))


def test_the_backward_keeps_the_input_and_no_second_image():
    inputs = [x.requires_grad_() for x in CASES[0].inputs()[:3]]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        group_norm_silu(inputs[0], 8, *inputs[1:])
    assert [x.data_ptr() for x in saved if x.numel() == inputs[0].numel()] == [inputs[0].data_ptr()]
    assert sum(x.numel() for x in saved) == inputs[0].numel() + 2 * 80 + 2 * 16


def test_the_chosen_implementation_is_logged_once_with_the_reason(caplog, monkeypatch):
    monkeypatch.setattr(group_norm_operator, "_announced", set())
    hidden_states, weight, bias, _ = CASES[0].inputs()
    with caplog.at_level(logging.INFO, logger=group_norm_operator.__name__):
        for _ in range(2):
            group_norm_silu(hidden_states, 8, weight, bias)
    assert caplog.messages == ["group norm: torch's own, because the input is on cpu"]


def test_groups_and_weights_that_do_not_fit_are_refused():
    hidden_states, weight, bias, _ = CASES[0].inputs()
    for num_groups in (0, 7):
        with pytest.raises(ValueError, match=rf"num_groups={num_groups} .*\(2, 80, 7, 9\)"):
            group_norm_silu(hidden_states, num_groups, weight, bias)
    with pytest.raises(ValueError, match=r"shape \(80,\).*got \(79,\)"):
        group_norm_silu(hidden_states, 8, weight[1:], bias)
    with pytest.raises(ValueError, match="does not divide"):
        group_norm_silu(weight, 8, weight, bias)
