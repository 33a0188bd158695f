"""Backend `reference`: the three attentions written out in plain torch, one axis per letter, nothing merged.

The tests compare the other backends with this one. It is readable and slow, and takes any dtype (float64 included) on
any device. It holds every score, so its memory grows with the square of the sequence. It keeps apart the axes that the
other backends merge or concatenate, so that it cannot share an error of layout with them.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor


def geometry_attention(query: Tensor, key: Tensor, value: Tensor, *, num_domains: int, num_heads: int) -> Tensor:
    """Eq. 5: the queries (m i) of each domain attend to the keys (l j) of all. Tensors: `((b f m), n, heads*d)`."""
    query, key, value = (
        rearrange(x, "(b m) n (heads d) -> b m n heads d", m=num_domains, heads=num_heads) for x in (query, key, value)
    )
    scores = einsum(query, key, "b m i heads d, b l j heads d -> b heads m i l j") * query.shape[-1] ** -0.5
    weights = scores.flatten(-2).softmax(dim=-1).unflatten(-1, scores.shape[-2:])
    output: Tensor = einsum(weights, value, "b heads m i l j, b l j heads d -> b m i heads d")
    return rearrange(output, "b m n heads d -> (b m) n (heads d)")


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    *,
    num_heads: int,
) -> Tensor:
    """Eq. 4: r samples share a reference; each attends to its own keys (j) and the reference's (l) in one softmax."""
    if reference_key is None or reference_value is None:
        reference_key, reference_value = key[:1, :0], value[:1, :0]
    num_references, num_own_tokens = reference_key.shape[0], key.shape[1]
    query, key, value = (
        rearrange(x, "(b r) n (heads d) -> b r n heads d", b=num_references, heads=num_heads)
        for x in (query, key, value)
    )
    reference_key, reference_value = (
        rearrange(x, "b n (heads d) -> b n heads d", heads=num_heads) for x in (reference_key, reference_value)
    )
    own_scores = einsum(query, key, "b r i heads d, b r j heads d -> b r heads i j")
    reference_scores = einsum(query, reference_key, "b r i heads d, b l heads d -> b r heads i l")
    scores = torch.cat([own_scores, reference_scores], dim=-1) * query.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1)
    own: Tensor = einsum(weights[..., :num_own_tokens], value, "b r heads i j, b r j heads d -> b r i heads d")
    shared: Tensor = einsum(
        weights[..., num_own_tokens:], reference_value, "b r heads i l, b l heads d -> b r i heads d"
    )
    return rearrange(own + shared, "b r n heads d -> (b r) n (heads d)")


def temporal_attention(query: Tensor, key: Tensor, value: Tensor, *, num_frames: int, num_heads: int) -> Tensor:
    """Each token attends over the frames (i to j) at its own place n. Tensors: `((b f), n, heads*d)`."""
    query, key, value = (
        rearrange(x, "(b f) n (heads d) -> b f n heads d", f=num_frames, heads=num_heads) for x in (query, key, value)
    )
    scores = einsum(query, key, "b i n heads d, b j n heads d -> b n heads i j") * query.shape[-1] ** -0.5
    output: Tensor = einsum(scores.softmax(dim=-1), value, "b n heads i j, b j n heads d -> b i n heads d")
    return rearrange(output, "b f n heads d -> (b f) n (heads d)")
