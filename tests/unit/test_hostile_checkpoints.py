"""Hostile checkpoints with consistent manifests: their code never runs, and all their numbers are checked."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.fault_log import record_fault

from dreamdance.errors import CheckpointError
from dreamdance.runs.files import hash_file
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest
from dreamdance.training.checkpointing.rank_file import Piece, RankFile

RANK_FILE = "rank_00000.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint as saved by the single rank of a run that trains two numbers."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    piece = Piece(0, {"average": torch.tensor([1.0, 2.0])})
    with (folder / RANK_FILE).open("wb") as file:
        RankFile.of({"weight": piece}, average_updates=1, generators={}).write(file)
    (folder / "state.json").write_text(json.dumps({"trainable": {"weight": [2]}}))
    complete_file.complete(folder, Manifest(1, 1, "digest", ()))
    update_manifest(folder)
    return folder


def update_manifest(folder: Path, *names: str) -> None:
    """Changes the manifest so that it agrees with the files."""
    paths = [folder / name for name in names or (RANK_FILE, "state.json")]
    files = tuple(FileRecord(path.name, path.stat().st_size, hash_file(path)) for path in paths)
    complete_file.complete(folder, replace(complete_file.read_manifest(folder), files=files))


def test_the_average_of_a_sound_checkpoint_is_read(folder):
    assert read_checkpoint_weights(folder)["weight"].tolist() == [1.0, 2.0]


def with_header(header: bytes, *, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02cposix\nsystem\n",
        with_header(b"{}", claimed=1 << 62),
        with_header(b"[" * 100_000),
        with_header(
            json.dumps({"average/weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
        ),
        with_header(json.dumps({"average/weight": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}).encode()),
        with_header(b"{}"),
        with_header(json.dumps({"__metadata__": {"dreamdance": "[" * 100_000}}).encode()),
        with_header(json.dumps({"__metadata__": {"dreamdance": "[1, 2]"}}).encode()),
        with_header(json.dumps({"__metadata__": {"dreamdance": '{"pieces": {"weight": [0]}}'}}).encode()),
    ],
)
def test_a_file_that_is_not_a_rank_s_file_is_refused_by_name(folder, content):
    (folder / RANK_FILE).write_bytes(content)
    update_manifest(folder)
    with pytest.raises(CheckpointError, match=r"step_00000001/rank_00000\.safetensors is not a rank's file"):
        read_checkpoint_weights(folder)
    if len(content) < 200 and b"2199023255552" in content:
        record_fault(
            "header of a checkpoint's file that claims 4 TiB of tensors",
            how="a file of 100 bytes, with a consistent manifest",
            promised="refused because of its header, no memory taken",
            happened="CheckpointError naming the file",
        )


@pytest.mark.parametrize(
    ("values", "start", "refusal"),
    [
        (torch.zeros(2, dtype=torch.float16), 0, r"average/weight is F16 \[2\], not flat F32"),
        (torch.zeros(2, 1), 0, r"average/weight is F32 \[2, 1\], not flat F32"),
        (torch.zeros(1), 0, "holds 1 of 2 elements of weight"),
        (torch.zeros(2), 1, "starts at element 1, not at 0"),
        (torch.zeros(2), 1 << 70, "holds 0 of 2 elements of weight"),
        (torch.zeros(2), -(1 << 70), "holds 0 of 2 elements of weight"),
        (None, 0, "is not a rank's file .* average/weight"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(folder, values, start, refusal):
    own = {"pieces": {"weight": [start, 1.0]}, "average_updates": 1, "generators": {}}
    tensors = {"average/weight": values} if values is not None else {"average/other": torch.zeros(2)}
    save_file(tensors, folder / RANK_FILE, metadata={"dreamdance": json.dumps(own)})
    update_manifest(folder)
    with pytest.raises(CheckpointError, match=refusal):
        read_checkpoint_weights(folder)


def test_a_manifest_that_does_not_list_a_rank_s_file_is_refused(folder):
    update_manifest(folder, "state.json")
    with pytest.raises(CheckpointError, match=r"COMPLETE does not list rank_00000\.safetensors"):
        read_checkpoint_weights(folder)
    complete_file.complete(folder, replace(complete_file.read_manifest(folder), world_size=1 << 60))
    with pytest.raises(CheckpointError, match=r"COMPLETE does not list rank_00000\.safetensors"):
        read_checkpoint_weights(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"3", b"\x80\x05\x95", b"", b"[1, 2]"])
def test_an_invalid_state_file_is_named(folder, content):
    (folder / "state.json").write_bytes(content)
    update_manifest(folder)
    with pytest.raises(CheckpointError, match=r"state\.json is not in our format"):
        read_checkpoint_weights(folder)


def test_code_in_a_ranks_file_is_refused_and_does_not_run(folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"ema": Runs()}, tmp_path / "pickled.pt")
    torch.load(tmp_path / "pickled.pt", weights_only=False)
    (tmp_path / "ran").rmdir()  # it does run if unpickling is allowed
    (tmp_path / "pickled.pt").replace(folder / RANK_FILE)
    update_manifest(folder)
    with pytest.raises(CheckpointError, match="is not a rank's file"):
        read_checkpoint_weights(folder)
    assert not (tmp_path / "ran").exists()
