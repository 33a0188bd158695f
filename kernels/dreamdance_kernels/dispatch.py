"""Which backend computes an attention: named by the caller or chosen here, never exchanged in silence.

A backend is an object with the three functions of `AttentionBackend`; the modules `reference` and `sdpa` are such
objects. A further one (Triton, flash-attn) enters by a line in `_BACKENDS`, or with the reason why it cannot run here.
"""

import logging
from typing import Protocol

import torch
from torch import Tensor

from dreamdance_kernels import reference, sdpa

logger = logging.getLogger(__name__)

DEFAULT_BACKEND = "sdpa"


class AttentionBackend(Protocol):
    """What a backend provides; shapes as in `dreamdance_kernels.functions`, arguments already checked."""

    def geometry_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_domains: int, num_heads: int
    ) -> Tensor: ...

    def reference_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reference_key: Tensor | None,
        reference_value: Tensor | None,
        *,
        num_heads: int,
    ) -> Tensor: ...

    def temporal_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_frames: int, num_heads: int
    ) -> Tensor: ...


# Each backend, or the reason why it cannot run on this machine.
_BACKENDS: dict[str, AttentionBackend | str] = {
    "reference": reference,
    "sdpa": sdpa,
    "triton": "its kernels are not part of this version",
}
_announced: set[str | None] = set()


class UnavailableBackendError(ValueError):
    """An attention backend was asked for that is unknown or cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and the reason where it cannot."""
    return {name: entry if isinstance(entry, str) else None for name, entry in _BACKENDS.items()}


def choose_backend(name: str | None) -> AttentionBackend:
    """The backend of that name; `None` is torch's fused attention, which is always there.

    Raises:
        UnavailableBackendError: the name is unknown, or the backend cannot run; the text says why, and what can.
    """
    backend = _BACKENDS.get(DEFAULT_BACKEND if name is None else name, "no such backend")
    if isinstance(backend, str):
        runnable = ", ".join(repr(other) for other, reason in available_backends().items() if reason is None)
        raise UnavailableBackendError(
            f"attention backend {name!r} cannot run: {backend}. Available here: {runnable}, or null to let the "
            "library choose (model.attention_backend)."
        )
    _announce(name)
    return backend


def _announce(name: str | None) -> None:
    """Say once per process and name which backend runs, and why; a graph being compiled has nothing to say."""
    if name in _announced or torch.compiler.is_compiling():
        return
    _announced.add(name)
    if name is None:
        logger.info("attention backend: %s, the default (none was named)", DEFAULT_BACKEND)
    else:
        logger.info("attention backend: %s, as asked for", name)
