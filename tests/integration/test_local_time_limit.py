"""Jobs on this machine that reach their time limit or are asked to stop: real controllers, real ranks, tiny recipes."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import resumed_step, run_settings
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

# The duration of a start depends on the machine and is not tested: the clock starts with the first step.
CONTROLLER = """#!{python} -P
import os, sys, time
from pathlib import Path
from dreamdance.launch.local import controller as local_controller
from dreamdance.runs.layout import progress_file

sys.argv[1:] = sys.argv[-1:]
log = progress_file(Path(sys.argv[1]))
start_tasks = local_controller.LocalController.start_tasks
os.environ["SUBMITIT_LOCAL_TIMEOUT_S"] = str({limit_seconds} or os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])

def start_for_a_step(self):
    before = steps_shown()
    start_tasks(self)
    while steps_shown() == before and all(task.poll() is None for task in self.tasks):
        time.sleep(0.02)

def steps_shown():
    return log.read_text().count('"loss"') if log.is_file() else 0

local_controller.LocalController.start_tasks = start_for_a_step
sys.exit(local_controller.main())
"""


@pytest.fixture
def start(tmp_path, shards, monkeypatch):
    """Starts an endless training like `--cluster local`; at the end of the test all its processes are killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[SubmittedJob] = []
    run = tmp_path / "runs" / "tiny"

    def start(*, limit_seconds: int | None = None, **cluster: int) -> Path:
        changes = ENDLESS | {f"cluster.{key}": value for key, value in cluster.items()}
        recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
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
    """Reads the files of the controller: `status` also reads and checks the recipe, which is too slow for polling."""
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
    """Waits for the end of the job, and returns the seconds that it took."""
    began = time.monotonic()
    while is_running(run):
        assert time.monotonic() < began + 60, status.details(run)
        time.sleep(0.2)
    return time.monotonic() - began


def test_a_job_at_its_time_limit_saves_and_is_started_again_as_often_as_the_recipe_allows(start):
    run = start(time_minutes=1, stop_seconds=58, max_requeues=1)
    wait_until(lambda: len(complete_steps(run)) == 1, run, "first checkpoint")
    (first,) = complete_steps(run)
    wait_until(lambda: resumed_step(run) == first, run, "a resumed start")
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
        promised="saved in time; started again by the controller as often as the recipe allows, no step lost",
        happened=f"saved at step {first}, resumed, saved again, and stopped because of max_requeues=1",
        steps_lost=0,
    )


def test_a_job_that_receives_sigterm_saves_and_stops_and_one_without_a_warning_times_out(start):
    run = start()
    wait_until(lambda: steps_since_the_last_message(run) > 2, run, "steps")
    os.kill(ranks_of(run)[1], signal.SIGTERM)
    detected = wait_for_the_end(run)
    assert state(run) == "stopped"
    (saved,) = complete_steps(run)

    start(limit_seconds=4, stop_seconds=2)
    wait_until(lambda: resumed_step(run) == saved and steps_since_the_last_message(run) > 0, run, "further steps")
    record_fault(
        "pre-empted by SIGTERM alone, on one machine",
        how="SIGTERM to rank 1 of 2, without a warning before",
        promised="both save at the next step boundary and end without an error; the next start resumes, no step lost",
        happened=f"saved at step {saved}, status showed stopped; started again, it resumed from there",
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
        "time limit to which no rank reacts, on one machine",
        how="SIGSTOP of both ranks; a limit 4 s after the first step",
        promised="the job ends at its time limit, status shows why, nothing is left running",
        happened="failed: timed out; no process left; the previous checkpoint is unchanged",
        detected_seconds=detected,
    )
