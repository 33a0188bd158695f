"""Starts and supervises the processes of a local job, as `srun --kill-on-bad-exit` does: one failure ends them all.

The controller is a process with its own session, so that a job outlives the launcher and its terminal.
Usage: python -P -m dreamdance.launch.local.controller RUN_FOLDER (submitit's environment variables hold the rest).
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.local.local import Controller

from dreamdance.launch.job import free_port
from dreamdance.launch.local.heartbeat import Heartbeat
from dreamdance.launch.requeue import decide_patiently
from dreamdance.launch.run_ownership import REPLACED_EXIT_CODE
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import failures_folder

GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05
CANCELLED, TIMED_OUT, REPLACED = "cancelled", "timed out", "replaced by another start"


def status_file(run_folder: Path, job_id: str) -> Path:
    """The file in which the controller records how the job ended."""
    return run_folder / "logs" / f"{job_id}_status.json"


class LocalController(Controller):
    """submitit's controller, which in addition ends a job when one of its processes fails."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__(run_folder / "logs")
        self.run_folder = run_folder
        self.first_failed_rank: int | None = None
        self.ended_by: str | None = None
        self.warned = False
        signal.signal(signal.SIGTERM, self._cancel)

    def _cancel(self, *_: Any) -> None:
        self.ended_by = CANCELLED
        raise SystemExit(1)

    def start_tasks(self) -> None:
        os.environ["MASTER_PORT"] = str(free_port())
        shutil.rmtree(failures_folder(self.run_folder), ignore_errors=True)  # each start records its own
        super().start_tasks()

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Waits until all processes ended, or one failed and the others had time to log why, or the time is up."""
        start = time.monotonic()
        failed_at: float | None = None
        self.warned = False
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            failed = [rank for rank, code in enumerate(codes) if code]
            if REPLACED_EXIT_CODE in codes:  # another start owns the run: the other processes must not write any more
                self.ended_by = REPLACED
                return codes
            if failed and failed_at is None:
                failed_at = now
                self.first_failed_rank = failed[0]
            if all(code is not None for code in codes) or (failed_at is not None and now > failed_at + GRACE_SECONDS):
                return codes
            if not self.warned and now > start + self.timeout_s - self.signal_delay_s:
                self.warned = True
                super()._forward_signal(signal.SIGUSR2)
            if now > start + self.timeout_s:
                self.ended_by = TIMED_OUT
                return codes
            time.sleep(POLL_SECONDS)

    def run(self, max_retry: int = 0) -> None:
        """Starts the processes, again after each time limit at which they saved; in the end none of them is running."""
        codes: Sequence[int | None] = []
        try:
            while True:
                self.first_failed_rank = None
                self.start_tasks()
                try:
                    codes = self.wait()
                finally:
                    tasks = list(self.tasks)
                    self.kill_tasks()
                    _kill_group_members()
                    codes = [task.wait() for task in tasks]
                if self.ended_by or not self.warned or not decide_patiently(self.run_folder, worst_code(codes)).again:
                    break
        finally:
            self._write_status(codes)

    def _write_status(self, codes: Sequence[int | None]) -> None:
        if self.ended_by == REPLACED:  # another start owns the folder; its process number may be the same
            return
        good = bool(codes) and all(code == 0 for code in codes) and self.ended_by is None
        status = {
            "exit_code": 0 if good else 1,
            "first_failed_rank": self.first_failed_rank,
            "rank_exit_codes": list(codes),
            "ended_by": self.ended_by,
            "time": time.time(),
        }
        write_atomically(status_file(self.run_folder, self.pid), json.dumps(status))


def worst_code(codes: Sequence[int | None]) -> int:
    """One exit code for all ranks, as from `srun`: 0 only if all ranks succeeded."""
    return max((128 - code if code is not None and code < 0 else code or 0 for code in codes), default=0)


def _kill_group_members() -> None:
    """Kills the processes that ranks started (data workers, encoders): all are in this session's process group."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, group = int(entry.parent.name), int(entry.read_text().rpartition(")")[2].split()[2])
            if group == os.getpgrp() and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            continue  # the process ended meanwhile


def main() -> int:
    run_folder = Path(sys.argv[1])
    with Heartbeat(run_folder):
        LocalController(run_folder).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
