"""Names of files in a run folder (contract C7) and in a result, and the log that `--follow` reads. No torch here."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from dreamdance.errors import MissingInputError
from dreamdance.recipe.yaml_text import read_yaml
from dreamdance.runs.array_member import array_member
from dreamdance.runtime.ranks import Ranks

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"
COMPLETE_FILE = "COMPLETE"
FINISHED_FILE = "FINISHED"
FILES_FILE = "files.json"
FAILURES_FOLDER = "failures"
DONE_FOLDER = "done"
QUEUE_FOLDER = "queue"
WARNED_FILE = "warned_of_the_time_limit"
EXPORT_INDEX_FILE = "model_index.json"
# In the output of `prepare`: size, times and hash of each video that it read.
INPUTS_FILE = "inputs.json"
# In the output of `prepare`: the page that plays clips.
PAGE_PATH = "contact_sheets/index.html"
# The fields of the manifest of `prepare` that name files: the inputs of an example.
EXAMPLE_FIELDS = ("image", "pose", "keypoints", "reference_keypoints", "reference_pose")
# In the output of `prepare` with `dancers.pairs`: the manifest of the pairs, and the entry of a clip's metadata that
# names the clip with the poses that drive it.
PAIRS_FILE = "pairs.jsonl"
DRIVEN_BY = "driven_by"
# In the result of a clip, which `animate` writes and `evaluate` reads.
RESULT_FILE = "result.json"
ARRAYS_FILE = "arrays.npz"
# The poses that drove the result, as its networks saw them.
POSE_VIDEO = "pose.mp4"
# In the output of `animate` until all its entries have results: their ids. No entry's id begins with a dot.
ENTRIES_FILE = ".entries.json"
_LAST_BYTES = 65_536


def step_name(step: int) -> str:
    """`step_00000500`: the names sort in the order of the steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step of a `step_...` folder, or None for any other name."""
    prefix, _, digits = folder.name.partition("_")
    return int(digits) if prefix == "step" and digits.isascii() and digits.isdecimal() else None


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def export_folder(run: Path, step: int) -> Path:
    return run / "exports" / step_name(step)


def step_folders(parent: Path) -> list[Path]:
    """All `step_...` folders of `parent`, oldest first."""
    if not parent.is_dir():
        return []
    found = [(step_of(entry), entry) for entry in parent.iterdir() if entry.is_dir()]
    return [entry for step, entry in sorted((step, entry) for step, entry in found if step is not None)]


def complete_steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, in order. Only resuming checks whether their files are sound."""
    folders = step_folders(run / "checkpoints")
    return [step for folder in folders if (folder / COMPLETE_FILE).is_file() and (step := step_of(folder)) is not None]


def newest_export(run: Path) -> Path:
    """The newest export of a run.

    Raises:
        MissingInputError: the run does not exist, or has no export yet.
    """
    exports = step_folders(run / "exports")
    if not exports:
        state = "has no export yet" if run.is_dir() else "does not exist"
        raise MissingInputError(f"run '{run.name}' {state} (looked in {run / 'exports'}); train it first")
    return exports[-1]


def final_export(run: Path) -> Path | None:
    """The export of the last step in a run's own recipe; None while the run is unfinished.

    A finished run that was started again with a raised `max_steps` still has its `FINISHED` file and its older export.
    """
    if not (run / FINISHED_FILE).is_file() or not (run / RECIPE_FILE).is_file():
        return None
    values = read_yaml((run / RECIPE_FILE).read_text(encoding="utf-8")).value
    max_steps = values.get("max_steps") if isinstance(values, dict) else None
    export = export_folder(run, max_steps) if isinstance(max_steps, int) else None
    return export if export is not None and export.is_dir() else None


def is_export(folder: Path) -> bool:
    """Whether a folder is itself an export, not a run that contains exports."""
    return (folder / EXPORT_INDEX_FILE).is_file()


class ProgressLog:
    """Appends one JSON line per report to `logs/progress.jsonl`, on the main process only."""

    def __init__(self, run: Path, ranks: Ranks | None = None) -> None:
        """Creates the folder `logs`.

        Args:
            run: the run folder.
            ranks: this process; by default the only one.
        """
        self.is_off = ranks is not None and not ranks.is_main
        self.path = progress_file(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._first_done: int | None = None

    def write(self, *, done: int, total: int, unit: str, message: str | None = None, **numbers: Any) -> None:
        """Reports that `done` of `total` units (steps, clips, images) are finished, with any numbers worth showing."""
        if self.is_off:
            return
        if self._first_done is None:
            self._first_done, self._start = done, time.monotonic()
        elapsed = time.monotonic() - self._start
        pace = elapsed / (done - self._first_done) if done > self._first_done else None
        line = {
            "time": time.time(),
            "done": done,
            "total": total,
            "unit": unit,
            "eta_seconds": None if pace is None else pace * (total - done),
            "message": message,
            **numbers,
        }
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")


def failures_folder(run: Path) -> Path:
    """Where the ranks of the present start record why they ended. Each start removes the folder first.

    Each member of an array has a folder of its own below the run's.
    """
    member = array_member()
    return run / "logs" / FAILURES_FOLDER / ("" if member is None else member.number)


def note_signal(run: Path, number: signal.Signals) -> None:
    """Records Slurm's warning (SIGUSR2) that the time limit is near, however the present start then ends.

    SIGTERM is not recorded: `srun` also sends it to the remaining ranks when one has failed, and that must count as a
    failure.
    """
    if number == signal.SIGUSR2 and run.is_dir():
        failures_folder(run).mkdir(parents=True, exist_ok=True)
        (failures_folder(run) / WARNED_FILE).touch()


def was_warned(run: Path) -> bool:
    """Whether Slurm warned the present start that its time limit is near."""
    return (failures_folder(run) / WARNED_FILE).is_file()


def progress_file(run: Path) -> Path:
    return run / "logs" / "progress.jsonl"


def note_done(run: Path, ranks: Ranks, name: str) -> None:
    """Notes that a piece of shared work is done and on the disk; each rank of each job writes its own file."""
    path = run / "logs" / DONE_FOLDER / f"{'_'.join(['rank', str(ranks.rank), *ranks.job.split()])}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as notes:
        notes.write(f"{name}\n")


def read_done(run: Path) -> list[str]:
    """The names of all pieces of work that are done, by all ranks, over all starts."""
    notes = sorted((run / "logs" / DONE_FOLDER).glob("rank_*.txt"))
    return [name for path in notes for name in path.read_text(encoding="utf-8", errors="replace").splitlines()]


def last_progress(run: Path) -> dict[str, Any] | None:
    """The newest complete line of the progress log, with the newest loss: a line about a save has no loss."""
    path = progress_file(run)
    if not path.is_file():
        return None
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = log.read().split(b"\n")
    newest: dict[str, Any] | None = None
    for raw in reversed(lines):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        newest = newest or line
        if "loss" in line:
            return {"loss": line["loss"], **newest}
    return newest
