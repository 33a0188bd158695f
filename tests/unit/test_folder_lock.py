"""A folder for results belongs to one run at a time, and is free when that run has ended."""

import errno
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.fault_log import record_fault

from dreamdance.runs.folder_lock import FOLDER_LOCK_FILE, OutputError, lock_folder

HOLD = """
import sys, time
from pathlib import Path
from dreamdance.runs.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), key="output", sharing=sys.argv[2] if sys.argv[2:] else None):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_made_and_nothing_stays_in_it(tmp_path):
    with lock_folder(tmp_path / "a" / "b", key="output"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_second_run_is_refused_until_the_first_has_ended_or_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.folder_lock.WAIT_SECONDS", 0.2)
    folder = tmp_path / "results"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(
            OutputError, match=r"another run is writing into .*results.*give another `output`"
        ) as raised:
            lock_folder(folder, key="output").__enter__()
        detected = time.monotonic() - start
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
    assert (folder / FOLDER_LOCK_FILE).exists()
    with lock_folder(folder, key="output"):
        assert (folder / FOLDER_LOCK_FILE).exists()
    assert not (folder / FOLDER_LOCK_FILE).exists()
    record_fault(
        "two runs write into one output folder",
        how="a second run starts beside the first; then the first is killed",
        promised="the second is refused by name; after the kill the folder is free",
        happened=str(raised.value),
        detected_seconds=detected,
    )


def test_jobs_of_one_run_hold_a_folder_together_until_the_last_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.folder_lock.WAIT_SECONDS", 0.2)
    lock = tmp_path / FOLDER_LOCK_FILE
    words = [sys.executable, "-c", HOLD, str(tmp_path), "array 42"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "held\n"
        with lock_folder(tmp_path, key="output", sharing="array 42"):
            killed.kill()
            assert killed.wait() == -signal.SIGKILL
            with lock_folder(tmp_path, key="output", sharing="array 42"):
                pass
            assert lock.read_text() == "array 42", "another job still holds it"
            for others in (None, "array 43"):
                with pytest.raises(OutputError, match="another run is writing into"):
                    lock_folder(tmp_path, key="output", sharing=others).__enter__()
    assert not lock.exists()
    with lock_folder(tmp_path, key="output"), pytest.raises(OutputError, match="another run is writing into"):
        lock_folder(tmp_path, key="output", sharing="array 42").__enter__()
    assert not lock.exists()


def test_jobs_do_not_share_a_folder_without_locks(tmp_path, monkeypatch):
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OutputError, match=r"has no locks .* set cluster.array=1, or give another `output`"):
        lock_folder(tmp_path, key="output", sharing="array 42").__enter__()


def test_a_start_waits_for_the_lock_of_one_that_is_just_ending(tmp_path):
    """A rank of a replaced start needs some seconds to detect that and to end."""
    folder = tmp_path / "results"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        ending = threading.Timer(0.3, holder.kill)
        ending.start()
        with lock_folder(folder, key="output"):
            assert holder.wait() == -signal.SIGKILL


@pytest.mark.parametrize("place", ["/proc/results", "file/results"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path, place):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"results cannot be written: .*give another `output`"):
        lock_folder(tmp_path / place, key="output").__enter__()
