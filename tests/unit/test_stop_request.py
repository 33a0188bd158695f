"""A request to stop is only recorded when it arrives; a run that then hangs is ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE
from dreamdance.runtime.signals import STOP_SIGNALS
from dreamdance.runtime.stop_request import StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded_and_nothing_else_happens(number):
    with StopRequest(save_limit_seconds=60) as stop:
        assert not stop
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not stop and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.received is number
    assert stop, "the request is recorded"


def test_a_step_that_does_not_end_is_ended_with_every_threads_stack():
    program = """
import threading
from dreamdance.runtime.stop_request import StopRequest

def the_step_that_hangs():
    print("ready", flush=True)
    threading.Lock().acquire() and threading.Event().wait()

with StopRequest(save_limit_seconds=0.3):
    the_step_that_hangs()
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == TRY_AGAIN_EXIT_CODE
    assert "the_step_that_hangs" in errors
    assert "not saved within 0 s of SIGUSR2" in errors


def test_a_run_that_is_saved_in_time_is_not_ended():
    program = """
import os, signal, time
from dreamdance.runtime.stop_request import StopRequest

with StopRequest(save_limit_seconds=0.3) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop:
        time.sleep(0.001)
time.sleep(0.6)
"""
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False, timeout=20).returncode == 0
