"""A training that is struck from outside at random instants, and started again in the same way each time.

What strikes knows only what an administrator would: the processes' numbers, the run folder and the logs.
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

PATIENCE_SECONDS = 240.0
POLL_SECONDS = 0.02
ROOM_BYTES = 65_536
"""More than a rank's log, less than any of its tensors' files."""
GOES_ON = "goes on with the same command, from the newest checkpoint that verifies"


class Struck:
    """A run under faults.

    Attributes:
        start: the start that is under way.
        random: chooses instants, ranks, files and bytes.
        moment: when it was last struck; seconds since 1970.
        notes: what else is to be told of the present fault.
        damaged: the checkpoint that the next start must skip.
    """

    def __init__(self, run: Path, start_again: Callable[[], Start], *, seed: int) -> None:
        """Starts the run.

        Args:
            run: its folder.
            start_again: the same command each time.
            seed: of all that is chosen.
        """
        self.run, self._start_again = run, start_again
        self.random = random.Random(seed)
        self.moment = 0.0
        self.notes: list[str] = []
        self.damaged: Path | None = None
        self.begin()

    def __enter__(self) -> "Struck":
        return self

    def __exit__(self, *exception: object) -> None:
        self.start.end()

    def begin(self) -> None:
        """Starts it, or starts it again."""
        self.began = time.time()
        self.start = self._start_again()

    def step(self) -> int:
        """The newest step that was told of."""
        line = last_progress(self.run)
        return int(line["done"]) if line else 0

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Waits while the start lives.

        Raises:
            AssertionError: the start ended, or the patience did; says what it wrote.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert not self.start.is_over(), f"over before {what}\n{self.start.log()}"
            assert time.monotonic() < give_up, f"no {what} in {PATIENCE_SECONDS:.0f} s\n{self.start.log()}"
            time.sleep(POLL_SECONDS)

    def wait_for_end(self) -> None:
        """Waits until no rank is left.

        Raises:
            AssertionError: they outlive the patience.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not self.start.is_over():
            assert time.monotonic() < give_up, f"still there after {PATIENCE_SECONDS:.0f} s\n{self.start.log()}"
            time.sleep(POLL_SECONDS)

    def has_stepped_since(self, moment: float) -> bool:
        """Whether the newest line that it told is of a step, after a moment (seconds since 1970)."""
        line = last_progress(self.run)
        return line is not None and "message" not in line and line["time"] > moment

    def send(self, number: signal.Signals, pids: Sequence[int]) -> None:
        """Strikes."""
        self.moment = time.time()
        for pid in pids:
            os.kill(pid, number)

    def any_rank(self) -> list[int]:
        return [self.random.choice(self.start.pids())]


def kill_a_rank(struck: Struck) -> None:
    struck.send(signal.SIGKILL, struck.any_rank())


def kill_all(struck: Struck) -> None:
    struck.send(signal.SIGKILL, struck.start.pids())


def kill_all_while_starting(struck: Struck) -> None:
    """Ends the run, starts it, and ends that before its first step; how far it has got is left to chance."""
    usual = first_step_after(struck.run, struck.began)
    kill_all(struck)
    struck.wait_for_end()
    struck.begin()
    struck.wait_for(struck.start.pids, "the ranks")
    time.sleep(struck.random.uniform(0.1, 0.9) * max(0.0, usual - (time.time() - struck.began)))
    kill_all(struck)


def stop_a_rank(struck: Struck) -> None:
    struck.send(signal.SIGSTOP, struck.any_rank())


def ask_a_rank_to_stop(struck: Struck) -> None:
    struck.send(signal.SIGUSR2, struck.any_rank())


def ask_all_to_stop(struck: Struck) -> None:
    struck.send(signal.SIGTERM, struck.start.pids())


def kill_a_data_worker(struck: Struck) -> None:
    workers = data_workers(struck.start.pids())
    assert workers, "no process reads data"
    struck.send(signal.SIGKILL, [struck.random.choice(workers)])


def kill_during_a_save(struck: Struck) -> None:
    """One rank or all, somewhere between the folder's first sight and well after."""
    struck.wait_for(lambda: not _is_complete(_newest(struck)), "a save")
    folder = _newest(struck)
    victims = struck.start.pids() if struck.random.random() < 0.5 else struck.any_rank()
    time.sleep(struck.random.choice((0.0, 0.02, 0.05, 0.1)))
    struck.send(signal.SIGKILL, victims)
    struck.wait_for_end()
    struck.notes.append(f"the checkpoint was {'complete by then' if _is_complete(folder) else 'cut short'}")


def fill_the_disk(struck: Struck) -> None:
    """No file of the last rank may grow beyond what no part of a checkpoint fits into."""
    struck.moment = time.time()
    _limit_files(struck.start.pids()[-1], ROOM_BYTES)


def fill_the_disk_for_a_moment(struck: Struck) -> None:
    pid, told = struck.start.pids()[-1], struck.start.log().count("trying again in")
    struck.moment = time.time()
    _limit_files(pid, ROOM_BYTES)
    struck.wait_for(lambda: struck.start.log().count("trying again in") > told, "the failed attempt")
    _limit_files(pid, resource.RLIM_INFINITY)


def _limit_files(pid: int, largest_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest_bytes, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


def damage(spoil: Callable[[Struck, Path], Path]) -> Callable[[Struck], None]:
    """Ends the run and spoils its newest checkpoint, when this start has made one more that will serve."""

    def strike(struck: Struck) -> None:
        struck.wait_for(lambda: len(_made_since(struck, struck.began)) > 1, "two checkpoints of this start")
        kill_all(struck)
        struck.wait_for_end()
        struck.damaged = checkpoint_folder(struck.run, complete_steps(struck.run)[-1])
        spoil(struck, struck.damaged)

    return strike


def flip_a_bit(struck: Struck, folder: Path) -> None:
    path = _any_file(struck, folder)
    content = bytearray(path.read_bytes())
    content[struck.random.randrange(len(content))] ^= 1 << struck.random.randrange(8)
    path.write_bytes(content)


def truncate_a_file(struck: Struck, folder: Path) -> None:
    path = _any_file(struck, folder)
    os.truncate(path, struck.random.randrange(path.stat().st_size))


def remove_a_file(struck: Struck, folder: Path) -> None:
    _any_file(struck, folder).unlink()


def tear_the_manifest(struck: Struck, folder: Path) -> None:
    path = folder / COMPLETE_FILE
    os.truncate(path, struck.random.randrange(path.stat().st_size))


def _any_file(struck: Struck, folder: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    return struck.random.choice(files)


def _newest(struck: Struck) -> Path | None:
    folders = step_folders(struck.run / "checkpoints")
    return folders[-1] if folders else None


def _is_complete(folder: Path | None) -> bool:
    return folder is None or (folder / COMPLETE_FILE).is_file()


def _made_since(struck: Struck, moment: float) -> list[int]:
    folders = [(step, checkpoint_folder(struck.run, step) / COMPLETE_FILE) for step in complete_steps(struck.run)]
    return [step for step, file in folders if file.is_file() and file.stat().st_mtime > moment]


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        strike: does it.
        how: it is done, in words.
        promised: what must hold.
        ends: whether the start must end by it.
        loses_steps: whether steps may be done again.
        told: what some log must say of it, then or at the next start.
    """

    strike: Callable[[Struck], None]
    how: str
    promised: str = f"all ranks end; {GOES_ON}"
    ends: bool = True
    loses_steps: bool = True
    told: str = ""


SKIPPED = f"said and skipped; {GOES_ON}"
KINDS = {
    "rank killed": Kind(kill_a_rank, "SIGKILL of one rank"),
    "all ranks killed": Kind(kill_all, "SIGKILL of every rank"),
    "killed while it starts": Kind(
        kill_all_while_starting, "SIGKILL of every rank between its start and its first step"
    ),
    "rank stopped": Kind(
        stop_a_rank, "SIGSTOP of one rank", f"the watchdog ends it; {GOES_ON}", told="hangs. This process ends"
    ),
    "asked to stop by SIGUSR2": Kind(
        ask_a_rank_to_stop, "SIGUSR2 to one rank", "all save, no step is lost", loses_steps=False
    ),
    "asked to stop by SIGTERM": Kind(
        ask_all_to_stop, "SIGTERM to every rank", "all save, no step is lost", loses_steps=False
    ),
    "killed during a save": Kind(kill_during_a_save, "SIGKILL of one rank or all while a checkpoint is written"),
    "data worker killed": Kind(kill_a_data_worker, "SIGKILL of a process that reads data", told="reads data died"),
    "disk full": Kind(fill_the_disk, "RLIMIT_FSIZE of one rank, for good", told="could not be saved"),
    "disk full for a moment": Kind(
        fill_the_disk_for_a_moment,
        "RLIMIT_FSIZE of one rank, until it has failed once",
        "written again, the run goes on",
        ends=False,
        loses_steps=False,
        told="trying again in",
    ),
    "bit flipped in the newest checkpoint": Kind(
        damage(flip_a_bit), "any bit of any file, all ranks killed", SKIPPED, told="skipping checkpoint"
    ),
    "file of the newest checkpoint truncated": Kind(
        damage(truncate_a_file), "any file at any length, all ranks killed", SKIPPED, told="skipping checkpoint"
    ),
    "file of the newest checkpoint missing": Kind(
        damage(remove_a_file), "any file, all ranks killed", SKIPPED, told="skipping checkpoint"
    ),
    "manifest of the newest checkpoint torn": Kind(
        damage(tear_the_manifest), "COMPLETE at any length, all ranks killed", SKIPPED, told="skipping checkpoint"
    ),
}


@dataclass(frozen=True)
class Fault:
    """A fault of a plan: it strikes at an instant after the run has told of `step`."""

    kind: str
    step: int


def make_plan(kinds: Sequence[str], count: int, *, last_step: int, seed: int) -> list[Fault]:
    """Every kind in some order, and again in another until there are `count`; at any steps, in order."""
    chance = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += chance.sample(list(kinds), len(kinds))
    steps = sorted(chance.sample(range(1, last_step + 1), count))
    return [Fault(kind, step) for kind, step in zip(chosen[:count], steps, strict=True)]


def endure(struck: Struck, fault: Fault, *, every_steps: int) -> None:
    """Strikes once, sees to it that the promise is kept, and that the run takes steps again.

    Args:
        struck: the run; its present start takes steps, or is about to.
        fault: what happens, and when.
        every_steps: how often the run saves.
    """
    kind = KINDS[fault.kind]
    struck.wait_for(lambda: struck.step() >= fault.step, f"step {fault.step}")
    struck.wait_for(lambda: struck.has_stepped_since(struck.began), "the first step")
    time.sleep(struck.random.uniform(0, 0.2))
    struck.notes, struck.damaged = [], None
    began = struck.began
    kind.strike(struck)
    said, detected, lost, since = "", None, 0, struck.moment
    if kind.ends:
        struck.wait_for_end()
        since, said = time.time(), struck.start.log()
        detected = since - struck.moment
        struck.begin()
    struck.wait_for(lambda: struck.has_stepped_since(since), "the next step")
    said += struck.start.log()
    if kind.ends:
        told = progress(struck.run)
        again = next(line["done"] for line in told if "message" in line and line["time"] > since)
        lost = max(0, max(line["done"] for line in told if began < line["time"] <= since) - again)
    assert kind.told in said, f"{fault.kind}: nothing says '{kind.told}'\n{said}"
    if struck.damaged is not None:
        assert f"skipping checkpoint {struck.damaged.name}" in said
    # A save may still be in the making when the next is due, and the newest may be damaged.
    bound = 3 * every_steps if kind.loses_steps else 0
    assert lost <= bound, f"{fault.kind} at step {fault.step}: {lost} steps lost"
    resumed = since + first_step_after(struck.run, since) - struck.moment
    record_fault(
        f"chaos: {fault.kind}",
        how=f"{kind.how}, at a random instant",
        promised=kind.promised,
        happened="; ".join(["as promised", *struck.notes]),
        detected_seconds=detected,
        resumed_seconds=resumed,
        steps_lost=lost,
    )
