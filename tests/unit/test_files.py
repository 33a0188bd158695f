"""Files and folders appear complete or not at all; transient errors of storage are tried again."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from dreamdance.runs import files
from dreamdance.runs.files import (
    PARTIAL_FILES,
    follow_umask,
    hash_file,
    replace_atomically,
    retry_transient,
    write_atomically,
)

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from dreamdance.runs.files import replace_atomically
with replace_atomically(Path(sys.argv[1]), is_only_writer=sys.argv[2] == "only") as temporary:
    temporary.mkdir()
    (temporary / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between attempts, which take no time here."""
    slept: list[float] = []
    monkeypatch.setattr(files, "time", SleepingClock(slept))
    return slept


class SleepingClock:
    def __init__(self, slept: list[float]) -> None:
        self.sleep = slept.append


class Action:
    """Raises its errors one after the other, then returns the number of calls."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.num_calls = list(errors), 0

    def __call__(self) -> int:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.num_calls


def test_a_file_is_replaced_by_the_whole_new_text_and_no_temporary_file_is_left(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "old and longer\n")
    write_atomically(path, "new ä\n")
    assert path.read_text(encoding="utf-8") == "new ä\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half of it, then what no file can hold: \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "record.json"
    texts = [letter * 10_000 for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in pool.map(lambda text: write_atomically(path, text), 20 * texts):
            assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder_as_a_whole(tmp_path):
    path = tmp_path / "result.v1"
    for content in ("old", "new"):
        with replace_atomically(path, is_only_writer=True) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / content).write_text(content)
    assert [file.name for file in (path / "deep").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_link_and_not_its_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "result").symlink_to(tmp_path / "elsewhere")
    with replace_atomically(tmp_path / "result") as temporary:
        temporary.mkdir()
    assert (tmp_path / "result").is_dir()
    assert not (tmp_path / "result").is_symlink()
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("is_only_writer", [False, True])
def test_the_temporary_name_is_hidden_keeps_the_suffix_and_is_recognised_by_one_pattern(tmp_path, is_only_writer):
    with replace_atomically(tmp_path / "clip.mp4", is_only_writer=is_only_writer) as temporary:
        temporary.touch()
        assert temporary.name.startswith(".clip.partial")
        assert temporary.suffix == ".mp4"
        assert list(tmp_path.glob(PARTIAL_FILES)) == [temporary]
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_block_that_leaves_nothing_changes_nothing(tmp_path):
    (tmp_path / "record").write_text("old")
    with replace_atomically(tmp_path / "record") as temporary:
        temporary.write_text("not wanted after all")
        temporary.unlink()
    assert (tmp_path / "record").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_block_that_raises_leaves_the_old_folder_and_no_other(tmp_path):
    (tmp_path / "result").mkdir()

    def write_half() -> None:
        with replace_atomically(tmp_path / "result") as temporary:
            temporary.mkdir()
            (temporary / "half").touch()
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_half()
    assert list(tmp_path.rglob("*")) == [tmp_path / "result"]


@pytest.mark.parametrize("mode", ["only", "one of several"])
def test_files_of_a_killed_writer_are_recognised_and_the_next_single_writer_removes_them(tmp_path, mode):
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "result"), mode]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(PARTIAL_FILES)
    assert list(tmp_path.iterdir()) == [left]
    with replace_atomically(tmp_path / "result", is_only_writer=mode == "only") as temporary:
        temporary.mkdir()
    assert (tmp_path / "result").is_dir()
    assert not list((tmp_path / "result").iterdir())
    assert left.exists() == (mode != "only"), "one of several writers may still be writing it"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_replaced_file_has_the_permissions_of_a_new_one(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "record", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "record").stat().st_mode) == 0o666 & ~umask


def test_a_transient_error_is_tried_again_after_pauses_that_double(pauses):
    action = Action(*(OSError(errno.EIO, "storage") for _ in range(3)))
    assert retry_transient(action, "reading x") == 4
    assert pauses == [1, 2, 4]


def test_the_last_attempt_raises_its_own_error(pauses):
    action = Action(*(OSError(errno.ESTALE, f"storage {number}") for number in range(6)))
    with pytest.raises(OSError, match="storage 5"):
        retry_transient(action, "reading x", num_attempts=6)
    assert pauses == [1, 2, 4, 8, 8]


def test_an_error_that_a_user_has_to_fix_is_not_tried_again(pauses):
    action = Action(FileNotFoundError(errno.ENOENT, "no such file"))
    with pytest.raises(FileNotFoundError):
        retry_transient(action, "reading x")
    assert action.num_calls == 1
    assert not pauses


def test_a_caller_can_name_further_errors_to_try_again(pauses):
    action = Action(OSError(errno.ENOSPC, "the disk is full"))
    assert retry_transient(action, "writing x", should_retry=lambda error: isinstance(error, OSError)) == 2


@pytest.mark.parametrize("size", [0, 1, (1 << 18) + 1])
def test_the_hash_is_that_of_the_whole_content(tmp_path, size):
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "data").write_bytes(content)
    assert hash_file(tmp_path / "data") == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_not_there_is_not_hashed(tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "nothing")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_of_a_library_that_hides_them_follow_the_umask(tmp_path, umask):
    (tmp_path / "unet").mkdir()
    hidden, plain = tmp_path / "unet" / "model.safetensors", tmp_path / "model_index.json"
    save_file({"weight": torch.zeros(2)}, hidden)
    before = os.umask(umask)
    try:
        plain.write_text("{}")
        follow_umask(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (hidden, plain)} == {0o666 & ~umask}
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "model_index.json"}
