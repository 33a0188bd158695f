"""Checkpoints of strangers, with manifests that agree: no code of theirs runs, and none unpacks to any size."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.fault_log import record_fault

from dreamdance.errors import CheckpointError
from dreamdance.runs.files import hash_file
from dreamdance.training.checkpointing import complete_file as manifests
from dreamdance.training.checkpointing.checkpointer import read_average
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest

RANK_FILE = "rank_00000.pt"


@pytest.fixture
def folder(tmp_path) -> Path:
    """As one rank saves a run that trains two numbers."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    fragments = [["weight", 0, 0, 0, 2]]
    content = {"ema": {"shards": [torch.tensor([1.0, 2.0])]}, "fragments": fragments, "generators": {}}
    torch.save(content, folder / RANK_FILE)
    (folder / "state.json").write_text(json.dumps({"trainable": {"weight": [2]}}))
    manifests.complete(folder, Manifest(1, 1, "digest", ()))
    agree(folder)
    return folder


def agree(folder: Path) -> None:
    """Has the manifest say what lies there."""
    paths = [folder / name for name in (RANK_FILE, "state.json")]
    files = tuple(FileRecord(path.name, path.stat().st_size, hash_file(path)) for path in paths)
    manifests.complete(folder, replace(manifests.read_manifest(folder), files=files))


def test_the_average_of_a_sound_one_is_read(folder):
    assert read_average(folder)["weight"].tolist() == [1.0, 2.0]


def test_one_that_unpacks_to_a_thousand_times_its_size_is_refused_unread(folder):
    path, packed = folder / RANK_FILE, folder / "packed"
    torch.save({"shards": [torch.zeros(1 << 22)]}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    assert packed.stat().st_size < path.stat().st_size / 500
    assert torch.load(packed, weights_only=True)["shards"][0].numel() == 1 << 22, "torch does unpack it"
    packed.replace(path)
    agree(folder)
    with pytest.raises(CheckpointError, match=r"step_00000001/rank_00000\.pt is compressed, as none of ours is"):
        read_average(folder)
    record_fault(
        "decompression bomb in place of a checkpoint's file",
        how="16 MiB of zeros, compressed to less than a five-hundredth, with a manifest that agrees",
        promised="refused by its table of contents, nothing unpacked",
        happened="CheckpointError naming the file",
    )


def test_one_that_is_no_file_of_tensors_is_refused(folder):
    (folder / RANK_FILE).write_bytes(b"\x80\x02cposix\nsystem\n")
    agree(folder)
    with pytest.raises(CheckpointError, match=r"rank_00000\.pt is no file of tensors"):
        read_average(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"3", b"\x80\x05\x95", b"", b"[1, 2]"])
def test_a_state_that_is_none_is_named(folder, content):
    (folder / "state.json").write_bytes(content)
    agree(folder)
    with pytest.raises(CheckpointError, match=r"state\.json is none of ours"):
        read_average(folder)


def test_code_in_a_ranks_file_is_refused_and_does_not_run(folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"ema": Runs()}, folder / RANK_FILE)
    torch.load(folder / RANK_FILE, weights_only=False)
    (tmp_path / "ran").rmdir()  # it does run where that is asked for
    agree(folder)
    with pytest.raises(CheckpointError, match="holds more than numbers"):
        read_average(folder)
    assert not (tmp_path / "ran").exists()
