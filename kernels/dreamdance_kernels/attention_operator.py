"""The one operator behind the attention functions: strided inputs, up to two segments of keys, the second shared.

Letters: `b` outer batch, `i` inner batch, `l` queries, `k` own keys, `s` shared keys, `c = heads*d`. torch sees
the operator as one opaque node with a fake, a backward and a count of operations: a compiler does not trace into it, a
checkpointing policy can keep its result, and DeepSpeed's hooks see one module output. It has two implementations:
Triton's kernels, and torch's fused attention on CPU. The caller chooses one; by default the device decides.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Implementation = Literal["triton", "torch"]
Shape = Sequence[int]  # torch hands sizes, not tensors, to a count of operations

MAX_SHORT_LENGTH = 32  # the longest sequence that the kernel for many short ones takes


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None = None,
    shared_value: Tensor | None = None,
    *,
    num_heads: int,
    deterministic: bool | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Softmax attention of each (b, i) sample over its own keys and over those that all samples of its b share.

    Scores are scaled by d**-0.5. Under autocast the inputs take autocast's dtype, as torch's own attention does.

    Args:
        query: `b i l c`, any strides with a unit last one, such as a permuted view or a third of a packed projection.
        key: `b i k c`.
        value: as `key`.
        shared_key: `b s c`, or None for no second segment, as s = 0 is.
        shared_value: as `shared_key`.
        num_heads: heads, side by side in c.
        deterministic: whether the backward must give the same bits each time (no atomics, one more pass); None takes
            torch's switch, `torch.are_deterministic_algorithms_enabled()`.
        implementation: "triton", or "torch" (CPU only); None takes "torch" on CPU and "triton" elsewhere.

    Returns:
        `b i l c`, dense; its dimensions lie in memory in the order of the query's.

    Raises:
        ValueError: shapes, dtypes, devices or heads do not fit together, or the implementation is unknown.
    """
    if (shared_key is None) != (shared_value is None):
        raise ValueError("shared_key and shared_value: give both, or None for both")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if implementation is None:
        implementation = "torch" if query.device.type == "cpu" else "triton"
    elif implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} is none of {', '.join(get_args(Implementation))}")
    query, key, value = (_as_under_autocast(x) for x in (query, key, value))
    if shared_key is not None and shared_value is not None:
        shared_key, shared_value = _as_under_autocast(shared_key), _as_under_autocast(shared_value)
    _check_fit(query, key, value, shared_key, shared_value, num_heads=num_heads)
    if shared_key is not None and shared_key.shape[1] == 0:
        shared_key = shared_value = None
    inputs = (query, key, value, shared_key, shared_value)
    output: Tensor = _attention(*inputs, num_heads, deterministic, implementation)[0]
    return output


def _check_fit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    *,
    num_heads: int,
) -> None:
    """Refuse tensors that do not fit together: a kernel gets strides and one set of lengths, and checks nothing."""
    if query.dim() != 4:
        raise ValueError(f"query must be (b, i, l, heads*d); got {tuple(query.shape)}")
    b, i, _, width = query.shape
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {width}")
    if key.shape != value.shape or key.dim() != 4 or (*key.shape[:2], key.shape[3]) != (b, i, width):
        shapes = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise ValueError(f"key and value must share one shape ({b}, {i}, k, {width}); got {shapes}")
    tensors = [query, key, value]
    if shared_key is not None and shared_value is not None:
        shape = shared_key.shape
        if shape != shared_value.shape or len(shape) != 3 or (shape[0], shape[2]) != (b, width):
            shapes = f"{tuple(shape)} and {tuple(shared_value.shape)}"
            raise ValueError(f"shared_key and shared_value must share one shape ({b}, s, {width}); got {shapes}")
        tensors += [shared_key, shared_value]
    if len({(x.dtype, x.device) for x in tensors}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in tensors)
        raise ValueError(f"queries, keys and values must share one dtype and one device; got {found}")


def _as_under_autocast(tensor: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


@torch.library.custom_op("dreamdance::segmented_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    num_heads: int,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp `b i heads l` for the backward (empty where the backward recomputes it)."""
    if implementation == "torch":
        return _torch_forward(query, key, value, shared_key, shared_value, num_heads)
    if _is_short(query, key, shared_key):
        from dreamdance_kernels.triton_kernels import short

        return short.forward(query, key, value, num_heads=num_heads), query.new_empty(0, dtype=torch.float32)
    from dreamdance_kernels.triton_kernels import long_forward

    return long_forward.forward(query, key, value, shared_key, shared_value, num_heads=num_heads)


@torch.library.custom_op("dreamdance::segmented_attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    deterministic: bool,
    implementation: str,
    needs_shared: bool,
) -> list[Tensor]:
    """Gradients of query, key and value, and of the shared segment's two if there is one and they are needed."""
    inputs = (query, key, value, shared_key, shared_value)
    if implementation == "torch":
        return _torch_backward(grad_output, *inputs, output, log_sum_exp, num_heads, needs_shared=needs_shared)
    if _is_short(query, key, shared_key):
        from dreamdance_kernels.triton_kernels import short

        gradients = short.backward(grad_output, query, key, value, num_heads=num_heads)
    else:
        from dreamdance_kernels.triton_kernels import long_backward

        gradients = long_backward.backward(
            grad_output,
            *inputs,
            output,
            log_sum_exp,
            num_heads=num_heads,
            deterministic=deterministic,
            needs_shared=needs_shared,
        )
    found = (gradients.query, gradients.key, gradients.value, gradients.shared_key, gradients.shared_value)
    return [gradient for gradient in found if gradient is not None]


def _is_short(query: Tensor, key: Tensor, shared_key: Tensor | None) -> bool:
    """Whether the kernel for short sequences computes it. Shapes alone decide: forward, backward and fake agree."""
    return shared_key is None and query.shape[1] > 1 and query.shape[2] == key.shape[2] <= MAX_SHORT_LENGTH


@_attention.register_fake
def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    num_heads: int,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if implementation == "triton" and _is_short(query, key, shared_key):
        return torch.empty_like(query), query.new_empty(0, dtype=torch.float32)
    b, i, queries = query.shape[:3]
    return torch.empty_like(query), query.new_empty((b, i, num_heads, queries), dtype=_statistics_dtype(query))


@_attention_backward.register_fake
def _fake_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    deterministic: bool,
    implementation: str,
    needs_shared: bool,
) -> list[Tensor]:
    shared = (shared_key, shared_value) if needs_shared else ()
    return [torch.empty_like(x) for x in (query, key, value, *shared) if x is not None]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_heads, ctx.deterministic, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 8
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    needs_shared = any(ctx.needs_input_grad[3:5])  # not if they come from a frozen network
    gradients = _attention_backward(
        grad_output, *ctx.saved_tensors, ctx.num_heads, ctx.deterministic, ctx.implementation, needs_shared
    )
    return (*gradients, *(None,) * (8 - len(gradients)))


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)

# The operator as torch names it, for policies that list operators.
OPERATOR = torch.ops.dreamdance.segmented_attention.default


@register_flop_formula(torch.ops.dreamdance.segmented_attention)
def _count_forward(
    query: Shape, key: Shape, value: Shape, shared_key: Shape | None, *_: Any, out_shape: Any = None
) -> int:
    """Two products of 2*d operations for each pair of a query and a key, in every head."""
    b, i, queries, width = query
    keys = key[2] + (0 if shared_key is None else shared_key[1])
    return 4 * b * i * queries * keys * width


@register_flop_formula(torch.ops.dreamdance.segmented_attention_backward)
def _count_backward(
    grad_output: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    shared_key: Shape | None,
    shared_value: Shape | None,
    output: Shape,
    log_sum_exp: Shape,
    num_heads: int,
    deterministic: bool,
    implementation: str,
    needs_shared: bool,
    *,
    out_shape: Any = None,
) -> int:
    """Five products: the scores again, dP, dV, dQ and dK. Of a shared segment without gradient no dV and no dK.

    torch's kernel computes those too. The two products that the deterministic form computes again are not counted.
    """
    own = _count_forward(query, key, value, None)
    shared = _count_forward(query, key, value, shared_key) - own
    shared_products = 5 if needs_shared or implementation == "torch" else 3
    return (own * 5 + shared * shared_products) // 2


def _torch_forward(
    query: Tensor, key: Tensor, value: Tensor, shared_key: Tensor | None, shared_value: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    heads = [_split_heads(x, num_heads) for x in (query, _append(key, shared_key), _append(value, shared_value))]
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    result = torch.empty_like(query).copy_(_merge_heads(output, query))
    return result, rearrange(log_sum_exp, "(b i) heads l -> b i heads l", b=query.shape[0]).contiguous()


def _torch_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor | None,
    shared_value: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    *,
    needs_shared: bool,
) -> list[Tensor]:
    """Gradients from the saved log-sum-exp, without a second forward; the shared segment's is the sum over i.

    torch's kernel has no switch for single gradients: a shared segment without one saves its sum, not its products.
    """
    keys, values = _append(key, shared_key), _append(value, shared_value)
    heads = [_split_heads(x, num_heads) for x in (grad_output, query, keys, values, output)]
    statistics = rearrange(log_sum_exp, "b i heads l -> (b i) heads l")
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, statistics, 0.0, False)
    grad_query, grad_keys, grad_values = (_merge_heads(x, query) for x in found)
    own, inputs = key.shape[2], [query, key, value]
    gradients = [grad_query, grad_keys[:, :, :own], grad_values[:, :, :own]]
    if needs_shared and shared_key is not None and shared_value is not None:
        inputs += [shared_key, shared_value]
        gradients += [reduce(x[:, :, own:], "b i s c -> b s c", "sum") for x in (grad_keys, grad_values)]
    return [torch.empty_like(x).copy_(gradient) for x, gradient in zip(inputs, gradients, strict=True)]


def _append(own: Tensor, shared: Tensor | None) -> Tensor:
    if shared is None:
        return own
    return torch.cat([own, repeat(shared, "b s c -> b i s c", i=own.shape[1])], dim=2)


def _split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    return rearrange(tensor, "b i n (heads d) -> (b i) heads n d", heads=num_heads)


def _merge_heads(tensor: Tensor, query: Tensor) -> Tensor:
    return rearrange(tensor, "(b i) heads n d -> b i n (heads d)", b=query.shape[0])


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
