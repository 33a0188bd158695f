"""Two ways to start a run for faults from outside: by the command, or quickly from the fork server of the tests."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dreamdance.launch.local.controller import GRACE_SECONDS
from dreamdance.launch.submission import last_job
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.worker_processes import WORKER_NAME
from dreamdance.training.train import train
from support.ranks import StartedRanks
from support.training_scenarios import Recipe

LAUNCHER = Path(__file__).parents[2] / "launchers" / "slurm.py"


class Start(Protocol):
    """A start of a run."""

    def pids(self) -> list[int]:
        """The process numbers of the ranks, in order; empty until all ranks have been started."""

    def is_over(self) -> bool:
        """Whether all ranks have ended; after a failed rank, ends those that still run."""

    def log(self) -> str:
        """The output of all ranks."""

    def end(self) -> None:
        """Ends all processes of the start."""


class CommandStart:
    """A start by the command that a user types: `launchers/slurm.py RECIPE --cluster local --follow`."""

    def __init__(self, recipe_file: Path, run: Path) -> None:
        """Starts the command.

        Args:
            recipe_file: the recipe; its `name` is the name of the run folder.
            run: the run folder.
        """
        self.run = run
        words = [str(recipe_file), "--cluster", "local", "--follow", "--runs", str(run.parent)]
        with (run.parent / "command.txt").open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def pids(self) -> list[int]:
        job = last_job(self.run)
        if job is None or job.launcher_pid != self.process.pid:
            return []
        ranks = [number for number, process in running().items() if process.parent == job.pid]
        return sorted(ranks) if len(ranks) == job.num_tasks else []  # the controller starts them in this order

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def log(self) -> str:
        job = last_job(self.run)
        if job is None or job.launcher_pid != self.process.pid:
            return ""
        logs = [job.log_file(self.run, rank) for rank in range(job.num_tasks)]
        return "\n".join(path.read_text(errors="replace") for path in logs if path.is_file())

    def end(self) -> None:
        if not self.is_over():
            self.process.send_signal(signal.SIGINT)  # as Ctrl-C: the command ends the job, and then itself
            self.process.wait()


class ForkedStart:
    """Forked ranks that have imported everything already; the first that fails ends the others, as in the launcher."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self._ranks = StartedRanks(train_rank, recipe.cluster.world_size, run / "output", recipe=recipe, run=run)
        self._failed_at: float | None = None

    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._ranks.processes]

    def is_over(self) -> bool:
        codes = [process.exitcode for process in self._ranks.processes]
        if self._failed_at is None and any(codes):
            self._failed_at = time.monotonic()
        if self._failed_at is not None and time.monotonic() > self._failed_at + GRACE_SECONDS:
            for process in self._ranks.processes:
                process.kill()
        return None not in codes

    def log(self) -> str:
        return self._ranks.output()

    def end(self) -> None:
        self._ranks.__exit__()


def train_rank(ranks: Ranks, *, recipe: Recipe, run: Path) -> None:
    """Trains; the function that every forked rank runs."""
    train(recipe, run)


@dataclass(frozen=True)
class Process:
    """A process of this machine."""

    name: str
    parent: int


def running() -> dict[int, Process]:
    """All processes by number, without zombies."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = entry.read_text().rpartition(")")
        except OSError:
            continue  # it ended while we looked
        state, parent = tail.split()[:2]
        if state != "Z":
            found[int(entry.parent.name)] = Process(head.partition("(")[2], int(parent))
    return found


def data_workers(ranks: list[int]) -> list[int]:
    """The processes that read data for these ranks: forked by the server of a rank, or by the server of all ranks."""
    processes = running()
    servers = {number for number, process in processes.items() if process.parent in ranks}
    servers |= {processes[rank].parent for rank in ranks if rank in processes}
    return sorted(
        number for number, process in processes.items() if process.name == WORKER_NAME and process.parent in servers
    )
