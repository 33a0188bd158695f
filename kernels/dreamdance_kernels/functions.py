"""The three attention functions of contract C2. They check their inputs, choose a backend and call it.

Letters as in `dreamdance.models`: `b` clips, `f` frames, `m` domains (innermost of the batch), `n` tokens, `d` head
width. Queries, keys and values may be strided views, such as a packed qkv projection split in three.
"""

from torch import Tensor

from dreamdance_kernels.dispatch import AttentionCall, choose_backend


def geometry_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_domains: int, num_heads: int, backend: str | None = None
) -> Tensor:
    """Geometry attention, Eq. 5: every domain's queries attend to the keys and values of all domains of its frame.

    Args:
        query: `((b f m), n, heads*d)`.
        key: as `query`.
        value: as `query`.
        num_domains: m, the innermost factor of the batch; with 1 this is self-attention.
        num_heads: heads; any head width d.
        backend: a name of `available_backends()`, or None for the default.

    Returns:
        `((b f m), n, heads*d)`.

    Raises:
        ValueError: shapes, dtypes or counts do not fit together.
        UnavailableBackendError: the backend cannot run here.
    """
    _check_same_shape(query, key, value)
    _check_heads(query, num_heads)
    _check_divides(query, num_domains, "num_domains")
    call = _describe("geometry", query, num_heads, length=num_domains * query.shape[1])
    return choose_backend(backend, call).geometry_attention(
        query, key, value, num_domains=num_domains, num_heads=num_heads
    )


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    *,
    num_heads: int,
    backend: str | None = None,
) -> Tensor:
    """Spatial attention, Eq. 4: keys and values are each sample's own and those of its reference, concatenated.

    Args:
        query: `((b r), n, heads*d)`; the r samples of one reference (its frames and domains) lie side by side.
        key: as `query`.
        value: as `query`.
        reference_key: `(b, n_ref, heads*d)`, or None for no second segment, as n_ref = 0 is.
        reference_value: as `reference_key`.
        num_heads: heads; any head width d.
        backend: a name of `available_backends()`, or None for the default.

    Returns:
        `((b r), n, heads*d)`.

    Raises:
        ValueError: shapes, dtypes or counts do not fit together.
        UnavailableBackendError: the backend cannot run here.
    """
    _check_same_shape(query, key, value)
    _check_heads(query, num_heads)
    if (reference_key is None) != (reference_value is None):
        raise ValueError("reference_key and reference_value: give both, or None for both")
    if reference_key is not None and reference_value is not None:
        _check_reference(query, reference_key, reference_value)
    num_reference_tokens = 0 if reference_key is None else reference_key.shape[1]
    call = _describe("reference", query, num_heads, length=query.shape[1], num_extra_keys=num_reference_tokens)
    return choose_backend(backend, call).reference_attention(
        query, key, value, reference_key, reference_value, num_heads=num_heads
    )


def temporal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_frames: int, num_heads: int, backend: str | None = None
) -> Tensor:
    """Temporal attention: every token attends to the tokens at its own place in all frames of its clip.

    Args:
        query: `((b f), n, heads*d)`; with several domains their tokens stand in n, as the view `(b f) (m n) c`.
        key: as `query`.
        value: as `query`.
        num_frames: f, the innermost factor of the batch; with 1 the result is `value`.
        num_heads: heads; any head width d.
        backend: a name of `available_backends()`, or None for the default.

    Returns:
        `((b f), n, heads*d)`.

    Raises:
        ValueError: shapes, dtypes or counts do not fit together.
        UnavailableBackendError: the backend cannot run here.
    """
    _check_same_shape(query, key, value)
    _check_heads(query, num_heads)
    _check_divides(query, num_frames, "num_frames")
    call = _describe("temporal", query, num_heads, length=num_frames)
    return choose_backend(backend, call).temporal_attention(
        query, key, value, num_frames=num_frames, num_heads=num_heads
    )


def _describe(function: str, query: Tensor, num_heads: int, *, length: int, num_extra_keys: int = 0) -> AttentionCall:
    head_width = query.shape[-1] // num_heads
    return AttentionCall(function, head_width, length, length + num_extra_keys, query.dtype, query.device)


def _check_same_shape(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 3 or not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must share one shape (batch, n, heads*d); got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must share one dtype; got {query.dtype}, {key.dtype}, {value.dtype}")


def _check_heads(query: Tensor, num_heads: int) -> None:
    if num_heads < 1 or query.shape[-1] % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {query.shape[-1]}")


def _check_divides(query: Tensor, count: int, name: str) -> None:
    if count < 1 or query.shape[0] % count:
        raise ValueError(f"{name}={count} does not divide the batch of {query.shape[0]}")


def _check_reference(query: Tensor, reference_key: Tensor, reference_value: Tensor) -> None:
    shape = reference_key.shape
    if len(shape) != 3 or shape != reference_value.shape or shape[-1] != query.shape[-1]:
        raise ValueError(
            f"reference_key and reference_value must share one shape (b, n_ref, {query.shape[-1]}); "
            f"got {tuple(shape)} and {tuple(reference_value.shape)}"
        )
    if shape[0] < 1 or query.shape[0] % shape[0]:
        raise ValueError(f"{shape[0]} references cannot be shared out evenly to a batch of {query.shape[0]}")
    if not query.dtype == reference_key.dtype == reference_value.dtype:
        raise ValueError(
            f"the reference must have the dtype of query, {query.dtype}; "
            f"got {reference_key.dtype} and {reference_value.dtype}"
        )
