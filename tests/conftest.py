"""Fixtures that several parts' tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dancer_shards import write_dancer_shards


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
