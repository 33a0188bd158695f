"""Warnings about a file, shown to the user once, however many processes read the file."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(text: str) -> None:
    """Logs a warning, unless this process has logged the same text before."""
    logger.warning("%s", text)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collects this project's warnings in a worker, for the process that started it, in place of logging them.

    Yields:
        the texts; the list grows during the block.
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
