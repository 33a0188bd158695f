"""The denoiser's spatial self-attention, which also attends to the reference image (Eq. 4)."""

from diffusers.models.attention_processor import Attention
from torch import Tensor

from dreamdance_kernels import reference_attention


def attend_to_reference(
    attention: Attention, hidden_states: Tensor, reference: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """The denoiser's self-attention with keys and values of both the sample and the reference, Eq. 4.

    The denoiser's own W_k and W_v project the reference, once per reference image, not once per sample.

    Args:
        attention: diffusers' module, the `attn1` of a transformer block.
        hidden_states: `((b f m) n c)`, after `norm1`.
        reference: `(b n_ref c)`, the reference UNet's features at the same place, or None for plain self-attention.
        backend: backend of `dreamdance_kernels`; None lets it choose.

    Returns:
        `((b f m) n c)`, without the residual.
    """
    query, key, value = (project(hidden_states) for project in (attention.to_q, attention.to_k, attention.to_v))
    reference_key = reference_value = None
    if reference is not None:
        reference = reference.to(hidden_states.dtype)
        reference_key, reference_value = attention.to_k(reference), attention.to_v(reference)
    attended = reference_attention(
        query, key, value, reference_key, reference_value, num_heads=attention.heads, backend=backend
    )
    projection, dropout = attention.to_out
    return dropout(projection(attended))
