"""Of two starts of one run, the later has it."""

import subprocess
import sys

from dreamdance.launch.fence import REPLACED_EXIT_CODE, Fence

PROGRAM = """
import sys, time
from pathlib import Path
from dreamdance.launch import fence

fence.LOOK_EVERY_SECONDS = 0.05
with fence.Fence(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_start_that_is_replaced_ends_and_says_where_the_run_goes_on(tmp_path):
    (tmp_path / "logs").mkdir()
    words = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with Fence(tmp_path):
            _, errors = first.communicate(timeout=20)
    assert first.returncode == REPLACED_EXIT_CODE
    assert "goes on elsewhere" in errors


def test_a_start_that_is_alone_goes_on_though_its_file_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("dreamdance.launch.fence.LOOK_EVERY_SECONDS", 0.01)
    with Fence(tmp_path) as fence:
        (tmp_path / "logs" / "owner.txt").unlink()
        fence._thread.join(0.1)
        assert fence._thread.is_alive()
