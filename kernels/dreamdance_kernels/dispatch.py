"""Chooses the backend that computes an attention. A backend that the caller names runs, or raises; nothing replaces it.

A backend is an object with the three functions of `AttentionBackend`, such as a module. To add one, write such a module
and add a line to `_CANDIDATES`; kernels/README.md lists all steps.
"""

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dreamdance_kernels import dispatch_table, flash, reference, sdpa, triton_attention
from dreamdance_kernels.dispatch_table import Choice

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class AttentionCall:
    """Everything that the choice of a backend may depend on; the lengths are those of one softmax."""

    function: str
    head_width: int
    num_queries: int
    num_keys: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Candidate:
    """A backend, why it cannot run on this machine (None: it can), and which inputs it accepts."""

    backend: AttentionBackend
    why_unavailable: Callable[[], str | None] = lambda: None
    dtypes: tuple[torch.dtype, ...] | None = None
    runs_on_cpu: Callable[[], bool] = lambda: True

    def why_not_for(self, dtype: torch.dtype, device_type: str) -> str | None:
        if self.dtypes is not None and dtype not in self.dtypes:
            accepted = ", ".join(str(accepted).removeprefix("torch.") for accepted in self.dtypes)
            return f"it computes in {accepted}; these inputs are {str(dtype).removeprefix('torch.')}"
        if device_type != "cuda" and not self.runs_on_cpu():
            return f"it needs its inputs on an NVIDIA GPU; these are on {device_type}"
        return self.why_unavailable()


_CANDIDATES: dict[str, _Candidate] = {
    "reference": _Candidate(reference),
    "sdpa": _Candidate(sdpa),
    "triton": _Candidate(
        triton_attention,
        triton_attention.why_unavailable,
        dtypes=triton_attention.DTYPES,
        runs_on_cpu=triton_attention.is_interpreted,
    ),
    "flash": _Candidate(flash, flash.why_unavailable, dtypes=flash.DTYPES, runs_on_cpu=lambda: False),
}
_announced: set[Choice] = set()


class UnavailableBackendError(ValueError):
    """The attention backend that the caller named is unknown or cannot run here."""


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and the reason where it cannot."""
    return {name: candidate.why_unavailable() for name, candidate in _CANDIDATES.items()}


def choose_backend(name: str | None, call: AttentionCall) -> AttentionBackend:
    """Return the named backend; for `None` the fastest one measured for such a call, else torch's fused attention.

    Raises:
        UnavailableBackendError: the name is unknown, or the backend cannot run; the message gives the reason and lists
            the backends that can run.
    """
    if name is None:
        # plain integers, also in a graph of dynamic shapes: the choice is made when the graph is compiled
        lengths = operator.index(call.num_queries), operator.index(call.num_keys)
        choice: Choice = default_choice(
            call.function, operator.index(call.head_width), *lengths, call.dtype, call.device
        )
    else:
        choice = Choice(name, "as asked for")
        if (reason := _why_not(name, call.dtype, call.device.type)) is not None:
            runnable = ", ".join(repr(other) for other, why in available_backends().items() if why is None)
            raise UnavailableBackendError(
                f"attention backend {name!r} cannot run: {reason}. Available here: {runnable}, or null to let the "
                "library choose (model.attention_backend)."
            )
    _log_once(choice)
    return _CANDIDATES[choice.backend].backend


@torch.compiler.assume_constant_result
def default_choice(
    function: str, head_width: int, num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Choice:
    """The backend when the caller names none, and the reason: torch's own on CPU, the fastest of the table on a GPU."""
    if device.type != "cuda":
        return Choice("sdpa", f"torch's own, on {device.type}")
    architecture = torch.cuda.get_device_capability(device)
    choice = dispatch_table.fastest(function, head_width, num_queries, num_keys, architecture)
    reason: str | None = _why_not(choice.backend, dtype, device.type)
    if reason is not None:
        return Choice("sdpa", f"torch's own, because {choice.backend} cannot run: {reason}")
    return choice


@torch.compiler.assume_constant_result
def _why_not(name: str, dtype: torch.dtype, device_type: str) -> str | None:
    candidate = _CANDIDATES.get(name)
    return "no such backend" if candidate is None else candidate.why_not_for(dtype, device_type)


def _log_once(choice: Choice) -> None:
    """Log once per process which backend runs, and why; log nothing while a graph is compiled."""
    if torch.compiler.is_compiling() or choice in _announced:
        return
    _announced.add(choice)
    logger.info("attention backend: %s, %s", choice.backend, choice.reason)
