"""A shard is hashed once, when it is first opened, and again after a change; no start reads it."""

import json
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace
from hashlib import sha1
from itertools import islice
from pathlib import Path

import pytest
from support.older_shards import write_older_shards
from support.random_shards import HEIGHT, WIDTH, edit_index, random_clip

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards import notes as shard_notes
from dreamdance.data.shards.cache import open_index
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.notes import ShardNotes, cache_folder
from dreamdance.data.shards.verify import CheckedShards
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.locks import locked_file
from dreamdance.runtime.ranks import Ranks

SECOND = "part_00004.shard.00000.mds"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "shards"
    write_older_shards(folder, 12)
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache of the user"))
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def bytes_read() -> int:
    """The bytes that this process has read, from any file, cached or not."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def read_everything(folder: Path, **options) -> int:
    """Opens the set like a new process; returns the number of bytes read."""
    before = bytes_read()
    assert len(list(StoredClips(Shards(local=str(folder)), **options))) == 12
    return bytes_read() - before


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mds"))


def change_what_no_picture_shows(path: Path, *, keep_mtime: bool = False) -> None:
    """Damages the byte with the seed of a clip: neither the size nor any CRC shows it."""
    before = path.stat()
    content = path.read_bytes()
    assert content.count(b'"seed": 5') == 1
    path.write_bytes(content.replace(b'"seed": 5', b'"seed": 6'))
    if keep_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_shard_is_hashed_once_and_never_again_by_any_process(folder):
    first, second = read_everything(folder), read_everything(folder)
    slack = 12 * 64 + 3 * 4096  # tables of samples and notes
    assert first > 2 * total_bytes(folder)
    assert second < first - total_bytes(folder) + slack
    assert {path.name for path in (folder / ".verified").iterdir()} == {
        f"{path.name}.json" for path in folder.glob("*.mds")
    }


def test_a_set_that_was_checked_as_a_whole_is_not_hashed_again(folder):
    """Checks all shards, like `tools/verify_shards.py` or `data.verify: hash` at a start."""
    first = StoredClips(Shards(local=str(folder)), verify="hash")
    assert len(first) == 12
    noted = read_everything(folder)
    assert abs(read_everything(folder) - noted) < 4096
    shutil.rmtree(folder / ".verified")
    assert read_everything(folder) > noted + total_bytes(folder) - 4096  # less the notes


def test_opening_a_set_reads_none_of_its_shards(folder):
    index_bytes = (folder / "index.json").stat().st_size
    before = bytes_read()
    StoredClips(Shards(local=str(folder)))
    assert bytes_read() - before < 3 * index_bytes + 4096
    assert not (folder / ".verified").exists()


def test_a_set_of_ten_gigabytes_that_was_noted_starts_after_reading_less_than_a_megabyte(tmp_path):
    """Sparse files: a small clip, and one of 3.4 GB that takes no space on the disk."""
    folder, size = tmp_path / "shards", 3_400_000_000
    write_older_shards(folder, 3, clips_per_part=1)
    paths = sorted(folder.glob("*.mds"))
    for path in paths:  # one sample more, which ends where the file does
        content = path.read_bytes()
        first, end = (int.from_bytes(content[at : at + 4], "little") for at in (4, 8))
        table = b"".join(number.to_bytes(4, "little") for number in (2, first + 4, end + 4, size))
        path.write_bytes(table + content[12:])
        os.truncate(path, size)

    def describe(index: dict) -> None:
        index["dreamdance"]["num_samples"] = 6
        for shard in index["shards"]:
            shard["samples"] = 2
            shard["raw_data"].update(bytes=size, hashes={"sha1": sha1(b"hashed long ago").hexdigest()})

    edit_index(folder, describe)
    notes = ShardNotes(folder)
    for entry in read_index(folder / "index.json").shards:
        notes.write(entry.raw, FileStamp.of(folder / entry.raw.name))
    assert total_bytes(folder) > 10_000_000_000
    before = bytes_read()
    clips = StoredClips(Shards(local=str(folder)))
    assert [clips.clip(number).clip_id for number in (0, 2, 4)] == ["clip_0000", "clip_0001", "clip_0002"]
    assert bytes_read() - before < 1_000_000


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_was_damaged_before_its_first_opening_is_an_error_by_name(folder, num_workers):
    """The same holds if a process that reads data opens it."""
    change_what_no_picture_shows(folder / SECOND)
    clips = ClipDataset(Shards(local=str(folder)), width=WIDTH, height=HEIGHT, num_frames=2)
    order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=1)
    loader = ClipLoader(clips, order, micro_batch_size=4, ranks=Ranks(), num_workers=num_workers, timeout_seconds=60)
    with pytest.raises(ShardError, match=rf"shard .*{SECOND} is damaged: its sha1 differs from the index"):
        list(islice(loader, 3))
    assert not (folder / ".verified" / f"{SECOND}.json").exists()


def test_damage_that_keeps_the_size_is_found_by_hashes_alone(folder):
    """Otherwise the other tests here would prove nothing."""
    change_what_no_picture_shows(folder / SECOND)
    assert read_everything(folder, verify="size") < 2 * total_bytes(folder)


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_shard_that_is_changed_after_it_was_noted_is_hashed_again_and_refused(folder, keep_mtime):
    reader = StoredClips(Shards(local=str(folder)))
    assert len(list(reader)) == 12
    change_what_no_picture_shows(folder / SECOND, keep_mtime=keep_mtime)
    for clips in (
        reader,
        StoredClips(Shards(local=str(folder))),
    ):  # a process that continues to read, and a later start
        with pytest.raises(ShardError, match=rf"{SECOND} is damaged: its sha1"):
            clips.clip(5)


def test_a_shard_that_was_only_touched_is_hashed_once_more(folder):
    first, noted = read_everything(folder), read_everything(folder)
    size = (folder / SECOND).stat().st_size
    os.utime(folder / SECOND)
    assert noted + size <= read_everything(folder) < first
    assert read_everything(folder) < noted + size


def test_an_old_note_does_not_satisfy_an_index_with_another_hash(folder):
    read_everything(folder)
    edit_index(folder, lambda index: index["shards"][1]["raw_data"]["hashes"].update(sha1="0" * 40))
    with pytest.raises(ShardError, match=rf"{SECOND} is damaged: its sha1"):
        StoredClips(Shards(local=str(folder))).clip(5)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff" * 5000])
def test_an_invalid_note_is_ignored(folder, content):
    read_everything(folder)
    (folder / ".verified" / f"{SECOND}.json").write_text(content, encoding="latin-1")
    change_what_no_picture_shows(folder / SECOND)
    with pytest.raises(ShardError, match=rf"{SECOND} is damaged: its sha1"):
        StoredClips(Shards(local=str(folder))).clip(5)


def test_hashes_of_read_only_shards_are_noted_in_the_users_cache(folder):
    (folder / ".verified").write_text("a file, so that no folder of this name can be made, by root neither")
    first, second = read_everything(folder), read_everything(folder)
    assert second < first - total_bytes(folder) + 12 * 64 + 3 * 4096
    cache = cache_folder(folder)
    assert Path(os.environ["XDG_CACHE_HOME"]) in cache.parents
    assert len(list(cache.iterdir())) == 3


def test_without_a_place_for_notes_each_process_hashes_and_logs_that_once(folder, monkeypatch, caplog):
    (folder / ".verified").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    first, second = read_everything(folder), read_everything(folder)
    assert second > 2 * total_bytes(folder)
    assert first > 2 * total_bytes(folder)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2  # two openings
    assert f"cannot write notes about verified shards, neither in {folder} nor in /proc/nowhere" in warnings[0]


def test_nothing_is_noted_through_a_link_that_leads_out_of_the_folder(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / ".verified").symlink_to(tmp_path / "elsewhere")
    read_everything(folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_many_processes_can_note_one_shard_at_once(folder):
    (entry, *_) = read_index(folder / "index.json").shards
    state = FileStamp.of(folder / entry.raw.name)
    seen: list[bool] = []

    def note_and_look() -> None:
        notes = ShardNotes(folder)
        for _ in range(20):
            notes.write(entry.raw, state)
            seen.append(notes.has(entry.raw, state))

    threads = [threading.Thread(target=note_and_look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 160
    (note,) = (folder / ".verified").iterdir()
    assert json.loads(note.read_text())["sha1"] == sha1((folder / entry.raw.name).read_bytes()).hexdigest()


def make_large(folder: Path, num_bytes: int) -> None:
    """Makes a set of one shard that takes a while to hash; its last sample ends in zeros."""
    write_older_shards(folder, 1)
    (path,) = folder.glob("*.mds")
    content = path.read_bytes()
    path.write_bytes(content[:8] + num_bytes.to_bytes(4, "little") + content[12:])
    os.truncate(path, num_bytes)
    hashes = {"sha1": sha1(path.read_bytes()).hexdigest()}
    edit_index(folder, lambda index: index["shards"][0]["raw_data"].update(bytes=num_bytes, hashes=hashes))


def open_together(shards: Shards, num_processes: int = 3) -> list[int]:
    """Opens the first shard in some processes at once; returns the number of bytes that each has read."""
    forked = multiprocessing.get_context("fork")
    ready, results = forked.Barrier(num_processes), forked.SimpleQueue()

    def open_first() -> None:
        checked = CheckedShards(open_index(shards), remote=shards.remote, by_hash=True)
        ready.wait(20)
        before = bytes_read()
        checked.require(0)
        results.put(bytes_read() - before)

    processes = [forked.Process(target=open_first) for _ in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * num_processes
    return [results.get() for _ in processes]


@pytest.mark.parametrize("noted", ["beside the shards", "in the cache"])
def test_processes_that_open_one_shard_at_once_hash_it_once(tmp_path, monkeypatch, noted):
    folder, num_bytes = tmp_path / "shards", 100_000_000
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache of the user"))
    make_large(folder, num_bytes)
    if noted == "in the cache":
        (folder / ".verified").touch()
    assert num_bytes <= sum(open_together(Shards(local=str(folder)))) < 1.5 * num_bytes
    place = folder / ".verified" if noted == "beside the shards" else cache_folder(folder)
    assert [path.suffix for path in place.iterdir()] == [".json"]  # no locks are left


def test_concurrent_processes_download_a_shard_once(tmp_path):
    folder, num_bytes = tmp_path / "remote", 50_000_000
    make_large(folder, num_bytes)
    read = sorted(open_together(Shards(local=str(tmp_path / "local"), remote=str(folder))))
    assert max(read[:-1]) < 0.5 * num_bytes  # one alone downloads and hashes


def test_a_process_that_hangs_while_it_hashes_does_not_stop_the_others(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(shard_notes, "HASHING_SECONDS", 0.2)
    (folder / ".verified").mkdir()
    with locked_file(folder / ".verified" / f"{SECOND}.lock", wait_seconds=0):
        assert read_everything(folder) > 2 * total_bytes(folder)
    assert "this process hashes the shard too" in caplog.text
    assert (folder / ".verified" / f"{SECOND}.json").is_file()


def test_nodes_that_share_a_home_and_not_the_shards_keep_notes_of_their_own(folder):
    """The same path on the local disk of each node, where copies have different times."""
    (folder / ".verified").touch()
    (entry, *_) = read_index(folder / "index.json").shards
    one = FileStamp.of(folder / entry.raw.name)
    other = replace(one, ctime_ns=one.ctime_ns + 1)
    for state in (one, other):
        ShardNotes(folder).write(entry.raw, state)
    assert [ShardNotes(folder).has(entry.raw, state) for state in (one, other)] == [True, True]
    assert not ShardNotes(folder).has(entry.raw, replace(one, mtime_ns=0))


def test_a_download_is_noted_when_it_arrives(folder, tmp_path):
    cache = tmp_path / "cache"
    for expected in ("downloaded", "there already"):
        before = bytes_read()
        clips = StoredClips(Shards(local=str(cache), remote=str(folder)))
        assert [clip["clip_id"] for clip in clips] == [random_clip(number).clip_id for number in range(12)]
        num_bytes = bytes_read() - before
        assert (num_bytes < 2 * total_bytes(folder)) == (expected == "there already")
    assert len(list((cache / ".verified").iterdir())) == 3
