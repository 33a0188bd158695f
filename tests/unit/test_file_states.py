"""The content of a file is compared by size and times first, and by its hash if they differ."""

import os
from hashlib import sha256

import pytest

from dreamdance.runs.file_states import FileState, read_state


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"first content")
    return path


def test_a_state_holds_the_hash_of_the_content(path):
    state = read_state(path)
    assert state.sha256 == sha256(b"first content").hexdigest()
    assert FileState.from_json(state.to_json()) == state


def test_content_of_the_same_size_with_the_old_time_is_another_state(path):
    before, times = read_state(path), path.stat()
    path.write_bytes(b"other content")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = read_state(path, before)
    assert (after.stamp.size, after.stamp.mtime_ns) == (before.stamp.size, before.stamp.mtime_ns)
    assert after.sha256 == sha256(b"other content").hexdigest()


def test_a_file_that_was_only_touched_keeps_its_hash(path):
    before = read_state(path)
    os.utime(path, ns=(0, 0))
    after = read_state(path, before)
    assert after != before
    assert after.sha256 == before.sha256


def test_an_unchanged_file_is_not_read_again(path):
    state = read_state(path)
    noted = FileState(state.stamp, sha256="what was noted")
    assert read_state(path, noted) is noted


def test_a_path_that_is_not_a_file_has_no_state(path, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [read_state(place) for place in (tmp_path, tmp_path / "none", tmp_path / "dangling", path / "below")] == [
        None
    ] * 4


@pytest.mark.parametrize("note", [None, [], {}, {"size": 1}, {"size": "1", "mtime_ns": 1, "ctime_ns": 1, "sha256": ""}])
def test_a_damaged_note_counts_as_no_note(note):
    assert FileState.from_json(note) is None
