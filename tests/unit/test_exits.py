"""A process can always be ended, even while one of its threads holds the lock of the log for ever.

A process without teardown ends as any other, but nothing that happens in the interpreter's teardown can abort it.
"""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, threading
from dreamdance.runtime import exits

logging.basicConfig(stream=sys.stderr)
exits.LAST_LINE_SECONDS = 1.0

def the_thread_that_hangs(handler):
    handler.acquire()
    held.set()
    threading.Event().wait()

held = threading.Event()
if sys.argv[1] == "held":
    threading.Thread(target=the_thread_that_hangs, args=(logging.root.handlers[0],), daemon=True).start()
    held.wait()
exits.exit_process(logging.getLogger("test"), "because of %s", "a test", exit_code=75, with_stacks=True)
"""


def ended(how: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-P", "-c", PROGRAM, how]
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)


def test_the_last_line_and_the_exit_code_are_those_given():
    process = ended("free")
    assert process.returncode == 75
    assert "CRITICAL:test:because of a test" in process.stderr
    assert "exit_process" in process.stderr, "the stacks"


def test_a_log_that_cannot_be_written_does_not_keep_the_process_alive():
    assert ended("held").returncode == -signal.SIGALRM


# What a thread of gloo does in the teardown by bad luck, an object does here every time: it aborts the process.
ABORTS_IN_TEARDOWN = """
import contextlib, os, sys, threading, time
from dreamdance.runtime.exits import process_without_teardown

class AbortsInTeardown:
    def __del__(self):
        os.abort()

def work():
    global keeper
    import atexit, logging
    keeper = AbortsInTeardown()
    logging.basicConfig(stream=sys.stderr)
    atexit.register(lambda: print("exit handler"))
    threading.Thread(target=lambda: (time.sleep(0.5), print("thread's last line"))).start()
    print("a line in the buffer")
    logging.warning("a line of the log")
    exec(sys.argv[2])

with process_without_teardown(20) if sys.argv[1] == "without" else contextlib.nullcontext():
    work()
"""


def ended_after(teardown: str, last: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-P", "-c", ABORTS_IN_TEARDOWN, teardown, last]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, env=buffered)


ENDS = {
    "pass": (0, ""),
    "raise SystemExit(7)": (7, ""),
    "raise SystemExit": (0, ""),
    "sys.exit('a reason')": (1, "a reason"),
    "raise ValueError('an error')": (1, "ValueError: an error"),
    "raise KeyboardInterrupt": (130, "KeyboardInterrupt"),
    "os.close(1)": (120, ""),
}


@pytest.mark.parametrize("last", ENDS)
def test_a_process_without_teardown_ends_as_any_other(last: str):
    process = ended_after("without", last)
    exit_code, text = ENDS[last]
    assert process.returncode == exit_code
    assert "WARNING:root:a line of the log" in process.stderr
    assert text in process.stderr
    if exit_code != 120:
        assert process.stdout.splitlines() == ["a line in the buffer", "thread's last line", "exit handler"]


def test_with_a_teardown_the_same_process_aborts():
    assert ended_after("with", "pass").returncode == -signal.SIGABRT


def test_an_end_that_takes_too_long_is_ended_by_the_kernel():
    stuck = "threading.Thread(target=time.sleep, args=(60,)).start(); import signal"
    program = ABORTS_IN_TEARDOWN.replace("process_without_teardown(20)", "process_without_teardown(1)")
    words = [sys.executable, "-P", "-c", program, "without", stuck]
    assert subprocess.run(words, capture_output=True, timeout=30, check=False).returncode == -signal.SIGALRM
