"""The note of a run's files shows whether its work is still done, without reading unchanged files."""

import json
import os
import shutil

import pytest

from dreamdance.runs.file_notes import forget_note, is_as_noted, noted_states, of_content, of_times, write_note
from dreamdance.runs.file_states import read_state
from dreamdance.runs.layout import FILES_FILE

NUM_ENTRIES = 2000


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def files(tmp_path, run_folder):
    """A note of a file that was read, a large one that is not hashed, and one that was written."""
    paths = {name: tmp_path / f"{name}.bin" for name in ("read", "large", "written")}
    for path in paths.values():
        path.write_bytes(b"first content")
    expected = {paths["read"]: of_content(read_state(paths["read"])), paths["large"]: of_times(paths["large"])}
    write_note(run_folder, {**expected, paths["written"]: {"size": 13}})
    return paths


def replace_unseen(path, content):
    """Other content of the same size at the same time of change, under the same name."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_unchanged_files_match_their_note_from_any_folder_and_never_without_a_note(files, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    assert is_as_noted(run_folder)
    assert set(noted_states(run_folder)) == {files["read"]}
    forget_note(run_folder)
    assert not is_as_noted(run_folder)
    (run_folder / FILES_FILE).write_text("{")
    assert not is_as_noted(run_folder)


@pytest.mark.parametrize("name", ["read", "large"])
def test_other_content_of_the_same_size_and_time_is_detected(files, run_folder, name):
    replace_unseen(files[name], b"other content")
    assert not is_as_noted(run_folder)


@pytest.mark.parametrize("name", ["read", "large", "written"])
def test_a_missing_or_shorter_file_is_detected(files, run_folder, name):
    files[name].write_bytes(b"short")
    assert not is_as_noted(run_folder)
    files[name].unlink()
    assert not is_as_noted(run_folder)


def test_a_copy_of_the_same_content_is_read_once_and_then_known(files, run_folder, monkeypatch):
    shutil.copy(files["read"], files["read"].with_suffix(".copy"))
    files["read"].with_suffix(".copy").replace(files["read"])
    assert is_as_noted(run_folder)
    present = files["read"].stat()
    noted = json.loads((run_folder / FILES_FILE).read_text())[str(files["read"])]
    assert (noted["mtime_ns"], noted["ctime_ns"]) == (present.st_mtime_ns, present.st_ctime_ns)
    monkeypatch.setattr("dreamdance.runs.file_states.hash_file", refuse_to_read)
    assert is_as_noted(run_folder)


def test_thousands_of_files_that_were_not_written_to_are_not_read(tmp_path, run_folder, monkeypatch):
    (tmp_path / "inputs").mkdir()
    paths = [tmp_path / "inputs" / str(number) for number in range(NUM_ENTRIES)]
    for path in paths:
        path.write_bytes(b"content")
    write_note(run_folder, {path: of_content(read_state(path)) for path in paths})
    with monkeypatch.context() as patched:
        patched.setattr("dreamdance.runs.file_states.hash_file", refuse_to_read)
        assert is_as_noted(run_folder)
    replace_unseen(paths[NUM_ENTRIES // 2], b"CONTENT")
    assert not is_as_noted(run_folder)


def refuse_to_read(path):
    raise AssertionError(f"{path} was read")
