"""Files of a checkpoint come to disk as they were meant, are tried again, or fail with the reason; copies stay put."""

import hashlib
import os
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dreamdance.training.checkpointing import complete_file as manifest
from dreamdance.training.checkpointing import state_files
from dreamdance.training.checkpointing.complete_file import FileRecord, write_file
from dreamdance.training.checkpointing.host_copy import HostMemory
from dreamdance.training.checkpointing.state_files import write_files


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(state_files, "RETRY_AFTER_SECONDS", (0.0, 0.0))


def test_what_is_hashed_on_the_way_is_what_lies_there_and_torch_reads_it(tmp_path):
    content = {"numbers": torch.arange(1000.0), "parts": [torch.ones(3, dtype=torch.bfloat16)], "step": 3}
    path, text = tmp_path / "deep" / "weights.pt", tmp_path / "state.json"
    records = write_files(tmp_path, {path: content, text: "{}"})
    for record in records:
        data = (tmp_path / record.path).read_bytes()
        assert record == FileRecord(record.path, len(data), hashlib.sha256(data).hexdigest())
    assert [record.path for record in records] == ["deep/weights.pt", "state.json"]
    back = torch.load(path, weights_only=True)
    assert torch.equal(back["numbers"], content["numbers"])
    assert torch.equal(back["parts"][0], content["parts"][0])
    assert torch.serialization.get_crc32_options(), "the user's own files keep their checksums"


@pytest.mark.usefixtures("quick")
def test_what_did_not_come_to_disk_as_it_was_written_is_written_again(tmp_path, monkeypatch):
    damaged = []

    def sync_badly(handle: int) -> None:
        if not damaged:
            damaged.append(handle)
            os.pwrite(handle, b"\xff", 100)

    monkeypatch.setattr(manifest.os, "fsync", sync_badly)
    (record,) = write_files(tmp_path, {tmp_path / "weights.pt": {"a": torch.zeros(1000)}})
    assert damaged
    assert not manifest.damage(tmp_path, [record])
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["a"].sum() == 0


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of 256 KiB; needs the right to mount."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here; test_save_faults limits the size of files instead")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_an_error_that_says_so_after_three_attempts(full_disk, caplog):
    with pytest.raises(OSError, match="No space left on device"):
        write_files(full_disk, {full_disk / "weights.pt": {"a": torch.zeros(100_000)}})
    assert caplog.text.count("trying again") == 2


def test_errors_of_others_are_not_hidden_behind_torchs(tmp_path):
    def write(file):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write_file(tmp_path / "x", tmp_path, write)


def test_a_copy_does_not_change_when_training_goes_on():
    live = {"weights": [torch.arange(6.0).reshape(2, 3).t()], "shapes": OrderedDict(a=torch.Size([2, 3])), "lr": (0.1,)}
    copied = HostMemory().copy(live)
    live["weights"][0].zero_()
    live["shapes"]["b"] = torch.Size([1])
    assert torch.equal(copied["weights"][0], torch.arange(6.0).reshape(2, 3).t())
    assert copied["weights"][0].is_contiguous(), "what is written is no larger than the tensor"
    assert copied["shapes"] == OrderedDict(a=torch.Size([2, 3]))
    assert type(copied["shapes"]) is OrderedDict
    assert copied["lr"] == (0.1,)


def test_the_next_copy_takes_the_same_memory_and_a_reserved_one_too():
    memory, live = HostMemory(), {"a": torch.ones(4), "b": [torch.ones(2)]}
    memory.reserve(live)
    first = memory.copy(live)
    places = first["a"].data_ptr(), first["b"][0].data_ptr()
    live["a"] += 1
    second = memory.copy(live)
    assert (second["a"].data_ptr(), second["b"][0].data_ptr()) == places
    assert torch.equal(second["a"], torch.full((4,), 2.0))
    live["a"] = torch.ones(5, dtype=torch.bfloat16)
    third = memory.copy(live)
    assert third["a"].dtype == torch.bfloat16
    assert third["a"].shape == (5,)
