"""Whether a job that ended goes back into the queue, and why. Decided once for all ranks, after all of them are gone.

The batch script asks when its `srun` has ended (python -P -m dreamdance.launch.requeue LOGS CODE, exit code 0 is yes)
and requeues the job itself: where ranks run in a container, there is no `scontrol` inside.
"""

import json
import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreamdance.errors import is_transient
from dreamdance.launch.finished import is_finished
from dreamdance.launch.run_folder import stored_recipe
from dreamdance.launch.run_ownership import REPLACED_EXIT_CODE
from dreamdance.recipe import Recipe, TrainingRecipe
from dreamdance.runs.files import NUM_PATIENT_ATTEMPTS, retry_transient, write_atomically
from dreamdance.runs.layout import complete_steps, failures_folder, read_done, was_warned

logger = logging.getLogger("dreamdance.launch.requeue")  # it is run as `__main__`


@dataclass(frozen=True)
class Requeue:
    """One return to the queue.

    Attributes:
        time: seconds since 1970.
        reason: in words.
        failed: whether the job had failed, and was not asked to stop.
        progress: how far the run had got: its newest complete checkpoint, or the parts that were done.
    """

    time: float
    reason: str
    failed: bool
    progress: int


@dataclass(frozen=True)
class Verdict:
    """Whether a job starts again."""

    again: bool
    reason: str


MAX_STOPS_WITHOUT_PROGRESS = 3
"""A job that is asked to stop so often before it gets any further has too little time."""


def requeues_file(run_folder: Path) -> Path:
    """One line for each time that the present submission went back into the queue."""
    return run_folder / "logs" / "requeues.jsonl"


def read_requeues(run_folder: Path) -> list[Requeue]:
    """How often, when and why the present submission went back into the queue; torn lines are passed over."""
    path = requeues_file(run_folder)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(Requeue(**json.loads(line)))
        except (ValueError, TypeError) as error:
            logger.warning("%s: a line that cannot be read is passed over (%s)", path, error)
    return found


def decide(run_folder: Path, exit_code: int) -> Verdict:
    """Judges a job whose ranks have all ended; a yes is noted in `requeues.jsonl`.

    A job that was asked to stop goes on, even if it could not save, e.g. because it had only just begun; so does one
    that failed, since most failures on many machines are the machines'. Not if the reason is the user's to remove, nor
    if it fails twice, or is stopped three times, without getting any further, nor if another start has the run by now.

    Args:
        run_folder: the run's folder.
        exit_code: of `srun`: 0 where every rank ended well.
    """
    if exit_code == REPLACED_EXIT_CODE:  # the run folder is the other's: nothing is noted or removed there
        return Verdict(again=False, reason="another start of this run has replaced it")
    recipe = stored_recipe(run_folder)
    if exit_code == 0 and is_finished(recipe, run_folder):
        return Verdict(again=False, reason="finished")
    failures = read_failures(run_folder)
    if told := next((failure for failure in failures if failure["user_error"]), None):
        return Verdict(again=False, reason=f"rank {told['rank']} says what to change")
    earlier, progress = read_requeues(run_folder), _progress(recipe, run_folder)
    if len(earlier) >= recipe.cluster.max_requeues:
        return Verdict(again=False, reason=f"requeued {len(earlier)} times already, see cluster.max_requeues")
    failed = exit_code != 0 and not was_warned(run_folder)
    if failed and earlier and earlier[-1].failed and earlier[-1].progress == progress:
        return Verdict(again=False, reason="it failed twice without getting any further")
    vain = [one for one in earlier[1 - MAX_STOPS_WITHOUT_PROGRESS :] if not one.failed and one.progress == progress]
    if not failed and len(vain) == MAX_STOPS_WITHOUT_PROGRESS - 1:
        return Verdict(
            again=False, reason=f"it was stopped {MAX_STOPS_WITHOUT_PROGRESS} times before it got any further"
        )
    reason = f"it failed (exit code {exit_code})" if failed else "it was asked to stop"
    _note(run_folder, Requeue(time.time(), reason, failed, progress))
    return Verdict(again=True, reason=reason)


def read_failures(run_folder: Path) -> list[dict[str, Any]]:
    """What the ranks of the present start left behind, the earliest first; torn files are passed over."""
    found = []
    for path in failures_folder(run_folder).glob("*.json"):
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
            # By the file system's clock first: two machines' own may be hours apart.
            order = path.stat().st_mtime_ns, float(failure["time"])
            found.append((order, {key: failure[key] for key in ("time", "rank", "user_error", "text")}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s cannot be read and is passed over (%s)", path, error)
    return [failure for _, failure in sorted(found, key=lambda entry: entry[0])]


def _note(run_folder: Path, requeue: Requeue) -> None:
    lines = [json.dumps(asdict(one)) + "\n" for one in (*read_requeues(run_folder), requeue)]
    write_atomically(requeues_file(run_folder), "".join(lines))
    shutil.rmtree(failures_folder(run_folder), ignore_errors=True)  # the next start is judged by its own


def _progress(recipe: Recipe, run_folder: Path) -> int:
    if isinstance(recipe, TrainingRecipe):
        return max(complete_steps(run_folder), default=0)
    return len(read_done(run_folder))  # of all ranks, over all starts


def decide_patiently(run_folder: Path, exit_code: int) -> Verdict:
    """Decides; repeats that for about a minute where storage fails, which may be why the job failed, too."""
    return retry_transient(
        lambda: decide(run_folder, exit_code),
        "deciding whether the job starts again",
        num_attempts=NUM_PATIENT_ATTEMPTS,
        should_retry=lambda error: isinstance(error, OSError) and is_transient(error),
    )


def main() -> int:
    """Answers the batch script."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    verdict = decide_patiently(Path(sys.argv[1]).resolve().parent, int(sys.argv[2]))
    logger.log(
        logging.WARNING if verdict.again else logging.INFO,
        "%s: %s",
        "back into the queue" if verdict.again else "the job is over",
        verdict.reason,
    )
    return 0 if verdict.again else 1


if __name__ == "__main__":
    sys.exit(main())
