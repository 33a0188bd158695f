"""Processes share items through a folder of claims; they join late, leave, die or stop, and no item is done twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dreamdance.errors import LostWorkerError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.layout import read_done
from dreamdance.runs.work_queue import MAX_TAKEOVERS, QueueError, WorkQueue
from dreamdance.runtime.ranks import Ranks

pytestmark = pytest.mark.distributed

SILENCE_SECONDS = 2
WATCHED = Cluster(step_timeout_seconds=SILENCE_SECONDS, collective_timeout_seconds=60)
START = "one start"
# A process that does items. Rank 0 never ends the item that the last argument names: a fault can be injected there.
WORKER = """
import logging, sys, time
from functools import partial
from pathlib import Path
from dreamdance.errors import UserError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.exits import exit_process
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.signals import SignalListener

folder, rank, num_items, seconds, start, endless = sys.argv[1:]
logger = logging.getLogger()
end = lambda number: exit_process(logger, "%s", number.name, exit_code=0, level=logging.WARNING)
cluster = Cluster(step_timeout_seconds=2, collective_timeout_seconds=60)
ranks = Ranks(int(rank), 8, 0, start)
try:
    with SignalListener(end), WorkQueue(ranks, limits=cluster, run_folder=Path(folder)) as queue:
        share = queue.share("do", [f"item {number}" for number in range(int(num_items))])
        print("joined", flush=True)
        for item in filter(None, share.take()):
            print(item, flush=True)
            time.sleep(600 if (rank, item) == ("0", endless) else float(seconds))
            share.finish(item, f"by {rank}", made=item)
        def assemble():
            with (Path(folder) / "assembled").open("a") as file:
                file.write(f"{len(share.results())}\\n")
        queue.once("assemble", assemble)
except UserError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Workers:
    """The processes of one start; at the end of the block all that still run are killed."""

    def __init__(self, folder: Path, num_items: int, seconds: float = 0.0, endless: str = "") -> None:
        self.folder, self.work, self.endless = folder, (str(num_items), str(seconds)), endless
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def join(self, rank: int, start: str = START) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WORKER, str(self.folder), str(rank), *self.work, start, self.endless]
        output = (self.folder.parent / f"output_{len(self.processes)}.txt").open("w")
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        self.processes.append(process)
        return process

    def output(self, number: int) -> str:
        return (self.folder.parent / f"output_{number}.txt").read_text()

    def wait(self) -> list[int]:
        return [process.wait(60) for process in self.processes]


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def assert_each_done_once(folder: Path, num_items: int) -> None:
    assert Counter(read_done(folder)) == Counter(f"item {number}" for number in range(num_items))
    assert (folder / "assembled").read_text() == f"{num_items}\n", "once, when all was done"


def test_four_processes_do_two_hundred_items_once_each_and_clear_up(folder):
    with Workers(folder, 200, 0.01) as workers:
        for rank in range(4):
            workers.join(rank)
        assert workers.wait() == [0] * 4, [workers.output(rank) for rank in range(4)]
    assert_each_done_once(folder, 200)
    left = sorted(path.name for path in (folder / "queue").iterdir())
    assert left[:2] == ["lock", "over"]
    assert [name.partition(".")[0] for name in left[2:]] == ["start"], "the main rank has begun, for later processes"


def test_a_process_can_join_in_the_middle_and_one_that_joins_at_the_end_has_nothing_to_do(folder):
    with Workers(folder, 40, 0.1) as workers:
        workers.join(0)
        wait_until(lambda: read_done(folder))
        late = workers.join(5)
        assert workers.wait() == [0, 0]
        assert "item" in workers.output(1), "it does some of the items"
        workers.join(6)
        assert late.returncode == 0
        assert workers.wait() == [0, 0, 0]
        assert workers.output(2) == "joined\n"
    assert_each_done_once(folder, 40)


def test_a_process_that_is_asked_to_leave_releases_its_item(folder):
    with Workers(folder, 6, 0.1, endless="item 0") as workers:
        leaving = workers.join(0)
        wait_until(lambda: "item 0" in workers.output(0))
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(30) == 0
        names = [path.name for path in (folder / "queue").iterdir()]
        assert not [name for name in names if name.endswith(".claim") or name.startswith("member")]
        workers.join(1)
        assert workers.wait() == [0, 0], workers.output(1)
    assert_each_done_once(folder, 6)


def test_the_item_of_a_killed_process_is_taken_over_at_once(folder):
    with Workers(folder, 6, 0.1, endless="item 0") as workers:
        killed = workers.join(0)
        wait_until(lambda: "item 0" in workers.output(0))
        workers.join(1)
        wait_until(lambda: len(read_done(folder)) == 5)
        killed.kill()
        began = time.monotonic()
        assert workers.wait() == [-signal.SIGKILL, 0], workers.output(1)
        assert time.monotonic() - began < SILENCE_SECONDS + 1
        assert "rank 0 has died: this process takes over 'item 0'" in workers.output(1)
    assert_each_done_once(folder, 6)


def test_the_item_of_a_stopped_process_is_done_by_another_which_then_makes_the_job_start_again(folder):
    with Workers(folder, 6, 0.1, endless="item 0") as workers:
        stopped = workers.join(0)
        wait_until(lambda: "item 0" in workers.output(0))
        stopped.send_signal(signal.SIGSTOP)
        assert workers.join(1).wait(60) == 1, workers.output(1)
        assert "LostWorkerError: rank 0 has given no sign for 2 s: the other ranks have done its share" in (
            workers.output(1)
        )
    assert_each_done_once(folder, 6)


class OtherMachine:
    """A process of another machine, which holds the first item of "do"."""

    def __init__(self, folder: Path, *, job: str = "another job", takeovers: int = 0) -> None:
        self.file = folder / f"member.{uuid.uuid4().hex}"
        member = {
            "rank": 3,
            "machine": "another one",
            "process": os.getpid(),
            "began": "then",
            "job": job,
            "start": job,
        }
        self.file.write_text(json.dumps(member))
        (folder / "do.0000000.claim").write_text(f"{self.file.name} {takeovers}")


def take_when_lost(items: Iterator[str | None], item: str) -> float:
    began = time.monotonic()
    while next(items) != item:
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_process_of_another_machine_keeps_its_item_as_long_as_it_renews_its_file(folder):
    with contextlib.ExitStack() as left:
        queue = left.enter_context(WorkQueue(Ranks(), limits=WATCHED, run_folder=folder))
        elsewhere, share = OtherMachine(queue.folder, job=queue.ranks.job), queue.share("do", ["far", "near"])
        items = share.take()
        assert next(items) == "near"
        queue.held.add(queue.folder / "another")  # as long as it holds an item, `take` yields None and does not wait
        share.finish("near")
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * SILENCE_SECONDS:
            os.utime(elsewhere.file)
            assert next(items) is None
            assert not share.is_done()
            time.sleep(0.2)
        assert SILENCE_SECONDS - 1 < take_when_lost(items, "far") < SILENCE_SECONDS + 3
        share.finish("far", "done here")
        assert share.results() == {"far": "done here", "near": ""}
        with pytest.raises(LostWorkerError, match="rank 3 has given no sign for 2 s"):
            left.pop_all().close()


def test_a_silent_process_of_another_job_does_not_keep_this_job_from_finishing(folder):
    """This job's launcher could not end it; if it continues, it finds itself replaced."""
    with WorkQueue(Ranks(start="slurm 7_0 restart 0"), limits=WATCHED, run_folder=folder) as queue:
        elsewhere, share = OtherMachine(queue.folder, job="slurm 7_1"), queue.share("do", ["far"])
        take_when_lost(share.take(), "far")
        share.finish("far")
    assert queue.everyone_left
    assert not elsewhere.file.exists()


def test_an_item_that_ended_several_processes_is_given_up_by_name(folder):
    given_up = pytest.raises(
        QueueError, match=r"'far' \(do\) was given up: 4 processes were lost .* a process has left"
    )
    with given_up, WorkQueue(Ranks(), run_folder=folder) as queue:
        elsewhere, share = OtherMachine(queue.folder, takeovers=MAX_TAKEOVERS), queue.share("do", ["far"])
        elsewhere.file.unlink()
        next(share.take())


def test_an_empty_claim_of_a_lost_process_is_taken_over(folder):
    with WorkQueue(Ranks(), limits=WATCHED, run_folder=folder) as queue:
        (queue.folder / "do.0000000.claim").touch()
        share = queue.share("do", ["far"])
        began = time.monotonic()
        assert next(filter(None, share.take())) == "far"
        assert time.monotonic() - began > SILENCE_SECONDS - 1
        share.finish("far")


def test_a_process_whose_item_was_taken_over_gets_an_error_before_it_writes(folder):
    with WorkQueue(Ranks(), run_folder=folder) as queue:
        share = queue.share("do", ["near"])
        assert next(share.take()) == "near"
        share.check("near")
        (queue.folder / "do.0000000.claim").write_text("member.other 1")
        with pytest.raises(LostWorkerError, match="another one does 'near'"):
            share.check("near")
        share.finish("near")


def test_a_queue_that_was_stopped_is_done_when_the_items_in_progress_are_done(folder):
    with WorkQueue(Ranks(), run_folder=folder) as queue:
        share = queue.share("do", ["a", "b"])
        items = share.take()
        assert next(items) == "a"
        assert queue.stop_reason() is None
        queue.stop("because")
        assert queue.stop_reason() == "because"
        assert next(items) is None
        assert not share.is_done()
        share.finish("a", "made")
        assert share.is_done()
        assert list(items) == []
        assert share.results() == {"a": "made"}


def test_processes_that_found_different_items_do_none_of_them(folder):
    with WorkQueue(Ranks(), run_folder=folder) as queue:
        queue.share("do", ["a", "b"])
        with pytest.raises(QueueError, match="found different items"):
            queue.share("do", ["a", "c"])


def test_a_rank_waits_for_its_main_rank_no_longer_than_the_time_of_a_start(folder):
    cluster = Cluster(step_timeout_seconds=1, collective_timeout_seconds=2)
    queue = WorkQueue(Ranks(1, 2, 1, START), limits=cluster, run_folder=folder)
    with pytest.raises(LostWorkerError, match="the main rank has given no sign for 2 s"), queue:
        raise AssertionError("it has begun")


def test_a_start_uses_nothing_of_an_earlier_one(folder):
    for start in ("first", "second"):
        with WorkQueue(Ranks(start=start), run_folder=folder) as queue:
            share = queue.share("do", ["a"])
            assert next(share.take()) == "a", "it may have to be done again: the code that made it checks that"
            share.finish("a")
        assert len(list((folder / "queue").glob("start.*"))) == 1


def test_jobs_that_work_on_one_run_at_once_share_its_items_though_each_has_a_main_rank(folder):
    with Workers(folder, 40, 0.1) as workers:
        for task in range(3):
            workers.join(0, f"slurm 7_{task} restart 0")
        assert workers.wait() == [0, 0, 0], [workers.output(number) for number in range(3)]
        assert all("item" in workers.output(number) for number in range(3)), "each does some of the items"
    assert_each_done_once(folder, 40)


def test_a_job_that_starts_again_does_not_count_its_earlier_start_on_another_machine(folder):
    (folder / "queue").mkdir()
    OtherMachine(folder / "queue", job="slurm 7")
    for claim in (folder / "queue").glob("member.*"):
        claim.write_text(claim.read_text().replace('"start": "slurm 7"', '"start": "slurm 7 restart 0"'))
    with WorkQueue(Ranks(start="slurm 7 restart 1"), limits=WATCHED, run_folder=folder) as queue:
        share = queue.share("do", ["far"])
        began = time.monotonic()
        assert next(share.take()) == "far"
        share.finish("far")
    assert time.monotonic() - began < SILENCE_SECONDS


def test_a_job_joins_another_one_on_another_machine_that_is_at_work(folder):
    (folder / "queue").mkdir()
    elsewhere = OtherMachine(folder / "queue")
    with WorkQueue(Ranks(start="slurm 8 restart 0"), limits=WATCHED, run_folder=folder) as queue:
        share = queue.share("do", ["far", "near"])
        items = share.take()
        assert next(items) == "near", "the other job has claimed the first item"
        share.finish("near")
        (queue.folder / "do.0000000.done").write_text("done there")
        elsewhere.file.unlink()
        assert list(items) == []
        assert share.results() == {"far": "done there", "near": ""}
