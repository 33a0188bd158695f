"""The COMPLETE file: written last and atomically, valid only unchanged; for whole runs see test_checkpointer."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest

from dreamdance.errors import CheckpointError
from dreamdance.runs import files as file_work
from dreamdance.runs.files import hash_file
from dreamdance.runs.layout import COMPLETE_FILE
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest


def save(folder: Path) -> Manifest:
    """A checkpoint of step 1 with one small file."""
    folder.mkdir()
    (folder / "weights").write_bytes(b"abc")
    manifest = Manifest(1, 1, "digest", (FileRecord("weights", 3, hash_file(folder / "weights")),))
    complete_file.complete(folder, manifest)
    return manifest


def test_complete_appears_last_and_at_once(tmp_path):
    folder = tmp_path / "step_00000001"
    manifest = save(folder)
    assert manifest.files[0].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert complete_file.read_manifest(folder) == manifest
    assert sorted(path.name for path in folder.iterdir()) == ["COMPLETE", "weights"]


def test_every_flipped_bit_of_a_manifest_is_detected(tmp_path):
    folder = tmp_path / "step_00000001"
    sound = save(folder)
    content = (folder / COMPLETE_FILE).read_bytes()
    positions = range(0, 8 * len(content), 3)  # every third, so that every kind of bit is among them
    found = 0
    for position in positions:
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        (folder / COMPLETE_FILE).write_bytes(flipped)
        try:
            assert complete_file.read_manifest(folder) == sound, position
        except complete_file.FormatError:
            pytest.fail(f"bit {position}: taken for another version's")
        except CheckpointError:
            found += 1
    assert found > 0.9 * len(positions), "nearly all; between the values, some flips give other white space"


def test_a_checkpoint_in_the_folder_of_another_step_counts_as_damaged(tmp_path):
    save(tmp_path / "step_00000001")
    renamed = (tmp_path / "step_00000001").rename(tmp_path / "step_00000006")
    with pytest.raises(CheckpointError, match="step_00000006/COMPLETE is damaged: it belongs to step 1"):
        complete_file.read_manifest(renamed)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", ""])
def test_a_manifest_that_points_outside_of_its_folder_is_refused(tmp_path, path):
    complete_file.complete(tmp_path, Manifest(1, 1, "digest", (FileRecord(path, 1, ""),)))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        complete_file.read_manifest(tmp_path)


def test_a_manifest_that_is_a_pickle_is_damaged_and_never_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / COMPLETE_FILE).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="COMPLETE is damaged: "):
        complete_file.read_manifest(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 3}', '{"format": 3, "sha256": ""}', "\x00", "[" * 100_000]
)
def test_a_damaged_manifest_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / COMPLETE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="COMPLETE is damaged: "):
        complete_file.read_manifest(tmp_path)


def test_a_file_that_cannot_be_read_is_read_again_and_then_reported(tmp_path, monkeypatch):
    """The memory of a process is the only file of Linux that fails with EIO."""
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    record = complete_file.FileRecord("file", 0, hashlib.sha256(b"").hexdigest())
    (folder / "file").symlink_to("/proc/self/mem")
    monkeypatch.setattr(file_work, "FIRST_PAUSE_SECONDS", 0.0)
    (problem,) = complete_file.find_damage(folder, [record])
    assert "step_00000004/file cannot be read: [Errno 5]" in problem
    monkeypatch.setattr(file_work, "FIRST_PAUSE_SECONDS", 20.0)

    def repair(seconds):
        assert seconds == 20.0
        (folder / "file").unlink()
        (folder / "file").touch()

    monkeypatch.setattr(file_work.time, "sleep", repair)
    assert complete_file.find_damage(folder, [record]) == []
