"""Heartbeats of annotators: one call for a whole clip or video may take longer than a watchdog waits.

An annotator calls `beat` after every frame or few. The job that uses it says by `heartbeats_to` what shall be called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[], None]] = ContextVar("_listener", default=lambda: None)


def beat() -> None:
    """Shows that an annotator works; it may be called at any rate, and outside of jobs does nothing."""
    _listener.get()()


@contextmanager
def heartbeats_to(listener: Callable[[], None]) -> Iterator[None]:
    """Calls a function at each heartbeat of annotators that are called in this block.

    Args:
        listener: may be called many times per second.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
