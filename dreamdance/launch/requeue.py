"""Decides whether a job that ended goes back into the queue, and why; once for all ranks, after all of them ended.

The batch script calls this when its `srun` has ended (python -P -m dreamdance.launch.requeue LOGS CODE; exit code 0
means yes) and requeues the job itself: where ranks run in a container, there is no `scontrol` inside.
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
from dreamdance.runs.array_member import array_member, is_all_done
from dreamdance.runs.files import NUM_PATIENT_ATTEMPTS, retry_transient, write_atomically
from dreamdance.runs.layout import complete_steps, failures_folder, read_done, was_warned

logger = logging.getLogger("dreamdance.launch.requeue")  # this module runs as `__main__`


@dataclass(frozen=True)
class Requeue:
    """One return to the queue.

    Attributes:
        time: seconds since 1970.
        reason: why, in words.
        failed: whether the job failed; False if it was asked to stop.
        progress: the run's progress: the step of its newest complete checkpoint, or its number of finished parts.
    """

    time: float
    reason: str
    failed: bool
    progress: int


# A job that is stopped so often without progress has too little time.
MAX_STOPS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class RequeueDecision:
    """Whether a job goes back into the queue, and why."""

    again: bool
    reason: str


def requeues_file(run_folder: Path) -> Path:
    """The file with one line for each time that the present submission, or this member, went back into the queue."""
    member = array_member()
    return run_folder / "logs" / ("requeues.jsonl" if member is None else f"requeues_{member.number}.jsonl")


def requeues_files(run_folder: Path) -> list[Path]:
    """The files of all members of the present submission; in a member of an array, only its own."""
    own = requeues_file(run_folder)
    return [own] if array_member() else sorted(own.parent.glob("requeues*.jsonl"))


def read_requeues(run_folder: Path) -> list[Requeue]:
    """When and why the present submission went back into the queue, in order; incomplete lines are skipped.

    A member of an array reads only its own returns.
    """
    found = []
    for path in requeues_files(run_folder):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            try:
                found.append(Requeue(**json.loads(line)))
            except (ValueError, TypeError) as error:
                logger.warning("%s: skipped a line that cannot be read (%s)", path, error)
    return sorted(found, key=lambda requeue: requeue.time)


def decide(run_folder: Path, exit_code: int) -> RequeueDecision:
    """Decides about a job whose ranks have all ended; a requeue is noted in `requeues.jsonl`.

    A job that was asked to stop goes back, even if it could not save, e.g. because it had just begun. A job that failed
    goes back, too: with many machines, most failures are caused by a machine. It does not go back if the user has to
    fix the cause, if it failed twice or was stopped three times without progress, or if another start owns the run.

    Args:
        run_folder: the run's folder.
        exit_code: the exit code of `srun`; 0 if all ranks succeeded.
    """
    if exit_code == REPLACED_EXIT_CODE:  # another start owns the folder: nothing is noted or removed there
        return RequeueDecision(again=False, reason="another start of this run has replaced it")
    recipe = stored_recipe(run_folder)
    if exit_code == 0 and (is_all_done(run_folder) or is_finished(recipe, run_folder)):
        return RequeueDecision(again=False, reason="finished")
    failures = read_failures(run_folder)
    if to_fix := next((failure for failure in failures if failure["user_error"]), None):
        return RequeueDecision(again=False, reason=f"the error of rank {to_fix['rank']} names what to change")
    earlier, progress = read_requeues(run_folder), _progress(recipe, run_folder)
    if len(earlier) >= recipe.cluster.max_requeues:
        reason = f"it was requeued {len(earlier)} times already, see cluster.max_requeues"
        return RequeueDecision(again=False, reason=reason)
    failed = exit_code != 0 and not was_warned(run_folder)
    if failed and earlier and earlier[-1].failed and earlier[-1].progress == progress:
        return RequeueDecision(again=False, reason="it failed twice without progress in between")
    recent = earlier[1 - MAX_STOPS_WITHOUT_PROGRESS :]
    stops = [one for one in recent if not one.failed and one.progress == progress]
    if not failed and len(stops) == MAX_STOPS_WITHOUT_PROGRESS - 1:
        reason = f"it was stopped {MAX_STOPS_WITHOUT_PROGRESS} times without progress"
        return RequeueDecision(again=False, reason=reason)
    reason = f"it failed (exit code {exit_code})" if failed else "it was asked to stop"
    _note(run_folder, Requeue(time.time(), reason, failed, progress))
    return RequeueDecision(again=True, reason=reason)


def read_failures(run_folder: Path) -> list[dict[str, Any]]:
    """The failures that ranks of the present start recorded, the earliest first; incomplete files are skipped."""
    found = []
    for path in failures_folder(run_folder).rglob("*.json"):  # the members of an array have folders of their own
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
            # Ordered by the file system's clock: the clocks of two machines may differ by hours.
            order = path.stat().st_mtime_ns, float(failure["time"])
            known = {key: failure[key] for key in ("time", "rank", "user_error", "text")}
            found.append((order, {**known, "job_id": path.stem.rpartition("_")[0]}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s cannot be read and is skipped (%s)", path, error)
    return [failure for _, failure in sorted(found, key=lambda entry: entry[0])]


def _note(run_folder: Path, requeue: Requeue) -> None:
    lines = [json.dumps(asdict(one)) + "\n" for one in (*read_requeues(run_folder), requeue)]
    write_atomically(requeues_file(run_folder), "".join(lines))
    shutil.rmtree(failures_folder(run_folder), ignore_errors=True)  # the next start records its own


def _progress(recipe: Recipe, run_folder: Path) -> int:
    if isinstance(recipe, TrainingRecipe):
        return max(complete_steps(run_folder), default=0)
    return len(read_done(run_folder))  # by all ranks, over all starts


def decide_patiently(run_folder: Path, exit_code: int) -> RequeueDecision:
    """Decides; repeats that for about a minute where storage fails, which may be why the job failed, too."""
    return retry_transient(
        lambda: decide(run_folder, exit_code),
        "deciding whether the job starts again",
        num_attempts=NUM_PATIENT_ATTEMPTS,
        should_retry=lambda error: isinstance(error, OSError) and is_transient(error),
    )


def main() -> int:
    """Decides for the batch script; exit code 0 means that the job goes back into the queue."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    decision = decide_patiently(Path(sys.argv[1]).resolve().parent, int(sys.argv[2]))
    logger.log(
        logging.WARNING if decision.again else logging.INFO,
        "%s: %s",
        "back into the queue" if decision.again else "the job is over",
        decision.reason,
    )
    return 0 if decision.again else 1


if __name__ == "__main__":
    sys.exit(main())
