"""Backend `sdpa`: torch's fused attention, on views of the inputs wherever their strides allow views.

Other attentions with one tensor of keys (flash-attn) can be passed as `attend`. Geometry attention copies nothing: with
domains innermost (contract C1) merging `(m n)` is a view, also of a packed qkv projection. Reference attention copies
keys and values once, together with the reference, which it reads through an expanded view. Temporal attention is a view
for one clip and copies for several.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

# Query, key and value to the result, each `batch heads n d`.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_BATCH = 65_535  # the longest grid axis, on which CUDA's fused kernels put the batch; temporal attention exceeds it


def attend_with_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Fused attention of `(batch, heads, n, d)`, in several calls if the batch is too long for one."""
    if query.shape[0] <= MAX_BATCH:
        return F.scaled_dot_product_attention(query, key, value)
    pieces = zip(*(x.split(MAX_BATCH) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces])


def geometry_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_domains: int, num_heads: int, attend: Attend = attend_with_torch
) -> Tensor:
    """Eq. 5 as one self-attention over the merged tokens of all domains. Tensors: `((b f m), n, heads*d)`."""
    query, key, value = (
        rearrange(x, "(b m) n (heads d) -> b heads (m n) d", m=num_domains, heads=num_heads)
        for x in (query, key, value)
    )
    output = attend(query, key, value)
    return rearrange(output, "b heads (m n) d -> (b m) n (heads d)", m=num_domains)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    *,
    num_heads: int,
    attend: Attend = attend_with_torch,
) -> Tensor:
    """Eq. 4 with the reference's tokens appended to each sample's own; without a reference, plain self-attention."""
    if reference_key is not None and reference_value is not None and reference_key.shape[1] > 0:
        key, value = _append(key, reference_key), _append(value, reference_value)
    query, key, value = (rearrange(x, "b n (heads d) -> b heads n d", heads=num_heads) for x in (query, key, value))
    return rearrange(attend(query, key, value), "b heads n d -> b n (heads d)")


def temporal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_frames: int, num_heads: int, attend: Attend = attend_with_torch
) -> Tensor:
    """Attention over the frames; each place n is one sequence. Tensors: `((b f), n, heads*d)`."""
    num_tokens = query.shape[1]
    query, key, value = (
        rearrange(x, "(b f) n (heads d) -> (b n) heads f d", f=num_frames, heads=num_heads) for x in (query, key, value)
    )
    output = attend(query, key, value)
    return rearrange(output, "(b n) heads f d -> (b f) n (heads d)", n=num_tokens)


def _append(own: Tensor, shared: Tensor) -> Tensor:
    """`((b r), n, c)` and `(b, n_ref, c)` to `((b r), n + n_ref, c)`, in one copy; the expanded reference is a view."""
    own = rearrange(own, "(b r) n c -> b r n c", b=shared.shape[0])
    expanded = repeat(shared, "b n c -> b r n c", r=own.shape[1])
    return rearrange(torch.cat([own, expanded], dim=2), "b r n c -> (b r) n c")
