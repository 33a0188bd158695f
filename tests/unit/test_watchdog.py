"""A process that hangs ends itself and shows where; a slow process, or one that was suspended, does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE
from dreamdance.runtime.watchdog import TOLERANCE, Watchdog

SCRIPT = """
import sys, time
from dreamdance.runtime.watchdog import Watchdog

def wait_for_seconds(seconds):
    time.sleep(seconds)

with Watchdog(least_seconds=float(sys.argv[1]), unmeasured_seconds=float(sys.argv[2])) as watchdog:
    for step, seconds in enumerate(map(float, sys.argv[3:])):
        watchdog.enter("training a step", f"step {step}", is_measured=True)
        print("begun", flush=True)
        wait_for_seconds(seconds)
print("through", flush=True)
"""


def started(*seconds: float) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SCRIPT, *map(str, seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_step_that_hangs_ends_the_process_with_the_stack_of_where_it_hangs():
    started_at = time.monotonic()
    process = started(1, 60, 0.1, 0.1, 600)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == TRY_AGAIN_EXIT_CODE
    assert "through" not in output
    assert "training a step (step 2) has taken over 1 s" in errors
    assert "see cluster.step_timeout_seconds" in errors
    assert "in wait_for_seconds" in errors
    assert time.monotonic() - started_at < 30


def test_a_slow_first_step_and_slow_steps_like_those_before_do_not_end_it():
    output, errors = started(0.2, 60, 2.0, 2.0, 1.0).communicate(timeout=60)
    assert output.count("begun") == 3
    assert "through" in output, errors


@pytest.mark.slow
def test_a_process_that_was_suspended_as_a_whole_continues():
    process = started(4, 4, 1.5)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert "through" in output, errors


def test_zero_switches_it_off():
    output, _ = started(0, 0, 1.5).communicate(timeout=60)
    assert "through" in output


def test_the_limit_follows_the_usual_time_of_an_activity(monkeypatch):
    clock = iter([0.0, 100.0, 140.0, 180.0, 190.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watchdog = Watchdog(least_seconds=30, unmeasured_seconds=1000)
    assert watchdog.limit_seconds("step") == 1000
    for activity in ("step", "step", "step", "save", "step"):
        watchdog.enter(activity, "", is_measured=True)
    assert watchdog.limit_seconds("step") == TOLERANCE * 40, "the median of 100, 40 and 40"
    assert watchdog.limit_seconds("save") == TOLERANCE * 10


def test_an_unmeasured_activity_never_has_a_shorter_limit_than_a_measured_one():
    assert Watchdog(least_seconds=50, unmeasured_seconds=10).limit_seconds("save") == pytest.approx(50)
