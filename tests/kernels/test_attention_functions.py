"""The three attention functions (C2): the paper's identities, agreement of the backends, gradients, refusals."""

import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import dreamdance_kernels
from dreamdance_kernels import (
    UnavailableBackendError,
    available_backends,
    dispatch,
    dispatch_table,
    flash,
    geometry_attention,
    reference_attention,
    sdpa,
    temporal_attention,
)
from dreamdance_kernels.dispatch import default_choice
from dreamdance_kernels.dispatch_table import Choice, MeasuredCase

# The backends that run on a CPU, each with the most exact dtype that it computes in. Triton's kernels run in its
# interpreter here.
DTYPES = {"reference": torch.float64, "sdpa": torch.float64, "triton": torch.float32}
BACKENDS = tuple(DTYPES)
# The lower precisions in which a fused backend is compared with plain torch: bfloat16 where it computes in it, but
# float16 for triton, whose interpreter computes bfloat16 products wrongly.
LOW_PRECISION = {name: torch.float16 if name == "triton" else torch.bfloat16 for name in BACKENDS}
FUSED = [(name, dtype) for name in BACKENDS if name != "reference" for dtype in (torch.float32, LOW_PRECISION[name])]
HEAD_WIDTHS = (5, 40, 64)


def tokens(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(batch, num_tokens, width, *, dtype=torch.float64, seed=0):
    return tokens(3, batch, num_tokens, width, dtype=dtype, seed=seed).unbind(0)


def attend_one_query(query, keys, values):
    """The plain formula for one query `(d,)` over keys and values `(n, d)`."""
    weights = torch.softmax(keys @ query / query.shape[0] ** 0.5, dim=0)
    return weights @ values


def call(name, inputs, *, num_heads, backend):
    """The function of this name on `(query, key, value)` or, for reference attention, on five tensors."""
    if name == "geometry":
        return geometry_attention(*inputs[:3], num_domains=3, num_heads=num_heads, backend=backend)
    if name == "temporal":
        return temporal_attention(*inputs[:3], num_frames=3, num_heads=num_heads, backend=backend)
    return reference_attention(*inputs, num_heads=num_heads, backend=backend)


def inputs_for(name, *, num_tokens, width, dtype=torch.float64):
    inputs = qkv(6, num_tokens, width, dtype=dtype)
    if name != "reference":
        return list(inputs)
    return [*inputs, *tokens(2, 2, num_tokens + 1, width, dtype=dtype, seed=1).unbind(0)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_geometry_attention_lets_every_domain_see_the_tokens_of_all_domains_of_its_frame_only(backend):
    query, key, value = qkv(6, 3, 10, dtype=DTYPES[backend])  # 2 frames x 3 domains, 2 heads of width 5
    output = geometry_attention(query, key, value, num_domains=3, num_heads=2, backend=backend)
    for sample in range(6):
        frame = slice(sample // 3 * 3, sample // 3 * 3 + 3)
        for head in (slice(0, 5), slice(5, 10)):
            keys, values = key[frame, :, head].flatten(0, 1), value[frame, :, head].flatten(0, 1)
            for place in range(3):
                expected = attend_one_query(query[sample, place, head], keys, values)
                torch.testing.assert_close(output[sample, place, head], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_attention_appends_the_reference_of_the_own_clip_to_keys_and_values(backend):
    query, key, value = qkv(6, 3, 10, dtype=DTYPES[backend])  # 2 references with 3 samples each
    reference_key, reference_value = tokens(2, 2, 4, 10, seed=1, dtype=DTYPES[backend]).unbind(0)
    output = reference_attention(query, key, value, reference_key, reference_value, num_heads=2, backend=backend)
    for sample in range(6):
        for head in (slice(0, 5), slice(5, 10)):
            keys = torch.cat([key[sample, :, head], reference_key[sample // 3, :, head]])
            values = torch.cat([value[sample, :, head], reference_value[sample // 3, :, head]])
            for place in range(3):
                expected = attend_one_query(query[sample, place, head], keys, values)
                torch.testing.assert_close(output[sample, place, head], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temporal_attention_sees_its_own_place_in_all_frames_of_its_clip_only(backend):
    query, key, value = qkv(6, 3, 10, dtype=DTYPES[backend])  # 2 clips of 3 frames
    output = temporal_attention(query, key, value, num_frames=3, num_heads=2, backend=backend)
    for sample in range(6):
        clip = slice(sample // 3 * 3, sample // 3 * 3 + 3)
        for head in (slice(0, 5), slice(5, 10)):
            for place in range(3):
                expected = attend_one_query(
                    query[sample, place, head], key[clip, place, head], value[clip, place, head]
                )
                torch.testing.assert_close(output[sample, place, head], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_geometry_attention_with_one_domain_is_self_attention(backend, head_width):
    query, key, value = qkv(4, 7, 2 * head_width, dtype=DTYPES[backend])
    output = geometry_attention(query, key, value, num_domains=1, num_heads=2, backend=backend)
    plain = reference_attention(query, key, value, None, None, num_heads=2, backend=backend)
    torch.testing.assert_close(output, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_domains_permutes_the_outputs_of_geometry_attention(backend):
    inputs = qkv(6, 7, 10, dtype=DTYPES[backend])
    order = torch.tensor([2, 0, 1, 5, 3, 4])  # the same permutation in both frames
    output = geometry_attention(*inputs, num_domains=3, num_heads=2, backend=backend)
    permuted = geometry_attention(*(x[order] for x in inputs), num_domains=3, num_heads=2, backend=backend)
    torch.testing.assert_close(permuted, output[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reference_and_an_empty_reference_are_bit_for_bit_the_same(backend):
    query, key, value = qkv(4, 7, 10, dtype=torch.float32)
    none = reference_attention(query, key, value, None, None, num_heads=2, backend=backend)
    empty = reference_attention(query, key, value, key[:2, :0], value[:2, :0], num_heads=2, backend=backend)
    assert torch.equal(none, empty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_equal_to_the_sample_itself_changes_nothing(backend):
    """With every key twice, every weight is halved and occurs twice."""
    query, key, value = qkv(4, 7, 10, dtype=DTYPES[backend])
    doubled = reference_attention(query, key, value, key, value, num_heads=2, backend=backend)
    plain = reference_attention(query, key, value, None, None, num_heads=2, backend=backend)
    torch.testing.assert_close(doubled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_reference_is_the_same_as_one_repeated_for_every_sample(backend):
    *inputs, reference_key, reference_value = inputs_for("reference", num_tokens=5, width=10, dtype=DTYPES[backend])
    shared = reference_attention(*inputs, reference_key, reference_value, num_heads=2, backend=backend)
    repeated = reference_attention(
        *inputs,
        reference_key.repeat_interleave(3, 0),
        reference_value.repeat_interleave(3, 0),
        num_heads=2,
        backend=backend,
    )
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temporal_attention_over_one_frame_returns_the_values(backend):
    query, key, value = qkv(4, 7, 10, dtype=DTYPES[backend])
    output = temporal_attention(query, key, value, num_frames=1, num_heads=2, backend=backend)
    torch.testing.assert_close(output, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["geometry", "reference", "temporal"])
def test_doubling_the_clips_for_guidance_leaves_each_half_as_it_was(name, backend):
    inputs = inputs_for(name, num_tokens=5, width=10, dtype=DTYPES[backend])
    once = call(name, inputs, num_heads=2, backend=backend)
    twice = call(name, [torch.cat([x, x.flip(1)]) for x in inputs], num_heads=2, backend=backend)
    torch.testing.assert_close(twice[:6], once)


def outputs_and_gradients(name, inputs, *, num_heads, backend):
    """The output and the gradient of every input, for one fixed cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = call(name, leaves, num_heads=num_heads, backend=backend)
    cotangent = tokens(*output.shape, dtype=output.dtype, seed=2)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


@pytest.mark.parametrize(("backend", "dtype"), FUSED)
@pytest.mark.parametrize(("head_width", "num_tokens"), [(5, 13), (40, 24), (64, 1)])
@pytest.mark.parametrize("name", ["geometry", "reference", "temporal"])
def test_a_fused_backend_errs_no_more_than_plain_torch_in_the_same_precision(
    name, head_width, num_tokens, backend, dtype
):
    """Outputs and every gradient, each against float64; the factor covers another order of summation."""
    inputs = inputs_for(name, num_tokens=num_tokens, width=2 * head_width, dtype=dtype)
    truth = outputs_and_gradients(name, [x.double() for x in inputs], num_heads=2, backend="reference")
    plain = outputs_and_gradients(name, inputs, num_heads=2, backend="reference")
    fused = outputs_and_gradients(name, inputs, num_heads=2, backend=backend)
    for exact, ours, theirs in zip(truth, fused, plain, strict=True):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2 * rounding


@pytest.mark.parametrize("backend", [name for name, dtype in DTYPES.items() if dtype == torch.float64])
@pytest.mark.parametrize("name", ["geometry", "reference", "temporal"])
def test_gradients_are_those_of_finite_differences(name, backend):
    inputs = [x.requires_grad_() for x in inputs_for(name, num_tokens=2, width=6)]
    assert gradcheck(lambda *leaves: call(name, leaves, num_heads=2, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["geometry", "reference", "temporal"])
def test_a_packed_projection_split_in_three_gives_the_result_of_contiguous_inputs(name, backend):
    packed = tokens(6, 5, 30, dtype=DTYPES[backend]).requires_grad_()
    reference = tokens(2, 4, 20, seed=1, dtype=DTYPES[backend])
    views = [*packed.chunk(3, dim=-1), *(reference.chunk(2, dim=-1) if name == "reference" else ())]
    contiguous = [x.detach().contiguous().requires_grad_() for x in views]

    output = call(name, views, num_heads=2, backend=backend)
    expected = call(name, contiguous, num_heads=2, backend=backend)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(packed.grad, torch.cat([x.grad for x in contiguous[:3]], dim=-1))


def storages_seen_by_torch(monkeypatch):
    """Records the arguments of torch's attention, which still computes."""
    seen, attention = [], F.scaled_dot_product_attention

    def watched(query, key, value):
        seen.extend(x.untyped_storage().data_ptr() for x in (query, key, value))
        return attention(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def test_sdpa_reads_a_packed_projection_of_all_domains_without_a_copy(monkeypatch):
    seen = storages_seen_by_torch(monkeypatch)
    packed = tokens(6, 5, 30)
    geometry_attention(*packed.chunk(3, dim=-1), num_domains=3, num_heads=2, backend="sdpa")
    assert seen == [packed.untyped_storage().data_ptr()] * 3


def test_sdpa_reads_the_frames_of_one_clip_without_a_copy(monkeypatch):
    seen = storages_seen_by_torch(monkeypatch)
    packed = tokens(6, 5, 30)
    temporal_attention(*packed.chunk(3, dim=-1), num_frames=6, num_heads=2, backend="sdpa")
    assert seen == [packed.untyped_storage().data_ptr()] * 3


def test_sdpa_cuts_a_batch_that_is_too_long_for_one_call_and_changes_nothing(monkeypatch):
    inputs = qkv(6, 5, 10)
    whole = temporal_attention(*inputs, num_frames=3, num_heads=2, backend="sdpa")
    monkeypatch.setattr(sdpa, "MAX_BATCH", 4)  # of 2 clips x 5 places
    torch.testing.assert_close(temporal_attention(*inputs, num_frames=3, num_heads=2, backend="sdpa"), whole)


@pytest.fixture
def no_interpreter(monkeypatch):
    """As on a user's machine: Triton compiles its kernels, which needs a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET")


def test_backends_that_cannot_run_are_listed_with_the_reason(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends = available_backends()
    assert backends["reference"] is None
    assert backends["sdpa"] is None
    assert backends["triton"] == "it needs an NVIDIA GPU"
    assert "flash-attn is not installed" in backends["flash"]


def test_a_gpu_that_the_kernels_do_not_suit_is_named_with_its_capability(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "8.0 or higher, this GPU has 7.5"), ((10, 0), "12.x, this GPU has 10.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert reason in available_backends()["triton"]


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("triton", torch.float32, "needs its inputs on an NVIDIA GPU; these are on cpu"),
        ("triton", torch.float64, "computes in float16, bfloat16, float32; these inputs are float64"),
        ("flash", torch.float32, "computes in float16, bfloat16; these inputs are float32"),
        ("flash", torch.float16, "needs its inputs on an NVIDIA GPU; these are on cpu"),
        ("flsh", torch.float32, "no such backend"),
    ],
)
def test_asking_for_a_backend_that_cannot_run_names_the_reason_and_those_that_can(no_interpreter, name, dtype, reason):
    with pytest.raises(UnavailableBackendError, match=rf"'{name}' cannot run: .*{reason}.*'reference', 'sdpa'"):
        geometry_attention(*qkv(3, 2, 4, dtype=dtype), num_domains=3, num_heads=2, backend=name)


def test_without_a_name_sdpa_runs_and_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    inputs = qkv(3, 2, 4, dtype=torch.float32)
    with caplog.at_level(logging.INFO, logger="dreamdance_kernels"):
        outputs = [geometry_attention(*inputs, num_domains=3, num_heads=2) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa, torch's own, on cpu"]
    assert torch.equal(outputs[0], geometry_attention(*inputs, num_domains=3, num_heads=2, backend="sdpa"))


GPU, H200 = torch.device("cuda"), (9, 0)


@pytest.fixture
def gpu(monkeypatch):
    """The choice for a GPU depends on its capability alone; nothing is computed there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H200)


def test_a_gpu_uses_the_backend_measured_fastest_and_torchs_own_without_measurements(gpu, monkeypatch):
    case = MeasuredCase("temporal", 40, 16, 16, "sm_90", "triton", "0.10 ms against sdpa's 0.30 ms")
    monkeypatch.setattr(dispatch_table, "PACKAGED", (case,))
    measured = default_choice("temporal", 40, 24, 24, torch.bfloat16, GPU)
    assert measured == Choice("triton", case.reason)
    other = default_choice("geometry", 40, 4608, 4608, torch.bfloat16, GPU)
    assert other.backend == "sdpa"
    assert "not measured on sm_90" in other.reason


def test_inputs_that_the_fastest_backend_cannot_take_go_to_torchs_attention_with_the_reason(gpu, monkeypatch):
    case = MeasuredCase("temporal", 40, 16, 16, "sm_90", "triton", "0.10 ms against sdpa's 0.30 ms")
    monkeypatch.setattr(dispatch_table, "PACKAGED", (case,))
    choice = default_choice("temporal", 40, 16, 16, torch.float64, GPU)
    assert choice.backend == "sdpa"
    assert "triton cannot run: it computes in float16, bfloat16, float32; these inputs are float64" in choice.reason


class FlashAttention(ModuleType):
    """The one function of flash-attn that is used, with its documented layout: `(batch, n, heads, d)`."""

    @staticmethod
    def flash_attn_func(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


@pytest.mark.parametrize("name", ["geometry", "reference", "temporal"])
def test_flash_attention_is_given_its_own_layout(name, monkeypatch):
    """The package needs a GPU; here torch computes behind its interface."""
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention("flash_attn"))
    inputs = inputs_for(name, num_tokens=5, width=10)
    monkeypatch.setitem(dispatch._CANDIDATES, "flash", dispatch._Candidate(flash))
    expected = call(name, inputs, num_heads=2, backend="reference")
    torch.testing.assert_close(call(name, inputs, num_heads=2, backend="flash"), expected)


def test_the_package_exports_the_contract():
    assert {"geometry_attention", "reference_attention", "temporal_attention", "available_backends"} <= set(
        dreamdance_kernels.__all__
    )


def test_a_batch_that_is_not_whole_frames_or_clips_is_refused():
    with pytest.raises(ValueError, match=r"num_domains=3 does not divide the batch of 4"):
        geometry_attention(*qkv(4, 2, 4), num_domains=3, num_heads=2)
    with pytest.raises(ValueError, match=r"num_frames=0 does not divide the batch of 4"):
        temporal_attention(*qkv(4, 2, 4), num_frames=0, num_heads=2)
    with pytest.raises(ValueError, match=r"3 references cannot be shared out evenly to a batch of 4"):
        reference_attention(*qkv(4, 2, 4), *tokens(2, 3, 2, 4).unbind(0), num_heads=2)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"num_heads=3 does not divide the width 4"):
        temporal_attention(*qkv(4, 2, 4), num_frames=2, num_heads=3)


def test_shapes_and_dtypes_that_differ_are_refused():
    query, key, value = qkv(4, 2, 4)
    with pytest.raises(ValueError, match="one shape"):
        geometry_attention(query, key[:, :1], value, num_domains=2, num_heads=2)
    with pytest.raises(ValueError, match="one dtype"):
        geometry_attention(query, key.float(), value, num_domains=2, num_heads=2)
    with pytest.raises(ValueError, match="one shape"):
        reference_attention(query, key, value, key, value[:, :1], num_heads=2)
    with pytest.raises(ValueError, match="dtype of query"):
        reference_attention(query, key, value, key.float(), value.float(), num_heads=2)
    with pytest.raises(ValueError, match="both"):
        reference_attention(query, key, value, key, None, num_heads=2)
