"""The loader in several real processes: the same batches on any number of ranks and workers, also after kills."""

import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.fault_log import record_fault
from support.random_shards import HEIGHT, WIDTH, write_random_shards
from support.ranks import StartedRanks, run_ranks

from dreamdance.data.loading.batch import ClipSample
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("remote") / "shards"
    write_random_shards(folder, 30, clips_per_part=3, compression="zstd")
    return str(folder)


def open_loader(ranks: Ranks, shards: dict, *, num_workers: int, timeout_seconds: float = 60) -> ClipLoader:
    clips = ClipDataset(
        Shards(**shards), width=WIDTH, height=HEIGHT, num_frames=2, flip_probability=0.5, seed=3, ranks=ranks
    )
    order = ClipOrder(clips.index.samples_per_shard, batch_size=8, seed=3)
    return ClipLoader(
        clips, order, micro_batch_size=2, ranks=ranks, num_workers=num_workers, timeout_seconds=timeout_seconds
    )


def read_steps(ranks: Ranks, *, shards: dict, num_workers: int, first: int = 0, steps: int = NUM_STEPS) -> list:
    """For every step: sample ids, and a sum over the pictures of each sample."""
    loader = open_loader(ranks, shards, num_workers=num_workers)
    loader.load_state_dict(loader.order.state_dict(first))
    result = []
    for micro_batches in islice(loader, steps):
        keys = torch.cat([batch.keys for batch in micro_batches])
        sums = torch.cat([(batch.rgb.sum((1, 2, 3, 4)) + batch.reference.sum((1, 2, 3))) for batch in micro_batches])
        result.append((keys.tolist(), sums.tolist()))
    return result


def join_ranks(results: list) -> list:
    """Joins the shares of all ranks for every step."""
    steps = zip(*results, strict=True)
    return [tuple([entry for share in shares for entry in share[part]] for part in (0, 1)) for shares in steps]


def read_until_killed(ranks: Ranks, *, shards: dict, log: str) -> None:
    loader = open_loader(ranks, shards, num_workers=2)
    for step, micro_batches in enumerate(loader):
        assert len(micro_batches) == loader.accumulation_steps
        if step == 3:
            pids = [str(worker.pid) for worker in multiprocessing.active_children()]
            Path(f"{log}.{ranks.rank}").write_text(" ".join(pids) + "\n")
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_with_a_killed_worker(ranks: Ranks, *, shards: dict) -> str:
    loader = open_loader(ranks, shards, num_workers=1)
    steps = iter(loader)
    next(steps)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    killed = time.monotonic()
    try:
        for _ in range(100):
            next(steps)
    except ShardError as error:
        return f"{time.monotonic() - killed:.3f} {error}"
    return "0 no error was raised"


@pytest.fixture(scope="module")
def expected(remote) -> list:
    return join_ranks([read_steps(Ranks(), shards={"local": remote}, num_workers=0)])


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (4, 0)])
def test_ranks_and_workers_change_nothing(remote, tmp_path, expected, world_size, num_workers):
    shards = {"local": str(tmp_path / "cache"), "remote": remote}
    results = run_ranks(read_steps, world_size, tmp_path / "ranks", shards=shards, num_workers=num_workers)
    assert join_ranks(results) == expected
    record_fault(
        "another number of ranks and data workers",
        how=f"{NUM_STEPS} steps on {world_size} ranks with {num_workers} workers each, beside one rank without any",
        promised="the same samples with the same augmentation in the same order",
        happened="sample ids and sums over their pictures are equal at every step",
        steps_lost=0,
    )


def test_another_number_of_ranks_resumes_at_the_same_sample(remote, tmp_path, expected):
    shards = {"local": str(tmp_path / "cache"), "remote": remote}
    arguments = {"shards": shards, "num_workers": 0}
    first = run_ranks(read_steps, 2, tmp_path / "first", steps=5, **arguments)
    then = run_ranks(read_steps, 4, tmp_path / "then", first=5, steps=NUM_STEPS - 5, **arguments)
    assert join_ranks(first) + join_ranks(then) == expected
    record_fault(
        "another number of ranks in the middle of an epoch",
        how=f"5 steps on 2 ranks, then {NUM_STEPS - 5} on 4",
        promised="no sample is repeated, left out or augmented differently",
        happened="sample ids and sums over their pictures equal those of one rank without interruption",
        steps_lost=0,
    )


def test_killed_ranks_do_not_block_the_next_start(remote, tmp_path, expected):
    shards = {"local": str(tmp_path / "cache"), "remote": remote}
    shared_before = set(os.listdir("/dev/shm"))
    log = tmp_path / "log"
    with StartedRanks(read_until_killed, 2, tmp_path / "killed", shards=shards, log=str(log)) as started:
        deadline = time.monotonic() + 60
        logs = [Path(f"{log}.{rank}") for rank in range(2)]
        while not all(path.exists() and path.read_text().endswith("\n") for path in logs):
            assert time.monotonic() < deadline, started.output()
            time.sleep(0.05)
        workers = [int(pid) for path in logs for pid in path.read_text().split()]
        assert len(workers) == 4
        pids = [str(pid) for pid in (*workers, *(process.pid for process in started.processes))]
        for rank in range(2):
            started.signal(rank, signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers are still running after their ranks ended"
        time.sleep(0.05)
    start = time.monotonic()
    results = run_ranks(read_steps, 2, tmp_path / "again", shards=shards, num_workers=1)
    assert join_ranks(results) == expected
    resumed = time.monotonic() - start
    suspects = ("locals", "shard_states", *pids)
    left = [name for name in set(os.listdir("/dev/shm")) - shared_before if any(word in name for word in suspects)]
    assert left == []
    record_fault(
        "ranks killed while their workers read ahead",
        how="SIGKILL of both ranks, two workers each",
        promised="workers end too, nothing blocks the next start, same samples in the same order",
        happened="no worker and no shared memory left, 8 steps bit-identical on another number of workers",
        resumed_seconds=resumed,
        steps_lost=0,
    )


def test_a_killed_worker_is_an_error_and_no_hang(remote, tmp_path):
    (message,) = run_ranks(read_with_a_killed_worker, 1, tmp_path / "ranks", shards={"local": remote})
    seconds, _, text = message.partition(" ")
    assert "a process that reads data died at step" in text
    record_fault(
        "data worker killed",
        how="SIGKILL of a worker that reads ahead",
        promised="an error that names it within seconds, no hang and no short epoch",
        happened=text,
        detected_seconds=float(seconds),
    )


class SlowClips(ClipDataset):
    """The reader waits nearly all the time."""

    def stored_sample(self, key: SampleKey) -> ClipSample:
        time.sleep(0.2)
        return super().stored_sample(key)


def read_slowly(ranks: Ranks, *, shards: dict, ready: str) -> list[int]:
    clips = SlowClips(Shards(**shards), width=WIDTH, height=HEIGHT, num_frames=2, ranks=ranks)
    order = ClipOrder(clips.index.samples_per_shard, batch_size=2, seed=3)
    loader = ClipLoader(clips, order, micro_batch_size=2, ranks=ranks, num_workers=1, timeout_seconds=4)
    steps = iter(loader)
    next(steps)
    (worker,) = multiprocessing.active_children()
    Path(ready).write_text(f"{worker.pid}\n")
    return [len(micro_batches) for micro_batches in islice(steps, 10)]


def test_a_job_that_was_suspended_for_longer_than_the_time_out_continues(remote, tmp_path):
    """As with `scontrol suspend`: all processes of the job stop, and the time of the suspension does not count."""
    ready = tmp_path / "ready"
    with StartedRanks(read_slowly, 1, tmp_path / "ranks", shards={"local": remote}, ready=str(ready)) as started:
        deadline = time.monotonic() + 60
        while not (ready.exists() and ready.read_text().endswith("\n")):
            assert time.monotonic() < deadline, started.output()
            time.sleep(0.02)
        processes = [started.processes[0].pid, int(ready.read_text())]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in processes:
                os.kill(pid, number)
            if number == signal.SIGSTOP:
                time.sleep(5)
        assert started.results() == [[1] * 10]


class _Stalled:
    """A dataset whose storage hangs."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips
        self.describe = clips.describe

    def stored_sample(self, key: object) -> None:
        time.sleep(600)


def test_storage_that_hangs_is_an_error_that_names_the_wait(remote):
    loader = open_loader(Ranks(), {"local": remote}, num_workers=1, timeout_seconds=3)
    loader.dataset = _Stalled(loader.dataset)
    start = time.monotonic()
    with pytest.raises(
        ShardError, match=r"no batch arrived for 3 s while waiting for step 0 \(sample .*batch_timeout_seconds"
    ) as raised:
        next(iter(loader))
    record_fault(
        "storage hangs",
        how="reading a clip hangs; time-out 3 s",
        promised="an error that names the step, the shard and the key",
        happened=str(raised.value),
        detected_seconds=time.monotonic() - start,
    )
