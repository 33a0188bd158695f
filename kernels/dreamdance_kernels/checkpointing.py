"""Activation checkpointing that keeps what attention computed: its forward is dear, its output small.

Plain checkpointing runs a block's whole forward again. Attention is quadratic in its tokens while its output is linear
in them, so its result and log-sum-exp are kept and everything else is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dreamdance_kernels.attention_operator import OPERATOR

MUST_SAVE = frozenset(
    {
        OPERATOR,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""The operators whose results are kept: this package's own and torch's fused ones."""


def keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts`."""
    return CheckpointPolicy.MUST_SAVE if operator in MUST_SAVE else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_keeping_attention(function: Callable[..., Any], *inputs: Tensor | Any) -> Any:
    """`function(*inputs)`, its activations recomputed in the backward but for the results of attention.

    Args:
        function: such as a transformer block; diffusers' models take this whole function as their
            `enable_gradient_checkpointing(gradient_checkpointing_func=...)`.
        inputs: its arguments by position.
    """
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
