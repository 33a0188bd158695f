"""A real Slurm cluster for tests, runs that the command launches on it, and faults that are injected into them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamdance.launch.submission import SubmittedJob, last_job
from dreamdance.recipe import dump_recipe
from dreamdance.runs.layout import complete_steps, progress_file
from support.recipes import tiny_stage1_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"
LAUNCHER = [sys.executable, str(ROOT / "launchers" / "slurm.py")]
TIME_LIMIT_SECONDS = 120
FOREIGN_PREFIXES = ("SLURM", "SUBMITIT", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = TIME_LIMIT_SECONDS) -> float:
    """Waits for a condition, and returns the seconds that it took.

    Raises:
        TimeoutError: the condition was not met in time.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() > started + seconds:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return time.monotonic() - started


def write_training(folder: Path, shards: Path, changes: dict[str, Any]) -> Path:
    """Writes the recipe of a tiny training that reports every step and validates nothing; returns the file.

    Args:
        folder: the folder of the file.
        shards: a folder with `train` and `validation`.
        changes: dotted keys and their values.
    """
    recipe = tiny_stage1_recipe(
        "domains",
        {
            "data.train.local": str(shards / "train"),
            "data.validation.local": str(shards / "validation"),
            "data.num_workers": 0,
            "micro_batch_size": 1,
            "validation.loss_every_steps": 100_000,
            "validation.sample_every_steps": 100_000,
            "logging.every_steps": 1,
            **changes,
        },
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder / "recipe.yaml"


class Cluster:
    """Slurm nodes on this machine, started by `cluster.sh`; without accounting."""

    def __init__(self, folder: Path, *, nodes: int = 4) -> None:
        self.folder, self.nodes = folder, nodes
        self.port = _neighbouring_free_ports(nodes + 1)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def control(self, verb: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `cluster.sh VERB`. Output goes through a file, because daemons would keep pipes open."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "control.log").open("w+") as log:
            done = subprocess.run(
                [str(SCRIPT), verb, str(self.folder), *map(str, words)],
                env=self.environment | {"PORT": str(self.port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
                check=False,
            )
            log.seek(0)
            done.stdout = log.read()
        assert not check or done.returncode == 0, done.stdout
        return done

    def start(self) -> None:
        self.control("start", self.nodes)

    def stop(self) -> None:
        self.control("stop")

    def slurm(self, *words: str) -> str:
        """Runs one of Slurm's commands and returns its output."""
        done = subprocess.run(
            words,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def show(self, job_id: str) -> dict[str, str]:
        """The fields of a job in `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.slurm("scontrol", "--oneliner", "show", "job", job_id)))

    def node_states(self) -> dict[str, str]:
        lines = self.slurm("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)


def _neighbouring_free_ports(count: int) -> int:
    """The first of `count` neighbouring ports on which no process listens."""
    for first in range(17_800, 19_800, 20):
        probes = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(probes):
                probe.bind(("", first + number))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise OSError(f"no {count} free ports in a row")


@dataclass(frozen=True)
class Step:
    """A reported step; `time` is in seconds since 1970."""

    number: int
    loss: float
    time: float


class Run:
    """A run of one recipe on the cluster, launched by the command from a user's folder."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: Path, name: str, *words: str) -> None:
        self.cluster, self.folder, self.recipe, self.name = cluster, folder, recipe, name
        self.words = words
        self.run_folder = folder / "runs" / name

    def command(self, *options: str) -> list[str]:
        """The words that a user types."""
        return [*LAUNCHER, str(self.recipe), f"name={self.name}", *self.words, "--cluster", "slurm", *options]

    def launch(self, *options: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs the command of a user; it ends when the job is submitted, or with `--follow` when the job ends."""
        return subprocess.run(
            self.command(*options),
            cwd=self.folder,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run_verb(self, verb: str) -> str:
        """Runs `status RUN` or `cancel RUN` and returns the output."""
        done = subprocess.run(
            [*LAUNCHER, verb, self.name],
            cwd=self.folder,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def job(self) -> SubmittedJob:
        job = last_job(self.run_folder)
        assert job is not None
        return job

    def state(self) -> str:
        return self.cluster.show(self.job.job_id)["JobState"]

    def restarts(self) -> int:
        return int(self.cluster.show(self.job.job_id)["Restarts"])

    def log(self, rank: int = 0) -> str:
        path = self.job.log_file(self.run_folder, rank)
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        return "\n".join(f"---- rank {rank}\n{self.log(rank)}" for rank in range(self.job.num_tasks))

    def steps(self) -> list[Step]:
        """All reported steps, those that were done again included."""
        path = progress_file(self.run_folder)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [Step(line["done"], line["loss"], line["time"]) for line in lines if "loss" in line]

    def complete_steps(self) -> list[int]:
        return complete_steps(self.run_folder)

    def rank_pids(self) -> dict[int, int]:
        """Rank -> process number of all ranks that are running."""
        found, logs = {}, (self.run_folder / "logs").resolve()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if "dreamdance.launch.rank" not in words:
                    continue
                if logs not in {Path(word).resolve() for word in words if word.startswith("/")}:  # an array's is a link
                    continue
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            number = next((word.partition("=")[2] for word in variables if word.startswith("SLURM_PROCID=")), None)
            if number is not None and words[0].endswith("python"):
                found[int(number)] = int(entry.name)
        return found

    def warn(self, *names: str) -> None:
        """Sends signals to all ranks, as Slurm does: USR2, TERM."""
        for name in names:
            self.cluster.slurm("scancel", f"--signal={name}", self.job.job_id)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.rank_pids()[rank], number)

    def wait_for_steps(self, more: int, *, checkpoint: bool = True) -> None:
        """Waits until the run has taken `more` steps from now on, and has a checkpoint."""
        before = len(self.steps())
        try:
            wait_until(lambda: len(self.steps()) >= before + more, f"{more} steps of {self.name}")
            if checkpoint:
                wait_until(self.complete_steps, f"a checkpoint of {self.name}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; the job is {self.state()}\n{self.logs()}") from None


@dataclass(frozen=True)
class Recovery:
    """The cost of a fault.

    Attributes:
        detected_seconds: time from the fault until all ranks of that start had ended.
        resumed_seconds: time from the fault to the first step after it.
        steps_lost: number of steps that were done again.
        first_step: number of the first step after the fault.
    """

    detected_seconds: float
    resumed_seconds: float
    steps_lost: int
    first_step: int


def measure_recovery(run: Run, inject: Callable[[], None]) -> Recovery:
    """Injects a fault into a training that takes steps, and waits until the training takes steps again by itself."""
    pids, fault_time = set(run.rank_pids().values()), time.time()
    assert pids, "no rank is running"
    inject()
    try:
        wait_until(lambda: not pids & set(run.rank_pids().values()), "the end of all ranks")
        detected = time.time() - fault_time
        count = len(run.steps())
        wait_until(lambda: len(run.steps()) > count, "the first step after the fault", 2 * TIME_LIMIT_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; the job is {run.state()}\n{run.logs()}") from None
    steps = run.steps()
    last, first = steps[count - 1], steps[count]
    return Recovery(detected, first.time - fault_time, last.number + 1 - first.number, first.number)
