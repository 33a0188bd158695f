"""The attention operator in torch: opaque, differentiable, counted, kept by checkpointing, small in memory.

Here torch's CPU kernels compute it; Triton's kernels have test files of their own.
"""

from collections import Counter

import pytest
import torch
import triton
from einops import rearrange, repeat
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dreamdance.models.geometry_attention import GeometryAttention
from dreamdance.models.temporal_attention import TemporalAttention
from dreamdance.training.planning.activation_memory import LiveBytes
from dreamdance_kernels import (
    attention_operator,
    available_backends,
    checkpoint_keeping_attention,
    geometry_attention,
    sdpa,
    segmented_attention,
    triton_package,
)

FORWARD = torch.ops.dreamdance.segmented_attention.default
BACKWARD = torch.ops.dreamdance.segmented_attention_backward.default


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packed(*shape, dtype=torch.float64):
    """Query, key and value as thirds of one projection `... 3*c`."""
    return random(*shape[:-1], 3 * shape[-1], dtype=dtype).requires_grad_().chunk(3, dim=-1)


def shared(b, s, c, dtype=torch.float64):
    """Key and value, shared by the samples of each of b, as halves of one projection."""
    return random(b, s, 2 * c, dtype=dtype, seed=1).requires_grad_().chunk(2, dim=-1)


def permuted(*shape, dtype=torch.float64):
    """Query, key and value of temporal attention: `(b f) n c` in memory, `b n f c` in shape."""
    b, n, f, c = shape
    return [rearrange(x, "(b f) n c -> b n f c", b=b) for x in packed(b * f, n, c, dtype=dtype)]


LAYOUTS = {
    "packed": lambda dtype: [*packed(2, 3, 5, 12, dtype=dtype), None, None],
    "packed with a shared segment": lambda dtype: [*packed(2, 3, 5, 12, dtype=dtype), *shared(2, 4, 12, dtype)],
    "permuted": lambda dtype: [*permuted(2, 3, 5, 12, dtype=dtype), None, None],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def as_leaves(inputs):
    return [None if x is None else x.detach().requires_grad_() for x in inputs]


class Calls(TorchDispatchMode):
    """Counts the operators that reach the kernels, and records the last arguments of each."""

    def __init__(self):
        super().__init__()
        self.counts, self.arguments = Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        self.arguments[function] = args
        return function(*args, **(kwargs or {}))


def test_a_triton_that_is_older_than_any_the_kernels_were_compiled_with_is_named(monkeypatch):
    assert triton_package.why_unusable() is None
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert available_backends()["triton"] == "it needs triton 3.6 or newer (it comes with torch); found 3.2.0"


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_path_is_torchs_own_attention_to_the_bit_where_the_layout_is_the_same(layout, dtype):
    inputs = LAYOUTS[layout](dtype)
    cotangent = random(2, 3, 5, 12, dtype=dtype, seed=2)

    def run(attend):
        leaves = as_leaves(inputs)
        output = attend(leaves)
        return [output, *torch.autograd.grad(output, [x for x in leaves if x is not None], cotangent)]

    def with_torch(leaves):
        query, key, value = (rearrange(x, "b i l c -> (b i) l c") for x in leaves[:3])
        return rearrange(
            sdpa.reference_attention(query, key, value, *leaves[3:], num_heads=2), "(b i) l c -> b i l c", b=2
        )

    ours, theirs = run(lambda leaves: segmented_attention(*leaves, num_heads=2)), run(with_torch)
    torch.testing.assert_close(ours, theirs)
    if layout != "permuted":  # there the memory layout differs, and a shared gradient is summed in another order
        assert all(torch.equal(mine, other) for mine, other in zip(ours[:4], theirs[:4], strict=True))


def test_gradients_of_a_packed_projection_and_of_a_shared_reference_are_those_of_finite_differences():
    qkv = random(4, 3, 18).requires_grad_()
    kv = random(2, 2, 12, seed=1).requires_grad_()

    def attend(qkv, kv):
        own = (rearrange(x, "(b i) n c -> b i n c", b=2) for x in qkv.chunk(3, dim=-1))
        return segmented_attention(*own, *kv.chunk(2, dim=-1), num_heads=2)

    assert gradcheck(attend, (qkv, kv))


def test_the_gradient_of_a_shared_segment_is_the_sum_over_the_samples_that_read_it():
    inputs = as_leaves(LAYOUTS["packed with a shared segment"](torch.float64))
    together = torch.autograd.grad(segmented_attention(*inputs, num_heads=2).sum(), inputs[3:])
    apart = [torch.zeros_like(x) for x in inputs[3:]]
    for sample in range(3):
        output = segmented_attention(*(x[:, sample : sample + 1] for x in inputs[:3]), *inputs[3:], num_heads=2)
        for total, gradient in zip(apart, torch.autograd.grad(output.sum(), inputs[3:]), strict=True):
            total += gradient
    torch.testing.assert_close(together, tuple(apart))


def test_an_empty_shared_segment_equals_no_segment():
    query, key, value = packed(2, 3, 5, 12)
    none = segmented_attention(query, key, value, num_heads=2)
    empty = segmented_attention(query, key, value, key[:, 0, :0], value[:, 0, :0], num_heads=2)
    assert torch.equal(none, empty)


def test_the_result_has_the_memory_layout_of_the_query():
    """So the result of temporal attention is contiguous as `(b f) n c`, and is never copied."""
    query, key, value = permuted(2, 3, 5, 12)
    output = segmented_attention(query, key, value, num_heads=2)
    assert rearrange(output, "b n f c -> (b f) n c").is_contiguous()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_inputs_that_do_not_fit_together_are_refused_before_a_kernel_reads_beyond_them(implementation):
    query, key, value, *common = LAYOUTS["packed with a shared segment"](torch.float32)

    def refused(text, *inputs, num_heads=2):
        with pytest.raises(ValueError, match=text):
            segmented_attention(*inputs, num_heads=num_heads, implementation=implementation)

    refused("num_heads=5 does not divide the width 12", query, key, value, num_heads=5)
    refused(r"query must be \(b, i, l, heads\*d\); got \(2, 5, 12\)", query[:, 0], key, value)
    refused(r"one shape \(2, 3, k, 12\); got .*\(2, 3, 4, 12\)", query, key, value[:, :, 1:])
    refused(r"one shape \(2, 3, k, 12\); got \(2, 1, 5, 12\)", query, key[:, :1], value[:, :1])
    refused(r"one shape \(2, s, 12\); got \(1, 4, 12\)", query, key, value, *(x[:1] for x in common))
    refused("give both, or None for both", query, key, value, common[0])
    refused("one dtype and one device; got .*float16", query, key.half(), value)
    with pytest.raises(ValueError, match="implementation='cuda' is none of triton, torch"):
        segmented_attention(query, key, value, num_heads=2, implementation="cuda")


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@layouts
def test_the_forward_passes_torchs_operator_checks(layout, implementation):
    inputs = as_leaves(LAYOUTS[layout](torch.float32))
    torch.library.opcheck(attention_operator._attention, (*inputs, 2, False, implementation))


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("needs_shared", [True, False])
@layouts
def test_the_backward_passes_torchs_operator_checks(layout, needs_shared, implementation):
    inputs = [None if x is None else x.detach() for x in LAYOUTS[layout](torch.float32)]
    output, log_sum_exp = attention_operator._attention(*inputs, 2, False, implementation)
    arguments = (torch.ones_like(output), *inputs, output, log_sum_exp, 2, False, implementation, needs_shared)
    torch.library.opcheck(attention_operator._attention_backward, arguments)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("needs_shared", [True, False])
@layouts
def test_the_fake_has_the_shapes_and_strides_of_the_real_one(layout, needs_shared, implementation):
    inputs = [None if x is None else x.detach() for x in LAYOUTS[layout](torch.float32)]

    def run(tensors):
        output, log_sum_exp = attention_operator._attention(*tensors, 2, False, implementation)
        arguments = (torch.ones_like(output), *tensors, output, log_sum_exp, 2, False, implementation, needs_shared)
        return [output, log_sum_exp, *attention_operator._attention_backward(*arguments)]

    with FakeTensorMode() as mode:
        fakes = run([None if x is None else mode.from_tensor(x) for x in inputs])
    for fake, real in zip(fakes, run(inputs), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@layouts
def test_the_backward_does_not_run_the_forward_again(layout):
    inputs = as_leaves(LAYOUTS[layout](torch.float32))
    output = segmented_attention(*inputs, num_heads=2)
    with Calls() as calls:
        output.sum().backward()
    assert calls.counts[BACKWARD] == 1
    assert calls.counts[FORWARD] == 0


@pytest.mark.parametrize("wanted", [False, True])
def test_torchs_switch_for_determinism_reaches_the_backward(wanted):
    inputs = as_leaves(LAYOUTS["packed"](torch.float32))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        output = segmented_attention(*inputs, num_heads=2)
    finally:
        torch.use_deterministic_algorithms(before)
    with Calls() as calls:
        output.sum().backward()
    assert calls.arguments[BACKWARD][-3] is wanted


def test_operations_are_counted_by_torchs_own_formulas():
    query, key, value = (x.detach().requires_grad_() for x in packed(2, 1, 5, 12, dtype=torch.float32))
    with FlopCounterMode(display=False) as counter:
        segmented_attention(query, key, value, num_heads=2).sum().backward()
    shapes = [torch.Size((2, 2, 5, 6))] * 3  # batch, heads, tokens, head width
    counts = counter.get_flop_counts()["Global"]
    assert counts[FORWARD.overloadpacket] == sdpa_flop_count(*shapes) == 4 * 2 * 5 * 5 * 12
    assert counts[BACKWARD.overloadpacket] == sdpa_backward_flop_count(shapes[0], *shapes)


def test_a_shared_segment_is_counted_once_for_every_sample_that_reads_it():
    inputs = LAYOUTS["packed with a shared segment"](torch.float32)
    with FlopCounterMode(display=False) as counter:
        segmented_attention(*inputs, num_heads=2)
    assert counter.get_total_flops() == 4 * 2 * 3 * 5 * (5 + 4) * 12


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_frozen_shared_segment_leaves_the_other_gradients_the_same_to_the_bit(implementation):
    inputs = as_leaves(LAYOUTS["packed with a shared segment"](torch.float32))

    def gradients(*common):
        output = segmented_attention(
            *inputs[:3], *common, num_heads=2, deterministic=True, implementation=implementation
        )
        return torch.autograd.grad(output, inputs[:3], random(2, 3, 5, 12, dtype=torch.float32, seed=2))

    trained, frozen = gradients(*inputs[3:]), gradients(*(x.detach() for x in inputs[3:]))
    assert all(torch.equal(one, other) for one, other in zip(trained, frozen, strict=True))


@pytest.mark.parametrize(("implementation", "products"), [("triton", 3), ("torch", 5)])
def test_a_frozen_shared_segment_costs_three_of_five_products_backwards(implementation, products):
    """The scores again, the gradients of the weights and the queries; torch's kernel computes all five whatever for."""

    def count(common_needs_gradient):
        with FakeTensorMode():
            query, key, value = (torch.empty(2, 3, 5, 12, requires_grad=True) for _ in range(3))
            common = [torch.empty(2, 4, 12, requires_grad=common_needs_gradient) for _ in range(2)]
            output = segmented_attention(query, key, value, *common, num_heads=2, implementation=implementation)
            with FlopCounterMode(display=False) as counter:
                output.sum().backward()
        assert all((x.grad is not None) == common_needs_gradient for x in common)
        return counter.get_flop_counts()["Global"][BACKWARD.overloadpacket]

    own, common = (2 * 2 * 3 * 5 * keys * 12 for keys in (5, 4))  # of one product
    assert count(True) == 5 * own + 5 * common
    assert count(False) == 5 * own + products * common


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_own_dtype_and_returns_it(dtype):
    inputs = LAYOUTS["packed with a shared segment"](torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        output = segmented_attention(*inputs, num_heads=2)
    by_hand = segmented_attention(*(x.to(dtype) for x in inputs), num_heads=2)
    assert output.dtype == dtype
    assert torch.equal(output, by_hand)


class Block(nn.Module):
    """Geometry attention and temporal attention one after the other, as in a transformer block."""

    def __init__(self, backend):
        super().__init__()
        self.geometry, self.temporal = GeometryAttention(32, 2), TemporalAttention(32, 2, max_frames=4)
        self.backend = backend
        for branch in (self.geometry, self.temporal):
            nn.init.normal_(branch.to_out.weight, std=0.2)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.geometry(hidden_states, num_domains=3, backend=self.backend)
        return hidden_states + self.temporal(hidden_states, num_frames=4, num_domains=3, backend=self.backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "sdpa", "triton"])
def test_a_block_compiles_into_one_graph_with_the_same_outputs_and_gradients(backend):
    """Captured and differentiated ahead of time; code is not generated, which would need a C++ compiler."""
    torch.manual_seed(0)
    block, inputs = Block(backend), random(12, 5, 32, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        output = function(inputs)
        results.append([output, *torch.autograd.grad(output.sum(), [inputs, *block.parameters()])])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_graph_compiled_for_one_length_accepts_others(backend):
    """torch replaces a changing length by a symbol, and the choice of a backend looks lengths up."""

    def attend(query, key, value):
        return geometry_attention(query, key, value, num_domains=3, num_heads=2, backend=backend)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for num_tokens in (2, 5, 7):
        inputs = packed(3, num_tokens, 4, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_checkpointing_can_keep_what_attention_computed(backend):
    torch.manual_seed(0)
    block, inputs = Block(backend), random(12, 5, 32, dtype=torch.float32).requires_grad_()

    def run(keep):
        with Calls() as calls:
            output = keep(block, inputs)
            gradients = torch.autograd.grad(output.sum(), [inputs, *block.parameters()])
        forwards = sum(count for function, count in calls.counts.items() if function in FORWARDS)
        return [output, *gradients], forwards

    plain, _ = run(lambda function, x: function(x))
    recomputed, twice = run(lambda function, x: checkpoint(function, x, use_reentrant=False))
    kept, once = run(checkpoint_keeping_attention)
    assert (twice, once) == (4, 2)  # two attentions
    for results in (recomputed, kept):
        assert all(torch.equal(first, second) for first, second in zip(plain, results, strict=True))


FORWARDS = {FORWARD, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


def as_one_operator(query, key, value, *, num_domains, num_heads):
    """Geometry attention as the backend `triton` runs it."""
    merged = (rearrange(x, "(b m) n c -> b 1 (m n) c", m=num_domains) for x in (query, key, value))
    return segmented_attention(*merged, num_heads=num_heads, implementation="triton")


def by_concatenating_and_repeating(query, key, value, *, num_domains, num_heads):
    """Geometry attention as in Wonder3D: the keys of all domains side by side, repeated for every domain."""
    joined = [rearrange(x, "(b m) n c -> b (m n) c", m=num_domains) for x in (key, value)]
    key, value = (repeat(x, "b n c -> (b m) n c", m=num_domains).contiguous() for x in joined)
    heads = (rearrange(x, "b n (heads d) -> b heads n d", heads=num_heads).contiguous() for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads)


def bytes_saved_and_peak(attend):
    """Memory kept for the backward, and peak memory, of the widest geometry attention of 8 frames.

    On fake tensors, so at full size: 24 samples of 1536 tokens, 8 heads of 40, bfloat16. Scratch memory inside a kernel
    is not counted.
    """
    with FakeTensorMode():
        projection = torch.empty(24, 1536, 960, dtype=torch.bfloat16, requires_grad=True)
        saved = {}

        def remember(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with LiveBytes() as live:
            with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
                output = attend(*projection.chunk(3, dim=-1), num_domains=3, num_heads=8)
            output.backward(torch.empty_like(output))
    return sum(saved.values()), live.peak


def test_our_form_uses_less_memory_than_concatenating_and_repeating():
    samples, statistics = 24 * 1536 * 320 * 2, 24 * 1536 * 8 * 4  # bytes of one of q, k, v, o; of the log-sum-exp
    ours, our_peak = bytes_saved_and_peak(as_one_operator)
    theirs, their_peak = bytes_saved_and_peak(by_concatenating_and_repeating)
    assert ours == 4 * samples + statistics  # the projection itself (q, k, v), the output, the log-sum-exp
    assert theirs == (1 + 3 + 3 + 1) * samples + statistics  # keys and values three times
    assert our_peak < 0.6 * their_peak
