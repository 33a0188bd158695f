"""The choice of checkpoints to keep: only sound ones count, and none is deleted before there are enough newer ones."""

import os
import shutil
from pathlib import Path

import pytest

from dreamdance.errors import CheckpointError
from dreamdance.recipe.schema import Checkpoint
from dreamdance.runs import files as file_work
from dreamdance.runs.files import hash_file
from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder, step_folders, step_of
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest
from dreamdance.training.checkpointing.folders import CheckpointFolders

WEIGHTS = "rank_00000.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(file_work, "FIRST_PAUSE_SECONDS", 0.0)


def save(run: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        path = folder / WEIGHTS
        path.write_bytes(b"weights of step %d" % step)
        record = FileRecord(WEIGHTS, path.stat().st_size, hash_file(path))
        complete_file.complete(folder, Manifest(step, 1, "digest", (record,)))


def steps(run: Path) -> list[int]:
    return [step_of(folder) or 0 for folder in step_folders(run / "checkpoints")]


def folders_of(run: Path, **section: object) -> CheckpointFolders:
    return CheckpointFolders(run, Checkpoint.model_validate({"keep_last": 2, **section}))


def test_the_newest_few_every_nth_and_the_one_resumed_from_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    folders = folders_of(tmp_path, keep_every_steps=3)
    folders.resumed = "step_00000002"
    folders.delete_old()
    assert steps(tmp_path) == [2, 3, 6, 7]
    folders.resumed = None
    folders.delete_old()
    assert steps(tmp_path) == [3, 6, 7], "the next start resumes from another one, and deletes this one"


def empty(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncate_a_file(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 3)


def truncate_the_complete_file(folder: Path) -> None:
    os.truncate(folder / COMPLETE_FILE, 20)


def make_the_manifest_unreadable(folder: Path) -> None:
    (folder / COMPLETE_FILE).unlink()
    (folder / COMPLETE_FILE).symlink_to("/proc/self/mem")  # a regular file whose reading gives an I/O error


@pytest.mark.parametrize("damage", [empty, truncate_a_file, truncate_the_complete_file, make_the_manifest_unreadable])
def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest_few(tmp_path, damage):
    save(tmp_path, 1, 2, 3, 4)
    damage(checkpoint_folder(tmp_path, 4))
    folders_of(tmp_path).delete_old()
    assert steps(tmp_path) == [2, 3, 4], "two sound ones are left, and the damaged one can still be repaired"
    save(tmp_path, 5, 6)
    folders_of(tmp_path).delete_old()
    assert steps(tmp_path) == [5, 6], "the damaged one is older than all that are kept, so it is deleted too"


def test_a_checkpoint_found_damaged_by_its_hash_does_not_count_as_one_of_the_newest_few(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    folders = folders_of(tmp_path)
    folders.damaged.add("step_00000004")
    folders.delete_old()
    assert steps(tmp_path) == [2, 3, 4]
    folders.make(4)
    shutil.rmtree(checkpoint_folder(tmp_path, 4))
    save(tmp_path, 4)
    folders.delete_old()
    assert steps(tmp_path) == [3, 4], "saved again, it counts"


def test_nothing_is_deleted_while_there_are_too_few_sound_checkpoints(tmp_path):
    save(tmp_path, 1, 2, 3)
    for step in (2, 3):
        truncate_a_file(checkpoint_folder(tmp_path, step))
    folders_of(tmp_path).delete_old()
    assert steps(tmp_path) == [1, 2, 3]


def test_the_next_start_would_resume_from_the_newest_sound_checkpoint(tmp_path):
    folders = folders_of(tmp_path)
    assert folders.newest() == "step 0"
    save(tmp_path, 1, 2, 3)
    truncate_a_file(checkpoint_folder(tmp_path, 3))
    assert folders.newest() == "step_00000002"


def test_candidates_are_newest_first_and_unfinished_checkpoints_are_deleted(tmp_path):
    save(tmp_path, 1, 2)
    checkpoint_folder(tmp_path, 3).mkdir()
    assert [step_of(folder) for folder in folders_of(tmp_path).candidates()] == [2, 1]
    assert steps(tmp_path) == [1, 2]


def test_a_first_save_that_was_cut_short_is_cleaned_away(tmp_path):
    checkpoint_folder(tmp_path, 2).mkdir(parents=True)
    assert folders_of(tmp_path).candidates() == []
    assert steps(tmp_path) == []


def test_several_incomplete_checkpoints_do_not_count_as_a_first_save_and_nothing_is_deleted(tmp_path):
    save(tmp_path, 2, 4)
    for step in (2, 4):
        (checkpoint_folder(tmp_path, step) / COMPLETE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* has its COMPLETE: .* start over"):
        folders_of(tmp_path).candidates()
    assert steps(tmp_path) == [2, 4]


def test_a_link_to_a_checkpoint_of_another_run_is_unlinked_and_that_run_keeps_it(tmp_path):
    save(tmp_path / "other", 1)
    save(tmp_path / "own", 2, 3)
    link = checkpoint_folder(tmp_path / "own", 1)
    link.symlink_to(checkpoint_folder(tmp_path / "other", 1))
    folders_of(tmp_path / "own").delete_old()
    assert steps(tmp_path / "own") == [2, 3]
    assert complete_file.read_manifest(checkpoint_folder(tmp_path / "other", 1)).step == 1


def test_a_checkpoint_that_cannot_be_deleted_is_logged_and_ends_nothing(tmp_path, caplog):
    save(tmp_path, 1)
    (checkpoint_folder(tmp_path, 2) / COMPLETE_FILE).mkdir(parents=True)  # not even root may unlink a folder
    assert [step_of(folder) for folder in folders_of(tmp_path).candidates()] == [1]
    assert "step_00000002 is not needed any more, but cannot be deleted: " in caplog.text
