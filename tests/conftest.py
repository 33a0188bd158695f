"""Fixtures that several parts' tests share."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.dancer_shards import write_dancer_shards

# Triton's kernels run in its interpreter here; it reads this when a kernel's module is imported, so before any is.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be everything that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A job that runs in a test's own process sets up its process's log; the next test must not inherit that."""
    root, submitit = logging.getLogger(), logging.getLogger("submitit")
    handlers, level, propagate = root.handlers[:], root.level, submitit.propagate
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)
    submitit.propagate = propagate


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of arithmetic, as in the rank processes: one order of summation, and small steps are no slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of a few tiny dancers in `train` and `validation`."""
    folder = tmp_path_factory.mktemp("shards")
    write_dancer_shards(folder)
    return folder


@pytest.fixture
def own_environment() -> Iterator[None]:
    """For tests of what sets environment variables of this process: afterwards they are as before."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
