"""Faults of shards: storage that fails for a while, files of killed runs, processes that share a folder."""

import errno
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.fault_log import record_fault
from support.older_shards import older_sample, write_older_shards
from support.random_shards import edit_index, flip_byte, random_clip, write_random_shards

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards import cache as shard_cache
from dreamdance.data.shards import verify
from dreamdance.data.shards.columns import ColumnClip
from dreamdance.data.shards.mds import StreamingDataset
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runs import files
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import PARTIAL_FILES

SECOND = "part_00004.shard.00000.mds"
TEMPORARY = ".part_00004.shard.00000.partial.mds"  # its name before it is complete
ALL_CLIPS = [f"clip_{number:04d}" for number in range(12)]


@pytest.fixture(scope="module", params=["none", "zstd"])
def sound(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / request.param
    write_random_shards(folder, 12, compression=request.param)
    return folder


@pytest.fixture
def remote(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "remote"))


@pytest.fixture
def shards(remote, tmp_path) -> Shards:
    return Shards(local=str(tmp_path / "cache"), remote=str(remote))


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(files, "FIRST_PAUSE_SECONDS", 0.1)


def stored_file(folder: Path) -> Path:
    """The second shard, in the stored form of the folder."""
    (path,) = folder.glob(f"{SECOND}*")
    return path


def clip_ids(clips: StoredClips) -> list[str]:
    return [clip["clip_id"] for clip in clips]


@contextmanager
def broken_for_a_while(path: Path, *, seconds: float | None) -> Iterator[None]:
    """Replaces a file by something that cannot be read; for ever if `seconds` is None."""
    aside = path.with_name("aside")
    path.rename(aside)
    path.mkdir()

    def restore() -> None:
        path.rmdir()
        aside.rename(path)

    timer = threading.Timer(seconds or 0.0, restore)
    if seconds is not None:
        timer.start()
    yield
    if seconds is not None:
        timer.join()


def test_a_remote_that_fails_for_a_while_is_tried_again(shards, remote, short_pauses, caplog):
    clips = StoredClips(shards)
    start = time.monotonic()
    with broken_for_a_while(stored_file(remote), seconds=0.25):
        assert clip_ids(clips) == ALL_CLIPS
    resumed = time.monotonic() - start
    failed = caplog.text.count("trying again")
    assert 1 <= failed <= 3
    assert f"{SECOND}" in caplog.text
    record_fault(
        "remote fails for a while",
        how="the shard cannot be read for 0.25 s",
        promised="the download is tried again; the same samples in the same order",
        happened=f"{failed} attempts failed, the next gave the shard; all 12 clips in order",
        resumed_seconds=resumed,
        steps_lost=0,
    )


def test_a_remote_that_keeps_failing_is_an_error_after_a_few_attempts(shards, remote, short_pauses):
    clips = StoredClips(shards)
    start = time.monotonic()
    with (
        broken_for_a_while(stored_file(remote), seconds=None),
        pytest.raises(
            ShardError, match=rf"{SECOND}.* cannot be downloaded, 4 attempts failed: .*[Ii]s a directory"
        ) as raised,
    ):
        clip_ids(clips)
    detected = time.monotonic() - start
    assert detected < 5
    record_fault(
        "remote fails for good",
        how="the shard cannot be read",
        promised="a limited number of attempts, then an error that names the shard",
        happened=str(raised.value),
        detected_seconds=detected,
    )


def test_a_download_that_was_torn_is_fetched_again(shards, remote, caplog):
    """The first copy of the shard is incomplete, as during an upload."""
    clips, stored = StoredClips(shards), stored_file(remote)
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-50])

    def repair_when_warned(record: object) -> bool:
        stored.write_bytes(whole)
        return True

    shard_cache.logger.addFilter(repair_when_warned)
    try:
        assert clip_ids(clips) == ALL_CLIPS
    finally:
        shard_cache.logger.removeFilter(repair_when_warned)
    assert f"{SECOND}" in caplog.text
    assert "this process downloads the file again" in caplog.text
    record_fault(
        "download torn once",
        how="the remote file is 50 bytes short at the first attempt",
        promised="detected by size and hash, fetched again",
        happened="fetched twice; all 12 clips in order",
        steps_lost=0,
    )


def test_a_read_only_remote_file_is_no_read_only_cache(shards, remote):
    stored_file(remote).chmod(0o444)
    assert clip_ids(StoredClips(shards)) == ALL_CLIPS
    assert (Path(shards.local) / SECOND).stat().st_mode & 0o200


def test_half_written_files_in_a_cache_are_never_read(shards):
    cache = Path(shards.local)
    cache.mkdir()
    for left in (TEMPORARY, f"{TEMPORARY}.tmp", ".index.partial.json", f".{SECOND}.lock"):
        (cache / left).write_bytes(b"half")
    assert clip_ids(StoredClips(shards)) == ALL_CLIPS
    assert not list(cache.glob(PARTIAL_FILES))


def test_shared_memory_that_a_killed_run_of_the_library_left_does_not_refuse_the_next_start(shards):
    """The block marks this cache as in use though it is not: mosaicml-streaming would refuse to start for ever."""
    block = Path("/dev/shm/000000_locals")
    if block.exists():
        pytest.fail(f"{block} is there already, and nothing of ours makes it")
    text = f"{shards.local}\0".encode() + b"0"
    block.write_bytes((4 + len(text)).to_bytes(4, "little") + text)
    try:
        before = set(os.listdir("/dev/shm"))
        with pytest.raises(ValueError, match="Reused local directory"):
            StreamingDataset(local=shards.local, remote=shards.remote, batch_size=1)
        assert clip_ids(StoredClips(shards)) == ALL_CLIPS
        assert {name for name in set(os.listdir("/dev/shm")) - before if name[:6].isdigit()} == set()
    finally:
        block.unlink()
    record_fault(
        "stale shared memory of a killed run",
        how="a block that names this cache as taken; the library's own dataset refuses it",
        promised="the next start succeeds",
        happened="all 12 clips in order, nothing new in shared memory",
        steps_lost=0,
    )


@pytest.mark.parametrize("how", ["first_use", "hash"])
@pytest.mark.parametrize("moment", ["before it is compared", "after it is compared"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_file_that_another_process_removes_first_is_no_error(tmp_path, monkeypatch, moment, how, compression):
    """Files of schema 1 are hashed; frames of schema 2 are compared when they are read (`test_track_shards`)."""
    remote = write_older_shards(tmp_path / "remote", 12, compression=compression)
    shards = Shards(local=str(tmp_path / "cache"), remote=remote.local)
    list(StoredClips(shards))
    damaged = Path(shards.local) / SECOND
    flip_byte(damaged)
    compare, removed = verify.compare_file, []

    def beside_another(path: Path, *arguments: Any, **options: Any) -> FileStamp:
        if path != damaged or removed:
            return compare(path, *arguments, **options)
        if moment == "before it is compared":
            path.unlink()
        try:
            return compare(path, *arguments, **options)
        except ShardError:
            path.unlink()
            raise
        finally:
            if not path.exists():
                removed.append(path)

    monkeypatch.setattr(verify, "compare_file", beside_another)
    assert clip_ids(StoredClips(shards, verify=how)) == ALL_CLIPS
    assert removed == [damaged]


def test_a_lock_whose_holder_is_stopped_is_an_error_that_shows_how_to_find_it(shards, monkeypatch):
    monkeypatch.setattr(shard_cache, "LOCK_TIMEOUT_SECONDS", 0.2)
    clips = StoredClips(shards)
    start = time.monotonic()
    with (
        FileLock(Path(shards.local) / f".{SECOND}.lock"),
        pytest.raises(
            ShardError, match=rf"another process to download '{SECOND}'.*stopped.*fuser .*another `local`"
        ) as raised,
    ):
        clip_ids(clips)
    record_fault(
        "lock of a process that is stopped",
        how="another holder keeps a shard's lock",
        promised="an error after the time-out that names the lock, no hang",
        happened=str(raised.value),
        detected_seconds=time.monotonic() - start,
    )


def test_a_cache_that_cannot_be_made_is_named_with_the_key_to_change(remote):
    """Nobody, not even root, can make a folder in /proc, as on a read-only disk."""
    with pytest.raises(
        ShardError, match=r"'index\.json' cannot be downloaded or unpacked into /proc/cache.*another|local"
    ):
        StoredClips(Shards(local="/proc/cache", remote=str(remote)))


def test_a_full_disk_is_an_error_that_names_the_shard_and_leaves_no_half_file(tmp_path, short_pauses):
    """No file may become larger than 4 KiB: the same path through the code as on a full disk."""
    write_random_shards(tmp_path / "remote", 12)
    shards = Shards(local=str(tmp_path / "cache"), remote=str(tmp_path / "remote"))
    clips = StoredClips(shards)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ShardError, match=rf"{os.strerror(errno.EFBIG)}") as raised:
            clip_ids(clips)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "part_00000.shard.00000.mds" in str(raised.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".mds" or path.match(PARTIAL_FILES)]
    assert clip_ids(clips) == ALL_CLIPS
    record_fault(
        "disk full while a shard is fetched",
        how="no file may grow beyond 4 KiB",
        promised="an error that names the shard, no half file; resumes when there is room",
        happened=str(raised.value),
        steps_lost=0,
    )


def test_nothing_is_written_through_a_link_in_the_cache(sound, tmp_path):
    """A link under the name of a temporary file could make a foreign folder overwrite any file of the user."""
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    remote = None
    if stored_file(folder).suffix == ".mds":
        remote, folder = str(folder), tmp_path / "cache"
        folder.mkdir()
    valued, absent = tmp_path / "valued", tmp_path / "absent"
    valued.write_text("of value")
    (folder / TEMPORARY).symlink_to(valued)
    (folder / f"{TEMPORARY}.tmp").symlink_to(absent)
    (folder / ".index.partial.json").symlink_to(valued)
    assert clip_ids(StoredClips(Shards(local=str(folder), remote=remote))) == ALL_CLIPS
    assert valued.read_text() == "of value"
    assert not absent.exists()
    assert not (folder / SECOND).is_symlink()
    record_fault(
        "links planted in a shard cache",
        how="temporary names are links to a file of the user",
        promised="no write outside the local folder",
        happened="the links were replaced, the file is unchanged",
    )


def test_a_shard_that_is_a_link_to_something_else_counts_as_damaged(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    (tmp_path / "secret").write_text("not a shard")
    stored_file(folder).unlink()
    (folder / stored_file(sound).name).symlink_to(tmp_path / "secret")
    with pytest.raises(ShardError, match=rf"{SECOND}.* is damaged: it has 11 bytes, the index lists \d+"):
        StoredClips(Shards(local=str(folder)))


def test_numbers_of_thousands_of_digits_in_an_index_are_a_clear_error(sound, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "shards"))
    edit_index(folder, lambda index: index.update(version="BIG"))
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"BIG"', "9" * 10_000))
    with pytest.raises(ShardError, match=r"index\.json is damaged: it is not valid JSON"):
        StoredClips(Shards(local=str(folder)))


@pytest.mark.parametrize("text", ["9" * 10_000, "[" * 100_000, '{"a":' * 100_000])
def test_metadata_that_would_crash_readers_are_refused_with_the_clips_name(text):
    with pytest.raises(ShardError, match=r"clip 'clip_0000'.*metadata is not JSON"):
        ColumnClip({**older_sample(random_clip(0)), "metadata": text}, where="sample 0")
