"""Readers of shards that are killed, stopped or slow: the same order continues, or a clear error; never a hang."""

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.fault_log import record_fault
from support.interruptions import (
    assert_same_export,
    fault_time,
    first_step_after,
    output,
    run_settings,
    run_with_fault,
    samples_in_order,
    start_and_wait,
    steps_lost,
    without_repeats,
)
from support.random_shards import HEIGHT, WIDTH, flip_byte, write_random_shards
from support.ranks import StartedRanks
from support.recipes import tiny_stage1_recipe
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dreamdance.data.loading import workers as batch_workers
from dreamdance.data.loading.batch import ClipSample
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards import cache
from dreamdance.data.shards.verify import verify_shards
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runs.files import PARTIAL_FILES
from dreamdance.runs.layout import export_folder
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.objectives.geometry import GeometryObjective

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARD = "part_00003.shard.00000.mds"
NUM_CLIPS = 15
ALL_CLIPS = [f"clip_{number:04d}" for number in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("remote") / "shards"
    write_random_shards(folder, NUM_CLIPS, clips_per_part=3, compression="zstd")
    return str(folder)


def clip_ids(shards: dict[str, Any]) -> list[str]:
    return [clip["clip_id"] for clip in StoredClips(Shards(**shards), ranks=Ranks())]


class _StopsHalfWay:
    """Replaces the library's downloader by one that hangs after half of the file."""

    @staticmethod
    def direct_download(source: str, destination: str, timeout: float) -> None:
        content = Path(source).read_bytes()
        Path(f"{destination}.tmp").write_bytes(content[: len(content) // 2])
        time.sleep(600)


def fetch_half(ranks: Ranks, *, shards: dict[str, Any]) -> None:
    clips = StoredClips(Shards(**shards), ranks=ranks)
    cache.CloudDownloader = _StopsHalfWay
    clips.clip(3)


def test_a_run_killed_during_a_download_does_not_block_others(remote, tmp_path):
    """The killed process holds the lock of the shard, and half of the shard is in the cache."""
    cache = tmp_path / "cache"
    shards = {"local": str(cache), "remote": remote}
    half = cache / ".part_00003.shard.00000.partial.mds.tmp"
    with StartedRanks(fetch_half, 1, tmp_path / "ranks", shards=shards) as started:
        deadline = time.monotonic() + 60
        while not half.exists():
            assert time.monotonic() < deadline, started.output()
            time.sleep(0.02)
        with pytest.raises(TimeoutError), FileLock(cache / f".{SHARD}.lock", timeout=0):
            pytest.fail("the download does not hold its lock")
        started.signal(0, signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL]
    assert half.exists()
    start = time.monotonic()
    assert clip_ids(shards) == ALL_CLIPS
    resumed = time.monotonic() - start
    assert not list(cache.glob(PARTIAL_FILES))
    record_fault(
        "stale lock and half-downloaded shard of a killed run",
        how="SIGKILL in the middle of the download, while its lock is held",
        promised="the next start reads the same clips and leaves no half file",
        happened="all clips in order, the half file is gone",
        resumed_seconds=resumed,
        steps_lost=0,
    )


def read_when_all_are_there(ranks: Ranks, *, shards: dict[str, Any], meeting: str) -> list[str]:
    """Two runs of one process each, independent of each other, check and fill the same cache."""
    Path(meeting, str(ranks.rank)).touch()
    while len(list(Path(meeting).iterdir())) < ranks.world_size:
        time.sleep(0.001)
    return clip_ids(shards)


def test_two_processes_may_fill_one_cache_at_once(remote, tmp_path):
    """Some shards are missing, and one is damaged: each process may remove and fetch it while the other does."""
    cache, meeting = tmp_path / "cache", tmp_path / "meeting"
    meeting.mkdir()
    shards = {"local": str(cache), "remote": remote}
    assert clip_ids(shards) == ALL_CLIPS
    for first in (0, 6, 9):
        (cache / f"part_{first:05d}.shard.00000.mds").unlink()
    flip_byte(cache / SHARD)
    with StartedRanks(read_when_all_are_there, 3, tmp_path / "ranks", shards=shards, meeting=str(meeting)) as started:
        assert started.results() == [ALL_CLIPS] * 3
    index = StoredClips(Shards(local=str(cache), remote=remote), verify="size", ranks=Ranks()).index
    assert all((cache / entry.raw.name).is_file() for entry in index.shards)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.mds")}
    verify_shards(index, how="hash", remote=remote)
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.mds")} == before  # none was found damaged
    assert not list(cache.glob(PARTIAL_FILES))
    record_fault(
        "processes fill one shard cache at once",
        how="three start together on a cache with missing and damaged shards",
        promised="all read all clips; every file in the cache is whole",
        happened="all read all clips in order, all hashes right",
        steps_lost=0,
    )


class SlowClips(ClipDataset):
    """Storage that is slow for one clip in five."""

    def stored_sample(self, key: SampleKey) -> ClipSample:
        if key.sample_id % 5 == 0:
            time.sleep(0.4)
        return super().stored_sample(key)


def open_loader(shards: dict[str, Any], *, num_workers: int, kind: type = ClipDataset, **options: Any) -> ClipLoader:
    clips = kind(Shards(**shards), width=WIDTH, height=HEIGHT, num_frames=2, seed=3, ranks=Ranks())
    order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=3)
    return ClipLoader(clips, order, micro_batch_size=2, ranks=Ranks(), num_workers=num_workers, **options)


def read_steps(loader: ClipLoader, count: int) -> list[Any]:
    return [
        [(batch.keys.tolist(), batch.rgb.sum((1, 2, 3, 4)).tolist()) for batch in micro_batches]
        for micro_batches in islice(loader, count)
    ]


def test_slow_workers_change_neither_order_nor_content(remote, monkeypatch):
    """The delay is longer than the interval between checks of the workers, and shorter than the time-out."""
    monkeypatch.setattr(batch_workers, "LOOK_EVERY_SECONDS", 0.1)
    expected = read_steps(open_loader({"local": remote}, num_workers=0), 8)
    slow = open_loader({"local": remote}, num_workers=2, kind=SlowClips, timeout_seconds=60)
    start = time.monotonic()
    assert read_steps(slow, 8) == expected
    assert time.monotonic() - start > 0.8
    record_fault(
        "slow data worker",
        how="one clip in five takes 0.4 s, four times the interval between checks of the workers",
        promised="training waits and continues in the same order",
        happened="8 steps bit-identical to those of fast storage",
        steps_lost=0,
    )


def stop_worker(ranks: Ranks, *, shards: dict[str, Any], log: str) -> None:
    """Ends like a training whose data fails: the error leaves the loop, and Python waits for its children."""
    loader = open_loader(shards, num_workers=2, timeout_seconds=2)
    steps = iter(loader)
    next(steps)
    workers = [worker.pid for worker in multiprocessing.active_children()]
    time.sleep(0.5)  # it has read ahead: the reader must get these batches without it
    os.kill(workers[0], signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        for _ in range(100):
            next(steps)
    except ShardError as error:
        seconds = time.monotonic() - stopped
        Path(log).write_text(f"{seconds}\n{loader.step}\n{' '.join(map(str, workers))}\n{error}")
        raise


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_worker_is_an_error_within_the_time_out_and_is_ended(remote, tmp_path):
    log = tmp_path / "log"
    with StartedRanks(stop_worker, 1, tmp_path / "ranks", shards={"local": remote}, log=str(log)) as started:
        assert started.wait() == [1], started.output()
    seconds, step, pids, message = log.read_text().split("\n", 3)
    workers = [int(pid) for pid in pids.split()]
    assert len(workers) == 2
    assert "no batch arrived for 2 s" in message
    assert "data.batch_timeout_seconds" in message
    assert int(step) > 1, "batches that it had read ahead are used"
    assert float(seconds) < 10
    deadline = time.monotonic() + 10
    while any(_exists(pid) for pid in workers):
        assert time.monotonic() < deadline, "a stopped worker is still there after its reader ended"
        time.sleep(0.05)
    record_fault(
        "data worker hangs",
        how="SIGSTOP of one of two workers; time-out 2 s",
        promised="an error that names the step and the key, the process ends, no worker stays",
        happened=message,
        detected_seconds=float(seconds),
    )


@dataclass(frozen=True)
class KilledWorker:
    """Kills the process that reads the data of one rank, in its n-th training forward pass."""

    rank: int
    forward: int

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        count = 0

        def kill_in_forward(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            if isinstance(module, GeometryObjective) and module.training:
                count += 1
                if count == self.forward:
                    (worker,) = multiprocessing.active_children()
                    os.kill(worker.pid, signal.SIGKILL)

        register_module_forward_pre_hook(kill_in_forward)


def test_a_training_whose_data_worker_dies_ends_on_all_ranks_and_resumes_bit_for_bit(shards, tmp_path):
    changes = {"data.num_workers": 1, "max_steps": 6, "checkpoint.every_steps": 2}
    recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_and_wait(recipe, whole) == [0, 0], output(whole)
    faulty = run_with_fault(recipe, broken, KilledWorker(rank=1, forward=7))  # of 2 a step: in step 4
    detected = faulty.ended - fault_time(broken, 1)
    assert all(code == 1 for code in faulty.codes), faulty.codes
    assert "a process that reads data died at step" in output(broken, rank=1)
    assert start_and_wait(recipe, broken) == [0, 0], output(broken)
    for unbroken, interrupted in zip(samples_in_order(whole), samples_in_order(broken), strict=True):
        assert without_repeats(interrupted) == unbroken
    assert_same_export(export_folder(whole, 6), export_folder(broken, 6))
    record_fault(
        "data worker of one rank killed in a training",
        how="SIGKILL in step 4 of 6, 2 ranks",
        promised="all ranks end with an error; started again, bit-identical to an uninterrupted run",
        happened="both ranks ended with 1; same losses, samples and weights in the end",
        detected_seconds=detected,
        resumed_seconds=first_step_after(broken, faulty.ended),
        steps_lost=steps_lost(broken, faulty.ended),
    )


@dataclass(frozen=True)
class HangingStorage:
    """From the n-th training forward pass of one rank on, opening a shard of the folder hangs for ever."""

    folder: Path
    rank: int
    forward: int

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        count = 0

        def hang(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            if isinstance(module, GeometryObjective) and module.training:
                count += 1
                if count == self.forward:
                    for path in self.folder.glob("*.mds"):
                        pipe = path.with_suffix(".pipe")
                        os.mkfifo(pipe)  # opening a pipe for reading waits for a writer
                        os.replace(pipe, path)

        register_module_forward_pre_hook(hang)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_training_whose_storage_hangs_is_ended_in_time(num_workers, shards, tmp_path):
    """Without workers the ranks hang, and their watchdogs end them; with workers the batch time-out does."""
    copy, run = Path(shutil.copytree(shards, tmp_path / "shards")), tmp_path / "run"
    changes = {"data.num_workers": num_workers, "data.batch_timeout_seconds": 3, "cluster.step_timeout_seconds": 3}
    recipe = tiny_stage1_recipe("domains", run_settings(copy, **changes))
    faulty = run_with_fault(recipe, run, HangingStorage(copy / "train", rank=1, forward=4))
    detected = faulty.ended - fault_time(run, 1)
    assert all(faulty.codes), faulty.codes
    if num_workers:
        ended = [rank for rank in range(2) if "no batch arrived for 3 s while waiting for step" in output(run, rank)]
    else:
        ended = [rank for rank in range(2) if faulty.codes[rank] == TRY_AGAIN_EXIT_CODE]
        assert all("training a step" in output(run, rank) for rank in ended)
        assert any("in stored_sample" in output(run, rank) for rank in ended), "the stack of the hanging call"
    assert ended, output(run)
    assert detected < 90
    record_fault(
        f"storage hangs in a training with {num_workers} workers",
        how="every shard is a pipe without a writer, from step 2 on; both time-outs 3 s",
        promised="a rank that waits ends in time with the cause, and the other rank ends too",
        happened=f"the ranks ended with {faulty.codes}",
        detected_seconds=detected,
    )
