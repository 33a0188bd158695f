"""Files appear whole or not at all, and are told apart by what lies in them."""

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from dreamdance.runs.files import follow_umask, hash_file, write_atomically


def test_a_file_is_replaced_by_all_of_the_new_text_and_nothing_is_left_beside_it(tmp_path):
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
