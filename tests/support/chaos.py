"""A training with faults from outside at random instants, started again in the same way each time.

The faults use only what an administrator has: process numbers, the run folder and the logs.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder, complete_steps, last_progress, step_folders
from support.chaos_starts import Start, data_workers
from support.fault_log import record_fault
from support.interruptions import first_step_after, progress

TIME_LIMIT_SECONDS = 240.0
POLL_SECONDS = 0.02
MAX_FILE_BYTES = 65_536  # more than the log of a rank, less than any of its files of tensors
RESUMES = "the same command resumes from the newest checkpoint that verifies"


class FaultyRun:
    """A run into which faults are injected.

    Attributes:
        folder: the run folder.
        start: the current start.
        started_at: the time of the current start; seconds since 1970.
        random: generator that chooses instants, ranks, files and bytes.
        fault_time: the time of the last fault; seconds since 1970.
        notes: remarks on the current fault for the fault log.
        damaged: the checkpoint that the next start must skip.
    """

    def __init__(self, run: Path, start_again: Callable[[], Start], *, seed: int) -> None:
        """Starts the run.

        Args:
            run: the run folder.
            start_again: starts the run; the same way each time.
            seed: seed of every random choice.
        """
        self.folder, self._start_again = run, start_again
        self.random = random.Random(seed)
        self.fault_time = 0.0
        self.notes: list[str] = []
        self.damaged: Path | None = None
        self.start_run()

    def __enter__(self) -> "FaultyRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.start.end()

    def start_run(self) -> None:
        """Starts the run, or starts it again."""
        self.started_at = time.time()
        self.start = self._start_again()

    def step(self) -> int:
        """The newest reported step."""
        line = last_progress(self.folder)
        return int(line["done"]) if line else 0

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Waits for a condition while the start is running.

        Raises:
            AssertionError: the start ended, or the time limit is over; the message contains the log.
        """
        give_up = time.monotonic() + TIME_LIMIT_SECONDS
        while not condition():
            assert not self.start.is_over(), f"over before {what}\n{self.start.log()}"
            assert time.monotonic() < give_up, f"no {what} in {TIME_LIMIT_SECONDS:.0f} s\n{self.start.log()}"
            time.sleep(POLL_SECONDS)

    def wait_for_end(self) -> None:
        """Waits until all ranks have ended.

        Raises:
            AssertionError: some are still running after the time limit.
        """
        give_up = time.monotonic() + TIME_LIMIT_SECONDS
        while not self.start.is_over():
            assert time.monotonic() < give_up, f"still there after {TIME_LIMIT_SECONDS:.0f} s\n{self.start.log()}"
            time.sleep(POLL_SECONDS)

    def has_stepped_since(self, moment: float) -> bool:
        """Whether the newest line of the progress file reports a step after a moment (seconds since 1970)."""
        line = last_progress(self.folder)
        return line is not None and "message" not in line and line["time"] > moment

    def send(self, number: signal.Signals, pids: Sequence[int]) -> None:
        """Sends a signal to processes and notes the time."""
        self.fault_time = time.time()
        for pid in pids:
            os.kill(pid, number)

    def any_rank(self) -> list[int]:
        return [self.random.choice(self.start.pids())]


def kill_a_rank(run: FaultyRun) -> None:
    run.send(signal.SIGKILL, run.any_rank())


def kill_all(run: FaultyRun) -> None:
    run.send(signal.SIGKILL, run.start.pids())


def kill_all_while_starting(run: FaultyRun) -> None:
    """Ends the run, starts it again, and kills that start at a random instant before its first step."""
    usual = first_step_after(run.folder, run.started_at)
    kill_all(run)
    run.wait_for_end()
    run.start_run()
    run.wait_for(run.start.pids, "the ranks")
    time.sleep(run.random.uniform(0.1, 0.9) * max(0.0, usual - (time.time() - run.started_at)))
    kill_all(run)


def stop_a_rank(run: FaultyRun) -> None:
    run.send(signal.SIGSTOP, run.any_rank())


def ask_a_rank_to_stop(run: FaultyRun) -> None:
    run.send(signal.SIGUSR2, run.any_rank())


def ask_all_to_stop(run: FaultyRun) -> None:
    run.send(signal.SIGTERM, run.start.pids())


def kill_a_data_worker(run: FaultyRun) -> None:
    workers = data_workers(run.start.pids())
    assert workers, "no process reads data"
    run.send(signal.SIGKILL, [run.random.choice(workers)])


def kill_during_a_save(run: FaultyRun) -> None:
    """Kills one rank or all, at an instant between the appearance of the folder and 0.1 s later."""
    run.wait_for(lambda: not _is_complete(_newest(run)), "a save")
    folder = _newest(run)
    victims = run.start.pids() if run.random.random() < 0.5 else run.any_rank()
    time.sleep(run.random.choice((0.0, 0.02, 0.05, 0.1)))
    run.send(signal.SIGKILL, victims)
    run.wait_for_end()
    run.notes.append(f"the checkpoint was {'complete by then' if _is_complete(folder) else 'cut short'}")


def fill_the_disk(run: FaultyRun) -> None:
    """Limits the size of files of the last rank so that no part of a checkpoint fits."""
    run.fault_time = time.time()
    _limit_files(run.start.pids()[-1], MAX_FILE_BYTES)


def fill_the_disk_for_a_moment(run: FaultyRun) -> None:
    pid, num_failed = run.start.pids()[-1], run.start.log().count("trying again in")
    run.fault_time = time.time()
    _limit_files(pid, MAX_FILE_BYTES)
    run.wait_for(lambda: run.start.log().count("trying again in") > num_failed, "the failed attempt")
    _limit_files(pid, resource.RLIM_INFINITY)


def _limit_files(pid: int, largest_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest_bytes, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


def damage_newest_checkpoint(change: Callable[[FaultyRun, Path], None]) -> Callable[[FaultyRun], None]:
    """Ends the run and damages its newest checkpoint, once this start has saved another one to resume from."""

    def inject(run: FaultyRun) -> None:
        run.wait_for(lambda: len(_made_since(run, run.started_at)) > 1, "two checkpoints of this start")
        kill_all(run)
        run.wait_for_end()
        run.damaged = checkpoint_folder(run.folder, complete_steps(run.folder)[-1])
        change(run, run.damaged)

    return inject


def flip_a_bit(run: FaultyRun, folder: Path) -> None:
    path = _any_file(run, folder)
    content = bytearray(path.read_bytes())
    content[run.random.randrange(len(content))] ^= 1 << run.random.randrange(8)
    path.write_bytes(content)


def truncate_a_file(run: FaultyRun, folder: Path) -> None:
    path = _any_file(run, folder)
    os.truncate(path, run.random.randrange(path.stat().st_size))


def remove_a_file(run: FaultyRun, folder: Path) -> None:
    _any_file(run, folder).unlink()


def truncate_the_complete_file(run: FaultyRun, folder: Path) -> None:
    path = folder / COMPLETE_FILE
    os.truncate(path, run.random.randrange(path.stat().st_size))


def _any_file(run: FaultyRun, folder: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    return run.random.choice(files)


def _newest(run: FaultyRun) -> Path | None:
    folders = step_folders(run.folder / "checkpoints")
    return folders[-1] if folders else None


def _is_complete(folder: Path | None) -> bool:
    return folder is None or (folder / COMPLETE_FILE).is_file()


def _made_since(run: FaultyRun, moment: float) -> list[int]:
    folders = [(step, checkpoint_folder(run.folder, step) / COMPLETE_FILE) for step in complete_steps(run.folder)]
    return [step for step, file in folders if file.is_file() and file.stat().st_mtime > moment]


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault.

    Attributes:
        inject: injects the fault.
        how: description of the injection for the fault log.
        promised: the promised behaviour.
        ends: whether the fault must end the start.
        loses_steps: whether steps may be done again.
        log_text: text that a log must contain, of this start or the next one.
    """

    inject: Callable[[FaultyRun], None]
    how: str
    promised: str = f"all ranks end; {RESUMES}"
    ends: bool = True
    loses_steps: bool = True
    log_text: str = ""


SKIPPED = f"the damage is logged, the checkpoint skipped; {RESUMES}"
KINDS = {
    "rank killed": FaultKind(kill_a_rank, "SIGKILL of one rank"),
    "all ranks killed": FaultKind(kill_all, "SIGKILL of every rank"),
    "killed while it starts": FaultKind(
        kill_all_while_starting, "SIGKILL of every rank between its start and its first step"
    ),
    "rank stopped": FaultKind(
        stop_a_rank, "SIGSTOP of one rank", f"the watchdog ends it; {RESUMES}", log_text="hangs. This process ends"
    ),
    "asked to stop by SIGUSR2": FaultKind(
        ask_a_rank_to_stop, "SIGUSR2 to one rank", "all save, no step is lost", loses_steps=False
    ),
    "asked to stop by SIGTERM": FaultKind(
        ask_all_to_stop, "SIGTERM to every rank", "all save, no step is lost", loses_steps=False
    ),
    "killed during a save": FaultKind(kill_during_a_save, "SIGKILL of one rank or all while a checkpoint is written"),
    "data worker killed": FaultKind(
        kill_a_data_worker, "SIGKILL of a process that reads data", log_text="reads data died"
    ),
    "disk full": FaultKind(fill_the_disk, "RLIMIT_FSIZE of one rank, for good", log_text="could not be saved"),
    "disk full for a moment": FaultKind(
        fill_the_disk_for_a_moment,
        "RLIMIT_FSIZE of one rank, until it has failed once",
        "the checkpoint is written again, the run continues",
        ends=False,
        loses_steps=False,
        log_text="trying again in",
    ),
    "bit flipped in the newest checkpoint": FaultKind(
        damage_newest_checkpoint(flip_a_bit),
        "any bit of any file, all ranks killed",
        SKIPPED,
        log_text="skipping checkpoint",
    ),
    "file of the newest checkpoint truncated": FaultKind(
        damage_newest_checkpoint(truncate_a_file),
        "any file at any length, all ranks killed",
        SKIPPED,
        log_text="skipping checkpoint",
    ),
    "file of the newest checkpoint missing": FaultKind(
        damage_newest_checkpoint(remove_a_file), "any file, all ranks killed", SKIPPED, log_text="skipping checkpoint"
    ),
    "manifest of the newest checkpoint torn": FaultKind(
        damage_newest_checkpoint(truncate_the_complete_file),
        "COMPLETE at any length, all ranks killed",
        SKIPPED,
        log_text="skipping checkpoint",
    ),
}


@dataclass(frozen=True)
class PlannedFault:
    """A fault of a plan: it is injected at an instant after the run has reported `step`."""

    kind: str
    step: int


def make_plan(kinds: Sequence[str], count: int, *, last_step: int, seed: int) -> list[PlannedFault]:
    """`count` faults at random steps, in order: all kinds in a random order, then all again in another one."""
    chance = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += chance.sample(list(kinds), len(kinds))
    steps = sorted(chance.sample(range(1, last_step + 1), count))
    return [PlannedFault(kind, step) for kind, step in zip(chosen[:count], steps, strict=True)]


def inject_and_check(run: FaultyRun, fault: PlannedFault, *, every_steps: int) -> None:
    """Injects one fault, and checks that the promise holds and that the run takes steps again.

    Args:
        run: the run; its current start takes steps, or is about to.
        fault: the kind of fault, and its step.
        every_steps: number of steps between two checkpoints.
    """
    kind = KINDS[fault.kind]
    run.wait_for(lambda: run.step() >= fault.step, f"step {fault.step}")
    run.wait_for(lambda: run.has_stepped_since(run.started_at), "the first step")
    time.sleep(run.random.uniform(0, 0.2))
    run.notes, run.damaged = [], None
    started_at = run.started_at
    kind.inject(run)
    log, detected, lost, since = "", None, 0, run.fault_time
    if kind.ends:
        run.wait_for_end()
        since, log = time.time(), run.start.log()
        detected = since - run.fault_time
        run.start_run()
    run.wait_for(lambda: run.has_stepped_since(since), "the next step")
    log += run.start.log()
    if kind.ends:
        lines = progress(run.folder)
        again = next(line["done"] for line in lines if "message" in line and line["time"] > since)
        lost = max(0, max(line["done"] for line in lines if started_at < line["time"] <= since) - again)
    assert kind.log_text in log, f"{fault.kind}: no log contains '{kind.log_text}'\n{log}"
    if run.damaged is not None:
        assert f"skipping checkpoint {run.damaged.name}" in log
    # A save may still be unfinished when the next one is due, and the newest checkpoint may be damaged.
    bound = 3 * every_steps if kind.loses_steps else 0
    assert lost <= bound, f"{fault.kind} at step {fault.step}: {lost} steps lost"
    resumed = since + first_step_after(run.folder, since) - run.fault_time
    record_fault(
        f"chaos: {fault.kind}",
        how=f"{kind.how}, at a random instant",
        promised=kind.promised,
        happened="; ".join(["as promised", *run.notes]),
        detected_seconds=detected,
        resumed_seconds=resumed,
        steps_lost=lost,
    )
