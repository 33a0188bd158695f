"""Warnings about a file that a user is to see once, however many processes read it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(text: str) -> None:
    """Logs a warning, unless this process has logged it before."""
    logger.warning("%s", text)


@contextmanager
def held_warnings() -> Iterator[list[str]]:
    """Collects what this project's code warns of, for the process that this one works for; nothing of it is logged.

    Yields:
        the texts; the list grows.
    """
    texts: list[str] = []
    ours, holder = logging.getLogger("dreamdance"), _Holder(texts)
    ours.addHandler(holder)
    ours.propagate = False
    try:
        yield texts
    finally:
        ours.removeHandler(holder)
        ours.propagate = True


class _Holder(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())
