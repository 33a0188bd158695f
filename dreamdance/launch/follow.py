"""Shows a running job: a live line on a terminal, plain lines elsewhere, and at the end the failing rank's error."""

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dreamdance.launch.job import failure_file
from dreamdance.launch.requeue import read_failures
from dreamdance.launch.submission import JobStatus, SubmittedJob, status_of
from dreamdance.recipe import Recipe
from dreamdance.runs.durations import duration
from dreamdance.runs.layout import progress_file

POLL_SECONDS = {"local": 0.2, "debug": 0.2, "slurm": 5.0}
DISTANT_POLL_SECONDS = 5.0
PLAIN_LINE_EVERY_SECONDS = 5.0
TAIL_LINES = 25
# Of the list that belongs to a warning, such as that of damaged videos, fewer lines than this are shown.
LISTED_LINES = 10
# A rank's warning or error, in the format that `job` sets, or a line from Slurm.
_TROUBLE = re.compile(r"[-\d]+ [:,\d]+ (\[rank \d+\] )?(WARNING|ERROR|CRITICAL) |(srun|slurmstepd): ")
_NOT_SHOWN = ("time", "done", "total", "unit", "message", "eta_seconds", "loss", "samples_per_second")


def follow(
    job: SubmittedJob,
    recipe: Recipe,
    run_folder: Path,
    offset: int,
    out: TextIO = sys.stdout,
    *,
    is_new: bool = True,
) -> JobStatus:
    """Shows the job's progress, and every rank's warnings and errors, until it ends.

    Args:
        job: the result of `submit`.
        recipe: the run's recipe.
        run_folder: the run's folder.
        offset: where in the progress log this job's lines begin, in bytes.
        out: a terminal gets one line that is redrawn, anything else gets plain lines.
        is_new: whether the logs are shown from their beginning; else only new lines are shown.
    """
    screen = _Screen(out)
    logs = _Logs(job, run_folder, from_now=not is_new)
    started = time.monotonic()
    while True:
        # The status first: everything that the job wrote before it ended is then read in this round.
        status = status_of(job, recipe, run_folder)
        for trouble in logs.new_trouble():
            screen.write_line(trouble)
        lines, offset = _new_lines(progress_file(run_folder), offset)
        for line in lines:
            screen.message(line.get("message"))
        if lines:
            screen.progress(progress_line(lines[-1]))
        if status.state in ("finished", "failed", "cancelled"):
            screen.close()
            return status
        screen.waiting(f"{recipe.name}: {status.detail}, {duration(time.monotonic() - started)}")
        time.sleep(DISTANT_POLL_SECONDS if job.is_elsewhere else POLL_SECONDS[job.cluster])


def progress_line(line: dict[str, Any]) -> str:
    """`step 1200/50000  loss 0.0834  3.2 samples/s  eta 1d 09h`."""
    parts = [f"{line['unit'].removesuffix('s')} {line['done']}/{line['total']}"]
    if (loss := line.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (pace := line.get("samples_per_second")) is not None:
        parts.append(f"{pace:.1f} samples/s")
    for name, value in line.items():
        if name not in _NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    if (eta := line.get("eta_seconds")) is not None and line["done"] < line["total"]:
        parts.append(f"eta {duration(eta)}")
    return "  ".join(parts)


def explain_failure(job: SubmittedJob, run_folder: Path, status: JobStatus) -> str:
    """Why a job failed: the failing rank's error, or the end of its log, and the log's path."""
    failures = read_failures(run_folder)
    has_record = any(failure["rank"] == status.failed_rank for failure in failures)
    # Where ranks ended at nearly the same moment, the times of their errors show which failed first.
    first = failures[0] if has_record or (failures and status.failed_rank is None) else None
    rank = first["rank"] if first else status.failed_rank or 0
    log = job.log_file(run_folder, rank, member=first["job_id"] if first and job.array > 1 else None)
    text = first["text"].rstrip() if first else _tail(log)
    if first and not first["user_error"]:
        text = "\n".join(text.splitlines()[-TAIL_LINES:])
    head = f"{run_folder.name} failed: {status.detail}"
    if not run_folder.is_dir():
        return f"{head}\n{run_folder} is gone: it was removed while the job ran, or its storage is away"
    killed = _ranks_without_error(job, run_folder) if status.failed_rank is None and failures else ""
    where = f"log of rank {rank}: {log}" if job.cluster != "debug" else ""  # a debug job logs to this terminal
    return "\n".join(line for line in (head, text, where, killed) if line)


def _ranks_without_error(job: SubmittedJob, run_folder: Path) -> str:
    """Ranks that ended without recording an error: they were probably killed, which caused the others' errors."""
    if job.array > 1:
        return ""  # members that were killed go back into the queue, and others may not have begun
    recorded = [failure_file(run_folder, job.job_id, rank).is_file() for rank in range(job.num_tasks)]
    killed = [str(rank) for rank, has_record in enumerate(recorded) if not has_record]
    return f"ended without an error of their own (killed?): ranks {', '.join(killed)}" if killed else ""


def _tail(log: Path) -> str:
    if not log.is_file():
        return "it wrote no log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])


def _new_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines after `offset`, and the offset behind them; an incomplete line is read the next time."""
    if not path.is_file():
        return [], offset
    lines = []
    with path.open("rb") as log:
        log.seek(offset)
        for raw in log:
            if not raw.endswith(b"\n"):
                break
            offset += len(raw)
            # A killed run may leave half a line, followed by the next run's first line.
            with contextlib.suppress(ValueError):
                lines.append(json.loads(raw))
    return lines, offset


class _Logs:
    """The logs of all ranks; their warnings and errors are shown."""

    def __init__(self, job: SubmittedJob, run_folder: Path, *, from_now: bool) -> None:
        paths = [
            job.log_file(run_folder, rank, member=member) for member in job.members for rank in range(job.num_tasks)
        ]
        self.offsets = {path: path.stat().st_size if from_now and path.is_file() else 0 for path in paths}

    def new_trouble(self) -> list[str]:
        found = []
        for path, offset in self.offsets.items():
            if not path.is_file():
                continue
            with path.open("rb") as log:
                log.seek(offset)
                raw = log.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            self.offsets[path] = offset + len(whole)
            found += _trouble_of(whole.decode(errors="replace").splitlines())
        return found


def _trouble_of(lines: Sequence[str]) -> list[str]:
    """The warnings and errors, and the beginning of the indented list that may follow a warning.

    The list of an error is not shown here: if it ends the job, it is shown whole at the end.
    """
    found, room = [], 0
    for line in lines:
        if trouble := _TROUBLE.match(line):
            found.append(line)
            room = LISTED_LINES if trouble[2] == "WARNING" else 0
        elif room and line.startswith("  "):
            room -= 1
            found.append(line if room else "  ... (see the log)")
        else:
            room = 0
    return found


class _Screen:
    """Draws one live line on a terminal; writes plain lines, and fewer of them, anywhere else."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.live = out.isatty()
        self.drawn = ""
        self.last_plain = 0.0
        self.unwritten: str | None = None
        self.has_progress = False
        self.last_message: str | None = None

    def message(self, text: str | None) -> None:
        """Writes a line that stays. Tasks repeat their message in every report; it is shown once."""
        if text is None or text == self.last_message:
            return
        self.last_message = text
        self.write_line(text)

    def write_line(self, text: str) -> None:
        """Writes a line that stays."""
        self._clear()
        self.out.write(f"{text}\n")
        self._draw(self.drawn)
        self.out.flush()

    def progress(self, text: str) -> None:
        self.has_progress = True
        if self.live:
            self._clear()
            self._draw(text)
        elif time.monotonic() - self.last_plain >= PLAIN_LINE_EVERY_SECONDS:
            self.out.write(f"{text}\n")
            self.last_plain, self.unwritten = time.monotonic(), None
        else:
            self.unwritten = text
        self.out.flush()

    def waiting(self, text: str) -> None:
        """Shows the job's state until the first progress arrives."""
        if self.live and not self.has_progress:
            self._clear()
            self._draw(text)
            self.out.flush()

    def close(self) -> None:
        if self.live and self.drawn:
            self.out.write("\n")
        elif self.unwritten is not None:
            self.out.write(f"{self.unwritten}\n")
        self.out.flush()

    def _clear(self) -> None:
        if self.live and self.drawn:
            self.out.write("\r\x1b[2K")

    def _draw(self, text: str) -> None:
        if self.live and text:
            self.drawn = text
            self.out.write(text[: shutil.get_terminal_size().columns - 1])
