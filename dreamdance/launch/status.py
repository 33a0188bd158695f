"""`slurm.py status`: which runs there are, how far they are, and how their jobs stand."""

import json
from pathlib import Path
from typing import Any

from dreamdance.errors import UserError
from dreamdance.launch.finished import is_finished
from dreamdance.launch.follow import explain_failure, progress_line
from dreamdance.launch.submission import last_job, status_of
from dreamdance.recipe import Recipe, load_recipe
from dreamdance.run_layout import RECIPE_FILE, progress_file, step_folders

_LAST_BYTES = 65_536


def find_run(name: str, runs: Path) -> Path:
    """A run by its name under `runs`, or by its path.

    Raises:
        UserError: there is no such run; names those that are.
    """
    for folder in (runs / name, Path(name)):
        if (folder / RECIPE_FILE).is_file():
            return folder
    have = ", ".join(folder.name for folder in _run_folders(runs)) or "none"
    raise UserError(f"no run '{name}' (looked for {runs / name / RECIPE_FILE}); runs in {runs}: {have}")


def table(runs: Path) -> str:
    """One line for each run: name, task, state, progress."""
    rows = [("run", "task", "state", "progress")]
    for folder in _run_folders(runs):
        rows.append((folder.name, *_row(folder)))
    if len(rows) == 1:
        return f"no runs in {runs}"
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cells = [[*(row[column].ljust(widths[column]) for column in range(3)), row[3]] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def details(run_folder: Path) -> str:
    """Everything that a person asks about one run."""
    task, state, progress = _row(run_folder)
    lines = [f"{run_folder} ({task}): {state}", f"  progress     {progress}"]
    for name in ("checkpoints", "exports"):
        steps = [folder.name for folder in step_folders(run_folder / name)]
        if steps:
            lines.append(f"  {name:<12} {', '.join(steps[-5:])}")
    job, recipe = last_job(run_folder), _recipe_of(run_folder)
    if job is not None and job.cluster != "debug":
        lines.append(f"  log          {job.log_file(run_folder)}")
    if job is not None and recipe is not None:
        status = status_of(job, recipe, run_folder)
        if status.state == "failed":
            lines.append(explain_failure(job, run_folder, status))
    return "\n".join(lines)


def _row(run_folder: Path) -> tuple[str, str, str]:
    recipe = _recipe_of(run_folder)
    if recipe is None:
        return "?", "its recipe.yaml is not of this version", ""
    line = last_progress(run_folder)
    progress = progress_line(line) if line else ""
    if is_finished(recipe, run_folder):
        return recipe.task, "finished", progress
    job = last_job(run_folder)
    if job is None:
        return recipe.task, "not started", progress
    status = status_of(job, recipe, run_folder)
    place = f"{job.cluster} job {job.job_id}" if job.cluster != "debug" else "in the launcher"
    # The marker above has the last word on finished: a job that ended well may have stopped before the last step.
    state = "stopped" if status.state == "finished" else f"{status.state} ({place}: {status.detail})"
    return recipe.task, state, progress


def last_progress(run_folder: Path) -> dict[str, Any] | None:
    """The newest whole line of the progress log."""
    path = progress_file(run_folder)
    if not path.is_file():
        return None
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = log.read().split(b"\n")
    for raw in reversed(lines):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict):
            return line
    return None


def _run_folders(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"*/{RECIPE_FILE}"))


def _recipe_of(run_folder: Path) -> Recipe | None:
    """The recipe of a run, or None where another version of the project wrote it."""
    try:
        return load_recipe(run_folder / RECIPE_FILE)
    except UserError:
        return None
