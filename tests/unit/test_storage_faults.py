"""Storage that fails or is gone while shards are read: reading waits for some seconds, then raises a transient error.

After a transient error the job starts again; after an error of the user it must not.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.random_shards import HEIGHT, WIDTH, write_random_shards

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.errors import LostWorkerError, ShardError, is_transient
from dreamdance.recipe.sections import Shards
from dreamdance.runs import files
from dreamdance.runtime.ranks import Ranks

SECOND = "part_00004.shard.00000.mds"
ALL_CLIPS = [f"clip_{number:04d}" for number in range(12)]
AWAY_SECONDS = 0.25


@pytest.fixture
def folder(tmp_path) -> Path:
    write_random_shards(tmp_path / "shards", 12)
    return tmp_path / "shards"


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(files, "FIRST_PAUSE_SECONDS", 0.1)


def unmount(folder: Path) -> Callable[[], None]:
    """Leaves an empty folder, like a mount point on which nothing is mounted."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()

    def mount() -> None:
        folder.rmdir()
        aside.rename(folder)

    return mount


def break_device(folder: Path) -> Callable[[], None]:
    """Makes every read of the second shard fail with EIO, by a link to unmapped memory of this process."""
    path, aside = folder / SECOND, folder / "aside"
    path.rename(aside)
    path.symlink_to("/proc/self/mem")
    with path.open("rb", buffering=0) as file, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.read(8)
    return lambda: os.replace(aside, path)


FAULTS = {"gone with its index (ENOENT)": unmount, "a shard cannot be read (EIO)": break_device}


@contextmanager
def restored_later(restore: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(AWAY_SECONDS, restore)
    timer.start()
    yield
    timer.join()


def clip_ids(clips: StoredClips) -> list[str]:
    return [clip["clip_id"] for clip in clips]


@pytest.mark.parametrize("fault", FAULTS)
def test_reading_waits_for_storage_that_is_gone_for_a_while(fault, folder, short_pauses, caplog):
    clips = StoredClips(Shards(local=str(folder)))
    start = time.monotonic()
    with restored_later(FAULTS[fault](folder)):
        assert clip_ids(clips) == ALL_CLIPS
    assert time.monotonic() - start > AWAY_SECONDS
    assert "trying again" in caplog.text
    record_fault(
        f"storage of the shards fails for a while: {fault}",
        how=f"for {AWAY_SECONDS} s, while clips are read",
        promised="reading waits for some seconds; the same clips in the same order",
        happened="all clips in order, without a new start",
        resumed_seconds=time.monotonic() - start,
        steps_lost=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_storage_that_stays_away_is_a_transient_error(fault, num_workers, folder, short_pauses):
    clips = ClipDataset(Shards(local=str(folder)), width=WIDTH, height=HEIGHT, num_frames=2, cache_bytes=0)
    order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=1)
    loader = ClipLoader(clips, order, micro_batch_size=4, ranks=Ranks(), num_workers=num_workers, timeout_seconds=60)
    FAULTS[fault](folder)
    with pytest.raises(LostWorkerError, match=r"sample \d of shard .* cannot be read, 4 attempts failed") as raised:
        list(islice(loader, 9))
    assert is_transient(raised.value)


def test_one_missing_shard_beside_its_index_is_an_error_of_the_user(folder, short_pauses):
    clips = StoredClips(Shards(local=str(folder)))
    (folder / SECOND).unlink()
    with pytest.raises(ShardError, match=rf"{SECOND} is missing; run `prepare` again") as raised:
        clip_ids(clips)
    assert not is_transient(raised.value)


def test_a_remote_folder_that_is_gone_for_a_while_is_tried_again(folder, tmp_path, short_pauses):
    clips = StoredClips(Shards(local=str(tmp_path / "cache"), remote=str(folder)))
    with restored_later(unmount(folder)):
        assert clip_ids(clips) == ALL_CLIPS


def test_a_remote_folder_that_stays_away_is_a_transient_error(folder, tmp_path, short_pauses):
    clips = StoredClips(Shards(local=str(tmp_path / "cache"), remote=str(folder)))
    unmount(folder)
    with pytest.raises(LostWorkerError, match="cannot be downloaded, 4 attempts failed"):
        clip_ids(clips)
