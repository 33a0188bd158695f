"""Fixtures that tests of several folders share."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.dancer_shards import write_dancer_shards

# Triton's kernels run in its interpreter here. Triton reads the variable when a module of kernels is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background processes with Ctrl-C ignored; all processes that the tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Restores the logging that a job sets up when it runs in the process of a test."""
    root, submitit = logging.getLogger(), logging.getLogger("submitit")
    handlers, level, propagate = root.handlers[:], root.level, submitit.propagate
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)
    submitit.propagate = propagate


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sets one thread of arithmetic, as in the rank processes: sums have one order, and small steps are no slower."""
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
    """Restores the environment variables of this process after the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
