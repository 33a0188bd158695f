"""The processes that work in one folder: each touches a file of its own while it lives, and sees which others are lost.

A process that has died is recognised at once on its own machine. On another machine, or when it is stopped, it counts
as lost after a time without a touch. This module does not know what the processes do.
"""

import contextlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path

from dreamdance.runs.files import write_atomically
from dreamdance.runs.locks import WatchedFile, file_system_time
from dreamdance.runtime.ranks import Ranks

BEAT_SECONDS = 1.0
MEMBER_PREFIX = "member."  # of the files' names


class Members:
    """This process among the processes of a folder.

    Attributes:
        name: name of this process's file.
        silent: for each file of this job that was not touched for too long, a sentence that names its process.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, silence_seconds: float) -> None:
        """Does not join yet.

        Args:
            folder: the folder of the processes' files.
            ranks: this process.
            silence_seconds: after how long without a touch a process counts as lost.
        """
        self.name = f"{MEMBER_PREFIX}{uuid.uuid4().hex}"
        self.silent: dict[str, str] = {}
        self._folder, self._ranks, self._silence_seconds = folder, ranks, silence_seconds
        self._machine = _machine()
        self._watched: dict[str, WatchedFile] = {}
        self._over = threading.Event()

    def join(self) -> None:
        """Creates this process's file, and touches it from a thread until `leave`."""
        ranks, process = self._ranks, os.getpid()
        member = {"rank": ranks.rank, "machine": self._machine, "process": process, "began": process_start(process)}
        write_atomically(self._folder / self.name, json.dumps({**member, "job": ranks.job, "start": ranks.start}))
        threading.Thread(target=self._beat, name="work queue", daemon=True).start()

    def leave(self) -> None:
        """Removes this process's file."""
        self._over.set()
        with contextlib.suppress(OSError):
            (self._folder / self.name).unlink()

    def is_at_work(self, name: str) -> bool:
        """Whether a process may be at work, decided at one look; removes the file of an earlier start of this job.

        The job's launcher has ended that start, but on another machine nothing else shows it at once.
        """
        path = self._folder / name
        try:
            member = json.loads(path.read_text(encoding="utf-8"))
            age_seconds = file_system_time(self._folder) - path.stat().st_mtime
        except FileNotFoundError:
            return False
        if member["job"] == self._ranks.job and member["start"] != self._ranks.start:
            path.unlink(missing_ok=True)
            return False
        return age_seconds <= self._silence_seconds and self.why_lost(name) is None

    def why_lost(self, name: str) -> str | None:
        """Why a process will not finish its work, in words; None while it may finish it.

        Args:
            name: the process's file, or an empty file that the process created and was lost before it wrote there.
        """
        file = self._watched.setdefault(name, WatchedFile(self._folder / name, silent_seconds=self._silence_seconds))
        is_silent = file.is_lost()
        try:
            text = file.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return "a process has left"
        member = json.loads(text or '{"rank": "?", "machine": "?"}')
        if member["machine"] == self._machine and member["began"] != process_start(member["process"]):
            return f"rank {member['rank']} has died"
        if not is_silent:
            return None
        why = f"rank {member['rank']} has given no sign for {self._silence_seconds:.0f} s"
        if member.get("job", self._ranks.job) == self._ranks.job:
            self.silent[name] = why
        return why

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # on an I/O error, skip this beat
                os.utime(self._folder / self.name)


def _machine() -> str:
    """Identifies this machine, its start and this container: a process number is unique only within these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # equals no other process's: then only touches show that a process lives


def process_start(process: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None if it is gone.

    The time distinguishes the process from a later one of the same number.
    """
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] in "ZX" else state[19]
