"""A process can always be ended, even while one of its threads holds the lock of the log for ever."""

import signal
import subprocess
import sys

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
