"""Tells a local job on another machine that lives from one that is gone: as long as it lives, it touches a file.

A process can be asked for only on its own machine, and that machine may not exist any more.
"""

import contextlib
import os
import threading
from pathlib import Path

from dreamdance.runs.locks import BEAT_SECONDS, SILENT_SECONDS, file_system_time

__all__ = ["SILENT_SECONDS", "Heartbeat", "heartbeat_file", "job_file", "silent_seconds"]


def heartbeat_file(run_folder: Path) -> Path:
    return run_folder / "logs" / "heartbeat"


def job_file(run_folder: Path) -> Path:
    """What is remembered of the last submission; writing it is a job's first sign of life."""
    return run_folder / "logs" / "job.json"


class Heartbeat:
    """Says from a thread that this process is there; a context manager."""

    def __init__(self, run_folder: Path) -> None:
        self._file = heartbeat_file(run_folder)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()  # not waited for: storage that hangs must not keep a job from ending

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # the storage fails for a moment: the next beat may succeed
                self._file.touch()
            if self._over.wait(BEAT_SECONDS):
                return


def silent_seconds(run_folder: Path) -> float:
    """How long nothing was heard of the run's job, by the file system's clock alone; infinite if nothing ever was.

    Two machines' clocks may differ by more than any patience. The file system stamps heartbeats with its own, and so it
    does a file that is made for the comparison. A stamp from the future is as far from now as one from the past: the
    clock has been set back, and a job that lives beats again by the new one.

    Raises:
        OSError: no file can be made there.
    """
    now = file_system_time(run_folder / "logs")
    signs = [_changed(path) for path in (heartbeat_file(run_folder), job_file(run_folder))]
    return min(abs(now - sign) for sign in signs)


def _changed(path: Path) -> float:
    """When a file was written last, or minus infinity. Opening it makes a network file system ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")
