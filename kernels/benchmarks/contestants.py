"""The contestants that compute a workload: our kernels, and all that a user would take instead, with their copies.

A contestant's result is dense in the order that the model's next layer reads. The time includes all copies that a
contestant needs for this result and of its inputs.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import Inputs, Workload

from dreamdance_kernels import (
    geometry_attention,
    group_norm_silu,
    reference,
    reference_attention,
    sdpa,
    temporal_attention,
)

OURS = ("triton", "triton_deterministic")
CONCAT = "concat_"  # prefix of the names of the concat-and-repeat forms
TORCH_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FLASH_PACKAGES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
}
MAX_FLASH_BACKWARD_INDEX = 2**31  # flash-attn 2's backward indexes its float32 scratch in 32 bits (TabPFN issue 1184)
MAX_MATH_BYTES = 20 * 2**30  # of scores in float32; plain attention keeps several such tensors


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload.

    Args:
        name: its name in the tables.
        run: maps inputs to outputs; the first output is the result, of the others only the gradient is timed.
        prepare: brings the common inputs into this contestant's layout, differentiably and outside of its time.
        context: the context manager around its calls.
        why_not: the reason why it cannot run here, or None.
        compiled: needs long to compile; measured after the others.
        differs_backward_only: its forward is the same as another contestant's.
    """

    name: str
    run: Callable[[Inputs], tuple[Tensor, ...]]
    prepare: Callable[[Inputs], Inputs] = dict
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    why_not: str | None = None
    compiled: bool = False
    differs_backward_only: bool = False


def contestants(workload: Workload, *, on_gpu: bool) -> list[Contestant]:
    """Ours first, then every rival, also those that cannot run here, with the reason."""
    if workload.function == "group_norm_silu":
        return _normalisations(workload, on_gpu=on_gpu)
    return [*_ours(workload, on_gpu=on_gpu), *_rivals(workload, on_gpu=on_gpu)]


def _ours(workload: Workload, *, on_gpu: bool) -> list[Contestant]:
    run = _named_backend(workload, "triton")
    how = "" if on_gpu else " (interpreted)"
    deterministic = Contestant(
        f"triton_deterministic{how}", run, context=deterministic_algorithms, differs_backward_only=True
    )
    return [Contestant(f"triton{how}", run), deterministic]


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Deterministic algorithms without the filling of new tensors, a debugging aid that takes time."""
    settings: Any = torch.utils.deterministic  # a module whose attribute is a property, unknown to type checkers
    enabled, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        settings.fill_uninitialized_memory = fills


def _named_backend(workload: Workload, backend: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    heads = workload.num_heads

    def run(x: Inputs) -> tuple[Tensor, ...]:
        if workload.function == "reference":
            query, key, value, shared_key, shared_value = _project(x)
            output = reference_attention(query, key, value, shared_key, shared_value, num_heads=heads, backend=backend)
        elif workload.function == "temporal":
            output = temporal_attention(
                x["query"], x["key"], x["value"], num_frames=workload.inner, num_heads=heads, backend=backend
            )
        else:
            output = geometry_attention(
                x["query"], x["key"], x["value"], num_domains=workload.inner, num_heads=heads, backend=backend
            )
        return (output.contiguous(),)

    return run


def _project(x: Inputs) -> tuple[Tensor, ...]:
    """Query, key and value of the samples, then key and value of the reference, each projected once."""
    own = [F.linear(x["hidden"], x[f"weight_{name}"]) for name in ("q", "k", "v")]
    return (*own, *(F.linear(x["reference"], x[f"weight_{name}"]) for name in ("k", "v")))


def _rivals(workload: Workload, *, on_gpu: bool) -> list[Contestant]:
    default = Contestant("sdpa", _with_attend(workload, sdpa.attend_with_torch))
    found = [default]
    for name, backend in TORCH_BACKENDS.items():
        context = _only(backend)
        why_not = _why_not_torch(workload, name)
        forms = {f"sdpa_{name}": Contestant(f"sdpa_{name}", default.run, context=context, why_not=why_not)}
        if workload.function == "temporal":
            run, prepare = _permuted_form(workload)
            forms["permuted"] = Contestant(f"permuted_{name}", run, prepare, context, why_not)
        if name != "math" and (workload.with_concat or workload.function == "reference"):
            run = _concat_domains(workload) if workload.function == "geometry" else _concat_hidden(workload)
            forms["concat"] = Contestant(f"{CONCAT}{name}", run, context=context, why_not=why_not)
        found.extend(forms.values())
    for name, package in FLASH_PACKAGES.items():
        why_not = _why_not_package(package, on_gpu=on_gpu) or _why_not_torch(workload, "flash")
        found.append(Contestant(name, _with_attend(workload, _attend_with_package(package)), why_not=why_not))
    if workload.with_compiled:
        found.append(_flex(workload, on_gpu=on_gpu))
        if workload.function == "temporal":
            found.append(_compiled("compiled_einsum", _plain_temporal(workload), on_gpu=on_gpu))
    return found


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager[object]]:
    return lambda: sdpa_kernel([backend])


def _with_attend(workload: Workload, attend: sdpa.Attend) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The function on the views of the backend `sdpa`, computed by `attend`."""
    heads = workload.num_heads

    def run(x: Inputs) -> tuple[Tensor, ...]:
        if workload.function == "reference":
            output = sdpa.reference_attention(*_project(x), num_heads=heads, attend=attend)
        elif workload.function == "temporal":
            qkv = (x["query"], x["key"], x["value"])
            output = sdpa.temporal_attention(*qkv, num_frames=workload.inner, num_heads=heads, attend=attend)
        else:
            qkv = (x["query"], x["key"], x["value"])
            output = sdpa.geometry_attention(*qkv, num_domains=workload.inner, num_heads=heads, attend=attend)
        return (output.contiguous(),)

    return run


def _permuted_form(
    workload: Workload,
) -> tuple[Callable[[Inputs], tuple[Tensor, ...]], Callable[[Inputs], Inputs]]:
    """Temporal attention as in AnimateDiff: hidden states permuted to `(b n) f c` before the projection, and back.

    No contestant's time includes the projections. So queries, keys and values come in that order already, and the
    permutation of the hidden states is timed on a tensor of their size.
    """
    frames, heads = workload.inner, workload.num_heads

    def prepare(x: Inputs) -> Inputs:
        packed = rearrange(torch.cat([x["query"], x["key"], x["value"]], -1), "(b f) n c -> (b n) f c", f=frames)
        query, key, value = packed.contiguous().chunk(3, dim=-1)
        return {"query": query, "key": key, "value": value, "hidden": x["query"].detach().contiguous()}

    def run(x: Inputs) -> tuple[Tensor, ...]:
        permuted = rearrange(x["hidden"], "(b f) n c -> (b n) f c", f=frames).contiguous()
        query, key, value = (
            rearrange(x[name], "bn f (heads d) -> bn heads f d", heads=heads) for name in ("query", "key", "value")
        )
        output = sdpa.attend_with_torch(query, key, value)
        output = rearrange(output, "(b n) heads f d -> (b f) n (heads d)", b=workload.outer)
        return output.contiguous(), permuted

    return run, prepare


def _concat_domains(workload: Workload) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Geometry attention as in Wonder3D: keys of all domains concatenated, repeated for each domain, heads split."""
    domains, heads = workload.inner, workload.num_heads

    def gather(x: Tensor) -> Tensor:
        joined = torch.cat(rearrange(x, "(b m) n c -> b m n c", m=domains).unbind(1), dim=1)
        return _split_heads(repeat(joined, "b n c -> (b m) n c", m=domains), heads)

    def run(x: Inputs) -> tuple[Tensor, ...]:
        query, key, value = _split_heads(x["query"], heads), gather(x["key"]), gather(x["value"])
        output = F.scaled_dot_product_attention(query, key, value)
        return (rearrange(output, "b heads n d -> b n (heads d)").contiguous(),)

    return run


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Split heads as diffusers' `head_to_batch_dim` does, with a copy, but keep the heads as a dimension."""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads).contiguous()


def _concat_hidden(workload: Workload) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Reference attention as in AnimateAnyone: hidden states concatenated, then all projected."""
    heads, samples = workload.num_heads, workload.inner

    def run(x: Inputs) -> tuple[Tensor, ...]:
        joined = torch.cat([x["hidden"], repeat(x["reference"], "b n c -> (b r) n c", r=samples)], dim=1)
        query = F.linear(x["hidden"], x["weight_q"])
        key, value = (F.linear(joined, x[f"weight_{name}"]) for name in ("k", "v"))
        query, key, value = (rearrange(y, "b n (heads d) -> b heads n d", heads=heads) for y in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value)
        return (rearrange(output, "b heads n d -> b n (heads d)").contiguous(),)

    return run


def _plain_temporal(workload: Workload) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def run(x: Inputs) -> tuple[Tensor, ...]:
        qkv = (x["query"], x["key"], x["value"])
        output = reference.temporal_attention(*qkv, num_frames=workload.inner, num_heads=workload.num_heads)
        return (output.contiguous(),)

    return run


def _flex(workload: Workload, *, on_gpu: bool) -> Contestant:
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False, backend="inductor" if on_gpu else "aot_eager")
    return Contestant(_compiled_name("flex", on_gpu=on_gpu), _with_attend(workload, attend), compiled=True)


def _compiled(name: str, run: Callable[[Inputs], tuple[Tensor, ...]], *, on_gpu: bool) -> Contestant:
    compiled = torch.compile(run, dynamic=False, backend="inductor" if on_gpu else "aot_eager")
    return Contestant(_compiled_name(name, on_gpu=on_gpu), compiled, compiled=True)


def _compiled_name(name: str, *, on_gpu: bool) -> str:
    """The name; without a GPU no code is generated, only the path traced, and the name shows it."""
    return name if on_gpu else f"{name} (traced only)"


def _attend_with_package(package: str) -> sdpa.Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        flash_attn_func = importlib.import_module(package).flash_attn_func
        found = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attend


def _why_not_package(package: str, *, on_gpu: bool) -> str | None:
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"the package {package} is not installed"
    return None if on_gpu else "it needs a GPU"


def _why_not_torch(workload: Workload, name: str) -> str | None:
    """The reason not to run torch's attention `name`: it would end the process or take all memory; None otherwise."""
    if name == "math":
        scores = 4 * workload.num_softmaxes * workload.num_queries * workload.num_keys
        if scores > MAX_MATH_BYTES:
            return f"its scores would take {scores / 2**30:.0f} GiB several times over"
    if name == "flash":
        batch_and_heads = min(workload.num_softmaxes, sdpa.MAX_BATCH * workload.num_heads)
        rows = 128 * math.ceil(workload.num_queries / 128)
        padded_width = 32 * math.ceil(workload.head_width / 32)
        if batch_and_heads * rows * padded_width >= MAX_FLASH_BACKWARD_INDEX:
            return "flash-attn 2's backward would index past 2^31 and end the process"
    return None


def _normalisations(workload: Workload, *, on_gpu: bool) -> list[Contestant]:
    groups = workload.num_heads

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        output = group_norm_silu(x["picture"], groups, x["weight"], x["bias"])
        if not output.is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError("group_norm_silu passed this input to torch; its log gives the reason")
        return (output,)

    def plain(x: Inputs) -> tuple[Tensor, ...]:
        output = F.silu(F.group_norm(x["picture"], groups, x["weight"], x["bias"]))
        return (output.contiguous(memory_format=torch.channels_last),)

    found = [Contestant("triton" if on_gpu else "triton (operator on CPU)", ours), Contestant("torch", plain)]
    return [*found, _compiled("compiled", plain, on_gpu=on_gpu)] if workload.with_compiled else found
