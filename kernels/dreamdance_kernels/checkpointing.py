"""Activation checkpointing that keeps attention's results, because they cost much to compute and little to store.

Plain checkpointing runs a block's whole forward again. The cost of attention grows with the square of the tokens, its
output only linearly. So its output and log-sum-exp are kept, and everything else is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dreamdance_kernels.attention_operator import OPERATOR

# The operators whose results are kept: this package's own, and torch's fused attentions.
MUST_SAVE = frozenset(
    {
        OPERATOR,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts`."""
    return CheckpointPolicy.MUST_SAVE if operator in MUST_SAVE else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_keeping_attention(function: Callable[..., Any], *inputs: Tensor | Any) -> Any:
    """Call `function(*inputs)`; the backward recomputes its activations, except the results of attention.

    Args:
        function: such as a transformer block. To checkpoint a diffusers model, pass `checkpoint_keeping_attention`
            itself to `enable_gradient_checkpointing(gradient_checkpointing_func=...)`.
        inputs: the function's arguments, by position.

    Returns:
        What `function` returns.
    """
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
