"""Files of a checkpoint are written correctly, written again, or fail with the reason; copies do not change."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dreamdance.runs import files as file_work
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.complete_file import FileRecord, write_files
from dreamdance.training.checkpointing.host_copy import HostCopy


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(file_work, "FIRST_PAUSE_SECONDS", 0.0)


def test_the_hash_computed_while_writing_is_that_of_the_file(tmp_path):
    numbers = torch.arange(1000.0)

    def write(file):
        file.write(b"header")
        file.write(numbers.numpy().data.cast("B"))

    records = write_files(tmp_path, {"weights": write, "state.json": lambda file: file.write(b"{}")})
    for record in records:
        data = (tmp_path / record.path).read_bytes()
        assert record == FileRecord(record.path, len(data), hashlib.sha256(data).hexdigest())
    assert [record.path for record in records] == ["weights", "state.json"]
    assert (tmp_path / "weights").read_bytes() == b"header" + numbers.numpy().tobytes()


@pytest.mark.usefixtures("quick")
def test_a_file_that_differs_on_disk_from_what_was_written_is_written_again(tmp_path, monkeypatch):
    damaged = []

    def sync_badly(handle: int) -> None:
        if not damaged:
            damaged.append(handle)
            os.pwrite(handle, b"\xff", 100)

    monkeypatch.setattr(complete_file.os, "fsync", sync_badly)
    (record,) = write_files(tmp_path, {"weights": lambda file: file.write(bytes(1000))})
    assert damaged
    assert not complete_file.find_damage(tmp_path, [record])
    assert (tmp_path / "weights").read_bytes() == bytes(1000)


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 KiB; needs the permission to mount."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here; test_save_faults limits the size of files instead")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_an_error_with_its_cause_after_several_attempts(full_disk, caplog):
    with pytest.raises(OSError, match="No space left on device"):
        write_files(full_disk, {"weights": lambda file: file.write(bytes(400_000))})
    assert caplog.text.count("trying again in") == file_work.NUM_ATTEMPTS - 1


def test_errors_other_than_those_of_files_are_not_tried_again(tmp_path):
    calls = []

    def write(file):
        calls.append(file)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write_files(tmp_path, {"x": write})
    assert len(calls) == 1


def test_a_copy_does_not_change_while_training_continues():
    live = {"a": torch.arange(6.0), "b": torch.ones(2)}
    copied = HostCopy().copy(live)
    live["a"].zero_()
    assert list(copied) == ["a", "b"]
    assert torch.equal(copied["a"], torch.arange(6.0))
    assert torch.equal(copied["b"], torch.ones(2))


def test_the_next_copy_and_a_reserved_copy_use_the_same_memory():
    memory, live = HostCopy(), {"a": torch.ones(4), "b": torch.ones(2)}
    memory.reserve(live)
    block = memory._block.data_ptr()
    first = memory.copy(live)
    places = first["a"].data_ptr(), first["b"].data_ptr()
    assert places == (block, block + 16), "tensors are contiguous, without a gap"
    live["a"] += 1
    second = memory.copy(live)
    assert (second["a"].data_ptr(), second["b"].data_ptr()) == places
    assert torch.equal(second["a"], torch.full((4,), 2.0))
    live["a"] = torch.ones(5)
    assert memory.copy(live)["a"].shape == (5,), "a larger save takes more memory"
