"""Jobs on this machine whose time is over, or that are asked to go: real controllers, real ranks, tiny recipes."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import resumed_step, settings
from support.recipes import tiny_stage1_recipe

from dreamdance.launch import status
from dreamdance.launch.local.controller import status_file
from dreamdance.launch.requeue import read_requeues
from dreamdance.launch.run_folder import create_or_check
from dreamdance.launch.submission import SubmittedJob, cancel, last_job, submit
from dreamdance.runs.layout import complete_steps, progress_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENDLESS = {"max_steps": 1_000_000, "checkpoint.every_steps": 1_000_000, "validation.loss_every_steps": 1_000_000}
ENDLESS |= {"validation.sample_every_steps": 1_000_000}

# How long a start takes is the machine's affair, and no part of what is tested: the clock starts with the first step.
CONTROLLER = """#!{python} -P
import os, sys, time
from pathlib import Path
from dreamdance.launch.local import controller as local_controller
from dreamdance.runs.layout import progress_file

sys.argv[1:] = sys.argv[-1:]
log = progress_file(Path(sys.argv[1]))
start_tasks = local_controller.LocalController.start_tasks
os.environ["SUBMITIT_LOCAL_TIMEOUT_S"] = str({limit_seconds} or os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])

def start_and_wait_for_a_step(self):
    before = steps_shown()
    start_tasks(self)
    while steps_shown() == before and all(task.poll() is None for task in self.tasks):
        time.sleep(0.02)

def steps_shown():
    return log.read_text().count('"loss"') if log.is_file() else 0

local_controller.LocalController.start_tasks = start_and_wait_for_a_step
sys.exit(local_controller.main())
"""


@pytest.fixture
def start(tmp_path, shards, monkeypatch):
    """Starts an endless training as `--cluster local` does; leaves nothing running."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[SubmittedJob] = []
    run = tmp_path / "runs" / "tiny"

    def start(*, limit_seconds: int | None = None, **cluster: int) -> Path:
        changes = ENDLESS | {f"cluster.{key}": value for key, value in cluster.items()}
        recipe = tiny_stage1_recipe("domains", settings(shards, **changes))
        program = tmp_path / "controller"
        program.write_text(CONTROLLER.format(python=sys.executable, limit_seconds=limit_seconds))
        program.chmod(0o755)
        create_or_check(recipe, run, [])
        with monkeypatch.context() as instead:
            instead.setattr(sys, "executable", str(program))
            started.extend(submit([recipe], [run], "local"))
        return run

    yield start
    for job in started:
        cancel(job)
    assert ranks_of(run) == []


def ranks_of(run: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "dreamdance.launch.rank" in words and str(run / "logs") in words:
            found.append(int(entry.name))
    return sorted(found)


def steps_since_the_last_message(run: Path) -> int:
    lines = progress_file(run).read_text().splitlines() if progress_file(run).is_file() else []
    last = max((number for number, line in enumerate(lines) if '"message"' in line), default=0)
    return sum('"loss"' in line for line in lines[last:])


def state(run: Path) -> str:
    return status.details(run).splitlines()[0].partition("): ")[2]


def is_running(run: Path) -> bool:
    """By what the controller leaves: `status` reads and checks the recipe, too much for asking again and again."""
    job = last_job(run)
    return job is not None and not status_file(run, job.job_id).is_file()


def wait_until(condition: Callable[[], bool], run: Path, what: str) -> None:
    """Fails at once if the job ends without it."""
    give_up = time.monotonic() + 180
    while not condition():
        assert is_running(run) or condition(), f"no {what}\n{status.details(run)}"
        assert time.monotonic() < give_up, f"no {what} in 180 s\n{status.details(run)}"
        time.sleep(0.2)


def wait_for_the_end(run: Path) -> float:
    """How long it took, in seconds."""
    began = time.monotonic()
    while is_running(run):
        assert time.monotonic() < began + 60, status.details(run)
        time.sleep(0.2)
    return time.monotonic() - began


def test_a_job_whose_time_is_over_saves_and_is_started_again_as_often_as_the_recipe_says(start):
    run = start(time_minutes=1, stop_seconds=58, max_requeues=1)
    wait_until(lambda: len(complete_steps(run)) == 1, run, "first checkpoint")
    (first,) = complete_steps(run)
    wait_until(lambda: resumed_step(run) == first, run, "start that goes on")
    assert state(run).startswith("running (local job")
    wait_until(lambda: len(complete_steps(run)) == 2, run, "second checkpoint")
    wait_for_the_end(run)
    assert state(run) == "stopped", "it saved in time, and may not start a third time"
    assert complete_steps(run)[1] > first
    (requeue,) = read_requeues(run)
    assert (requeue.reason, requeue.failed, requeue.progress) == ("it was asked to stop", False, first)
    assert "restarts     1 (it was asked to stop)" in status.details(run)
    assert ranks_of(run) == []
    record_fault(
        "time limit, on one machine",
        how="a limit of a minute whose warning comes 2 s after the first step; twice",
        promised="saved in time; started again by the controller as often as the recipe says, no step lost",
        happened=f"saved at step {first}, went on from there, saved again, and rested as max_requeues=1 says",
        steps_lost=0,
    )


def test_a_job_that_hears_sigterm_saves_and_rests_and_one_that_hears_nothing_times_out(start):
    run = start()
    wait_until(lambda: steps_since_the_last_message(run) > 2, run, "steps")
    os.kill(ranks_of(run)[1], signal.SIGTERM)
    detected = wait_for_the_end(run)
    assert state(run) == "stopped"
    (saved,) = complete_steps(run)

    start(limit_seconds=4, stop_seconds=2)
    wait_until(lambda: resumed_step(run) == saved and steps_since_the_last_message(run) > 0, run, "steps that go on")
    record_fault(
        "pre-empted by SIGTERM alone, on one machine",
        how="SIGTERM to rank 1 of 2, without a warning before",
        promised="both save at the next step boundary and end well; the next start goes on, no step lost",
        happened=f"saved at step {saved}, status said stopped; started again, it went on from there",
        detected_seconds=detected,
        steps_lost=0,
    )

    for pid in ranks_of(run):
        os.kill(pid, signal.SIGSTOP)
    detected = wait_for_the_end(run)
    job = last_job(run)
    assert job is not None
    assert state(run) == f"failed (local job {job.job_id}: timed out)"
    assert complete_steps(run) == [saved]
    assert ranks_of(run) == []
    record_fault(
        "time limit that no rank heeds, on one machine",
        how="SIGSTOP of both ranks; a limit 4 s after the first step",
        promised="the job ends with its time, status says why, nothing is left running",
        happened="failed: timed out; no process left; the checkpoint before is as it was",
        detected_seconds=detected,
    )
