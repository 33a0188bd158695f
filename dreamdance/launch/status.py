"""`dreamdance status`: the runs, their progress, and the state of their jobs."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dreamdance.errors import UserError
from dreamdance.launch.finished import is_finished
from dreamdance.launch.follow import explain_failure, progress_line
from dreamdance.launch.prepared_output import describe_clips
from dreamdance.launch.requeue import read_requeues
from dreamdance.launch.run_folder import TIME_FORMAT
from dreamdance.launch.submission import JobStatus, SubmittedJob, last_job, status_of
from dreamdance.recipe import PrepareRecipe, Recipe, load_stored_recipe
from dreamdance.runs.damaged_videos import DAMAGED_FILE, WITHOUT_CLIPS_FILE, by_reason, read_reasons
from dreamdance.runs.durations import duration
from dreamdance.runs.layout import (
    COMPLETE_FILE,
    PROVENANCE_FILE,
    RECIPE_FILE,
    checkpoint_folder,
    complete_steps,
    last_progress,
    step_folders,
    step_name,
)

# `status` lists at most this number of reasons why videos cannot be used.
MAX_REASONS = 8


def find_run(name: str, runs: Path) -> Path:
    """Finds a run by its name under `runs`, or by its path.

    Raises:
        UserError: the run does not exist; the text names the runs that do.
    """
    for folder in (runs / name, Path(name)):
        if (folder / RECIPE_FILE).is_file():
            return folder
    have = ", ".join(folder.name for folder in _run_folders(runs)) or "none"
    raise UserError(f"no run '{name}' (looked for {runs / name / RECIPE_FILE}); runs in {runs}: {have}")


def table(runs: Path) -> str:
    """One line for each run: name, task, state, progress, newest checkpoint, and how often its job restarted."""
    rows = [("run", "task", "state", "progress")]
    for folder in _run_folders(runs):
        task, state, progress = _row(folder, _state_of(folder))
        if steps := complete_steps(folder):
            progress += f"  checkpoint {steps[-1]}"
        if restarts := _num_restarts(_starts_of_job(folder)):
            progress += f"  restarts {restarts}"
        rows.append((folder.name, task, state, progress))
    if len(rows) == 1:
        return f"no runs in {runs}"
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cells = [[*(row[column].ljust(widths[column]) for column in range(3)), row[3]] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def details(run_folder: Path) -> str:
    """The state of one run in full."""
    run = _state_of(run_folder)
    task, state, progress = _row(run_folder, run)
    lines = [f"{run_folder} ({task}): {state}", f"  progress     {progress}"]
    lines += _places(run_folder)
    if steps := complete_steps(run_folder):
        written = (checkpoint_folder(run_folder, steps[-1]) / COMPLETE_FILE).stat().st_mtime
        lines.append(f"  checkpoint   {step_name(steps[-1])}, complete since {duration(time.time() - written)}")
    lines += _left_out(run, run_folder)
    if isinstance(run.recipe, PrepareRecipe) and not run.is_active:
        lines += [f"  {name:<12} {text}" for name, text in describe_clips(run.recipe).items()]
    for name in ("checkpoints", "exports"):
        folders = [folder.name for folder in step_folders(run_folder / name)]
        if folders:
            lines.append(f"  {name:<12} {', '.join(folders[-5:])}")
    if run.job is not None and run.job.cluster != "debug":
        lines += [f"  log          {run.job.log_file(run_folder, member=member)}" for member in run.job.members]
    if run.job is not None and run.status is not None and run.status.state == "failed":
        lines.append(explain_failure(run.job, run_folder, run.status))
    return "\n".join(lines)


def _left_out(run: "_RunState", run_folder: Path) -> list[str]:
    """The videos without clips, in a line for each reason, the most frequent first.

    Those that cannot be used are left out only if `videos.on_error` says so; else they stop the run.
    """
    if not isinstance(run.recipe, PrepareRecipe) or run.recipe.videos is None:
        return []
    label = "left out" if run.recipe.videos.on_error == "skip" else "unusable"
    tables = {DAMAGED_FILE: label, WITHOUT_CLIPS_FILE: "videos"}
    lines = []
    for name, label in tables.items():
        path = Path(run.recipe.output) / name
        if path.is_file() and not (run.is_active and path.stat().st_mtime < _began(run_folder)):
            lines += _reasons(path, label)
    return lines


def _reasons(path: Path, label: str) -> list[str]:
    groups = by_reason(read_reasons(path))
    lines = [f"  {label:<12} {len(names)} x {reason}" for reason, names in groups.items()]
    if len(lines) > MAX_REASONS:
        rest = sum(len(names) for names in list(groups.values())[MAX_REASONS:])
        lines = [*lines[:MAX_REASONS], f"  {label:<12} {rest} for other reasons"]
    return [*lines, f"               see {path}"] if lines else []


def _began(run_folder: Path) -> float:
    """When the run's last job was submitted, in seconds since 1970; tables that are older are of an earlier job."""
    starts = _starts(run_folder)
    return datetime.strptime(starts[-1]["time"], TIME_FORMAT).timestamp() if starts else 0.0


@dataclass(frozen=True)
class _RunState:
    """The state of a run: its recipe if this version can read it, its last job, and that job's status.

    The cluster is queried once, and not for a finished run.
    """

    recipe: Recipe | None
    is_finished: bool
    job: SubmittedJob | None
    status: JobStatus | None

    @property
    def is_active(self) -> bool:
        """Whether its job waits or runs."""
        return self.status is not None and self.status.is_active


def _state_of(run_folder: Path) -> _RunState:
    recipe, job = readable_recipe(run_folder), last_job(run_folder)
    finished = recipe is not None and is_finished(recipe, run_folder)
    if recipe is None or job is None or finished:
        return _RunState(recipe, finished, job, None)
    return _RunState(recipe, finished, job, status_of(job, recipe, run_folder))


def _places(run_folder: Path) -> list[str]:
    """Where the run's last job runs or ran, how often it restarted, and why."""
    begun = _starts_of_job(run_folder)
    if not begun:
        return []
    why = [requeue.reason for requeue in read_requeues(run_folder)]
    restarts = f"  restarts     {_num_restarts(begun)}"
    latest = {start["job_id"]: start["hosts"] for start in begun}  # an array has several jobs
    hosts = dict.fromkeys(host for hosts in latest.values() for host in hosts)
    return [f"  nodes        {', '.join(hosts)}", f"{restarts} ({why[-1]})" if why else restarts]


def _num_restarts(begun: Sequence[dict[str, Any]]) -> int:
    """How often jobs began again."""
    return len(begun) - len({start["job_id"] for start in begun})


def _starts_of_job(run_folder: Path) -> list[dict[str, Any]]:
    """The records of each time that the ranks of the run's last job began."""
    starts = _starts(run_folder)
    found: list[dict[str, Any]] = starts[-1].get("jobs", []) if starts else []
    return found


def _starts(run_folder: Path) -> list[dict[str, Any]]:
    """The records of each time that the run was submitted."""
    provenance = run_folder / PROVENANCE_FILE
    starts: list[dict[str, Any]] = []
    if provenance.is_file():
        starts = json.loads(provenance.read_text(encoding="utf-8"))["starts"]
    return starts


def _row(run_folder: Path, run: _RunState) -> tuple[str, str, str]:
    if run.recipe is None:
        return "?", "this version cannot read its recipe.yaml", ""
    line = last_progress(run_folder)
    progress = progress_line(line) if line else ""
    task, job, status = run.recipe.task, run.job, run.status
    if run.is_finished:
        return task, "finished", progress
    if job is None or status is None:
        return task, "not started", progress
    place = f"{job.cluster} job {job.job_id}" if job.cluster != "debug" else "in the launcher"
    # Only `is_finished` above means finished: a job that succeeded may have stopped before the last step.
    state = "stopped" if status.state == "finished" else f"{status.state} ({place}: {status.detail})"
    return task, state, progress


def _run_folders(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"*/{RECIPE_FILE}"))


def readable_recipe(run_folder: Path) -> Recipe | None:
    """The recipe of a run, or None if this version cannot read it."""
    try:
        return load_stored_recipe(run_folder / RECIPE_FILE)
    except UserError:
        return None
