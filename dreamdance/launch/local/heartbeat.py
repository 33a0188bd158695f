"""Shows other machines whether a local job is alive: while it is, it touches a file.

Only the job's own machine can look up its process, and that machine may be gone: a container has a new host name after
each start. Without this file, a run that died there could not be distinguished from a running one.
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
    """The record of the last submission; its time is the job's first heartbeat."""
    return run_folder / "logs" / "job.json"


class Heartbeat:
    """Touches the run's heartbeat file from a thread; a context manager."""

    def __init__(self, run_folder: Path) -> None:
        self._file = heartbeat_file(run_folder)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()  # without joining the thread: storage that hangs must not keep a job from ending

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # on an I/O error, skip this beat
                self._file.touch()
            if self._over.wait(BEAT_SECONDS):
                return


def silent_seconds(run_folder: Path) -> float:
    """The time since the last heartbeat of the run's job, by the file system's clock; infinite without any.

    The clocks of two machines may differ, so both times come from the file system: it stamps the heartbeat, and a new
    file that is created for the comparison. If the clock was set back, a heartbeat may lie in the future: its
    distance counts in the same way, and a job that is alive soon writes a new one.

    Raises:
        OSError: no file can be created in the run folder.
    """
    now = file_system_time(run_folder / "logs")
    beats = [_changed(path) for path in (heartbeat_file(run_folder), job_file(run_folder))]
    return min(abs(now - beat) for beat in beats)


def _changed(path: Path) -> float:
    """When a file was written last, or minus infinity. Opening it makes a network file system ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")
