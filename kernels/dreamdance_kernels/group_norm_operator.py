"""Group normalisation, its affine map and SiLU as one operator that keeps channels_last, forward and backward.

On a GPU torch's group norm turns a channels_last input into a contiguous one and keeps the normalised values for SiLU's
backward. Here two Triton passes read and write channels_last, the layout of the convolutions, and the backward computes
the normalised values again from the input and its statistics. On CPU the operator calls torch's kernels.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from dreamdance_kernels import triton_package

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_CAPABILITY = (8, 0)  # the oldest for which the kernels are built and checked

_announced: set[str | None] = set()


def group_norm_silu(
    hidden_states: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, activation: bool = True
) -> Tensor:
    """Compute `silu(group_norm(x))`: on CPU bit for bit as torch does, on a GPU with Triton's kernels if channels_last.

    Other inputs on a GPU go to torch's functions; the log shows once which implementation runs, and why. The kernels
    add in float32 and in a fixed order: the same input has the same gradients. Under CUDA's autocast the computation
    and the result are in float32, as in `torch.nn.functional.group_norm`. The backward has no derivative.

    Args:
        hidden_states: `n c h w`, `n c f h w`, or `n c` followed by any dimensions.
        num_groups: groups of neighbouring channels; divides c.
        weight: `c`, in the dtype of `hidden_states` (or float32 beside half precision).
        bias: as `weight`.
        eps: added to the variance.
        activation: whether to apply SiLU; without it the result is the group norm, in channels_last.

    Returns:
        The shape of `hidden_states`, in its memory format; contiguous where torch computes on a GPU.

    Raises:
        ValueError: the groups do not divide the channels, or weight and bias are not one number for each channel.
    """
    channels = hidden_states.shape[1] if hidden_states.dim() > 1 else 0
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the channels of {tuple(hidden_states.shape)}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias must have the shape ({channels},), one number for each channel; "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if hidden_states.dim() == 5 and hidden_states.is_contiguous(memory_format=torch.channels_last_3d):
        # frames and rows as one axis: a view in channels_last, which Triton's kernels take
        folded = group_norm_silu(hidden_states.flatten(2, 3), num_groups, weight, bias, eps, activation=activation)
        clips: Tensor = folded.unflatten(2, hidden_states.shape[2:4])
        return clips
    reason = _why_not_triton(hidden_states)
    _log_once(reason)
    if reason is not None and hidden_states.device.type != "cpu":
        normalised = F.group_norm(hidden_states, num_groups, weight, bias, eps)
        return F.silu(normalised) if activation else normalised
    output: Tensor = _group_norm_silu(hidden_states, weight, bias, num_groups, eps, activation)[0]
    return output


def _why_not_triton(hidden_states: Tensor) -> str | None:
    """The reason why Triton's kernels do not take this input; None if they do."""
    if hidden_states.device.type != "cuda":
        return f"the input is on {hidden_states.device.type}"
    if hidden_states.dim() != 4 or not hidden_states.is_contiguous(memory_format=torch.channels_last):
        return "the input is not channels_last"
    if hidden_states.dtype not in KERNEL_DTYPES:
        return f"the input is {hidden_states.dtype}"
    if hidden_states.numel() == 0:
        return "the input is empty"
    reason: str | None = _why_not_on(hidden_states.device)
    return reason


@torch.compiler.assume_constant_result
def _why_not_on(device: torch.device) -> str | None:
    if (reason := triton_package.why_unusable()) is not None:
        return reason
    found = torch.cuda.get_device_capability(device)
    if found < KERNEL_CAPABILITY:
        return f"the GPU's compute capability is {found}, below {KERNEL_CAPABILITY}"
    return triton_package.why_unable_to_start()


def _log_once(reason: str | None) -> None:
    """Log each reason once per process, with the implementation that runs; log nothing while a graph is compiled."""
    if torch.compiler.is_compiling() or reason in _announced:
        return
    _announced.add(reason)
    if reason is None:
        logger.info("group norm: Triton's kernels, the input is channels_last")
    else:
        logger.info("group norm: torch's own, because %s", reason)


@torch.library.custom_op("dreamdance::group_norm_silu", mutates_args=(), device_types="cpu")
def _group_norm_silu(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and for the backward mean and reciprocal deviation, `n groups`, float32 for half precision."""
    hidden_states = _in_own_layout(hidden_states, hidden_states)
    dtype = _statistics_dtype(hidden_states)
    # half precision beside float32 weights gives the same output, and statistics that are not rounded
    output, mean, reciprocal_deviation = torch.native_group_norm(
        hidden_states, weight.to(dtype), bias.to(dtype), *_sizes(hidden_states), num_groups, eps
    )
    return F.silu(output) if activation else output, mean, reciprocal_deviation


@torch.library.custom_op("dreamdance::group_norm_silu_backward", mutates_args=(), device_types="cpu")
def _group_norm_silu_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    mean: Tensor,
    reciprocal_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, weight and bias."""
    hidden_states = _in_own_layout(hidden_states, hidden_states)
    if activation:
        normalised = _normalise_again(hidden_states, mean, reciprocal_deviation, weight, bias)
        grad_output = torch.ops.aten.silu_backward(grad_output.to(normalised.dtype), normalised)
    num_groups = mean.shape[1]
    grad_hidden_states, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        _in_own_layout(grad_output.to(hidden_states.dtype), hidden_states),
        hidden_states,
        mean,
        reciprocal_deviation,
        weight.to(mean.dtype),
        *_sizes(hidden_states),
        num_groups,
        [True, True, True],
    )
    return grad_hidden_states, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


@_group_norm_silu.register_kernel("cuda")
def _run_triton(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dreamdance_kernels.triton_kernels import group_norm

    found = group_norm.forward(
        hidden_states, weight.contiguous(), bias.contiguous(), num_groups=num_groups, eps=eps, activation=activation
    )
    return found.output, found.mean, found.reciprocal_deviation


@_group_norm_silu_backward.register_kernel("cuda")
def _run_triton_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    mean: Tensor,
    reciprocal_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from dreamdance_kernels.triton_kernels import group_norm

    found = group_norm.backward(
        grad_output.contiguous(memory_format=torch.channels_last),
        hidden_states,
        mean,
        reciprocal_deviation,
        weight.contiguous(),
        bias.contiguous(),
        activation=activation,
    )
    return found.hidden_states, found.weight, found.bias


@_group_norm_silu.register_fake
def _fake(
    hidden_states: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(hidden_states, memory_format=suggest_memory_format(hidden_states))
    shape, dtype = (hidden_states.shape[0], num_groups), _statistics_dtype(hidden_states)
    return output, hidden_states.new_empty(shape, dtype=dtype), hidden_states.new_empty(shape, dtype=dtype)


@_group_norm_silu_backward.register_fake
def _fake_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    mean: Tensor,
    reciprocal_deviation: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(hidden_states, memory_format=suggest_memory_format(hidden_states))
    return gradient, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_states, weight, bias, _, _, ctx.activation = inputs
    ctx.save_for_backward(hidden_states, *output[1:], weight, bias)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    return *_group_norm_silu_backward(grad_output, *ctx.saved_tensors, ctx.activation), None, None, None


_group_norm_silu.register_autograd(_differentiate, setup_context=_save_for_backward)
_group_norm_silu.register_autocast("cuda", torch.float32)


def _in_own_layout(tensor: Tensor, hidden_states: Tensor) -> Tensor:
    """Return `tensor`, dense, in the memory format that torch suggests for `hidden_states`."""
    return tensor.contiguous(memory_format=suggest_memory_format(hidden_states))


def _sizes(hidden_states: Tensor) -> tuple[int, int, int]:
    """Samples, channels and positions."""
    samples, channels, *rest = hidden_states.shape
    return samples, channels, torch.Size(rest).numel()


def _statistics_dtype(hidden_states: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_states.dtype, torch.float32)


def _normalise_again(
    hidden_states: Tensor, mean: Tensor, reciprocal_deviation: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The normalised values before SiLU: torch's formula on the saved statistics, in their dtype."""
    group_size, behind = hidden_states.shape[1] // mean.shape[1], (1,) * (hidden_states.dim() - 2)
    mean, scale = (x.repeat_interleave(group_size, dim=1) for x in (mean, reciprocal_deviation))
    scale = scale * weight.to(scale.dtype)
    offset = bias.to(scale.dtype) - mean * scale
    scale, offset = (x.unflatten(1, (-1, *behind)) for x in (scale, offset))
    return torch.addcmul(offset, hidden_states.to(scale.dtype), scale)
