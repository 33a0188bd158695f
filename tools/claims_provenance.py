"""What tools/claims.py says beside its numbers: how they were measured, by which commits, and what trainings took."""

import json
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from claims_names import CLAIMS
from claims_table import table_path
from claims_tasks import Plan, Task

from dreamdance.launch.run_folder import TIME_FORMAT
from dreamdance.runs.layout import PROVENANCE_FILE, progress_file

# Of the protocol of `table.json`: what a reader needs to compare numbers.
PROTOCOL_KEYS = ("clips", "frames", "maps", "lpips_alex")


def how_measured(plan: Plan, is_done: Callable[[Task], bool]) -> str:
    """Clips, sizes and networks as the finished evaluations name them, each different line once; then a line per claim.

    Args:
        plan: what is measured.
        is_done: whether a task is done (`Runner.is_done`).
    """
    found, claims = dict[str, None](), set[str]()
    for (claim, _), variants in plan.variants.items():
        for variant in variants:
            table = plan.settings.out / table_path(variant)
            if is_done(plan.tasks[variant.evaluation]) and table.is_file():
                claims.add(claim)
                protocol = json.loads(table.read_text(encoding="utf-8"))["protocol"]
                found |= dict.fromkeys(f"- {key}: {protocol[key]}" for key in PROTOCOL_KEYS if key in protocol)
    of_claims = [made_from(plan, is_done, claim) for claim in CLAIMS if claim in claims]
    return "\n".join([*sorted(found), *of_claims])


def made_from(plan: Plan, is_done: Callable[[Task], bool], claim: str) -> str:
    """The denoising steps of a claim's clips, and the commits at which what it needs was made.

    Only rows of one commit of the evaluation are compared; their trainings and clips may be of other commits.
    """
    units = [name for (of_claim, _), names in plan.units.items() if of_claim == claim for name in names]
    tasks = [plan.tasks[name] for name in plan.with_needs(units)]
    jobs = [job for task in tasks for job in task.jobs]
    steps = {
        "stage 1": {job.recipe.geometry.num_inference_steps for job in jobs if job.stage == "geometry"},
        "stage 2": {job.recipe.animation.num_inference_steps for job in jobs if job.stage == "animation"},
    }
    denoising = [f"{stage} {', '.join(map(str, sorted(numbers)))}" for stage, numbers in steps.items() if numbers]

    def commits(kind: str, chosen: list[Task]) -> str:
        notes = [plan.settings.out / f"done/{task.name}.json" for task in chosen if is_done(task)]
        found = sorted({json.loads(note.read_text(encoding="utf-8"))["commit"] for note in notes})
        return f"{kind} at {', '.join(found)}" if found else f"{kind} not noted"

    made = [commits("trainings", [task for task in tasks if task.steps])]
    made += [commits("clips", [task for task in tasks if task.jobs])]
    return f"- ({claim}) denoising steps: {'; '.join(denoising)}. Commits: {'; '.join(made)}"


def seconds_of_starts(run: Path) -> float:
    """What all starts of a run took so far, each up to its last logged step, which is all that a killed one leaves.

    Args:
        run: its folder; a run that never began took no time.
    """
    provenance, progress = run / PROVENANCE_FILE, progress_file(run)
    if not provenance.is_file() or not progress.is_file():
        return 0.0
    starts = json.loads(provenance.read_text(encoding="utf-8"))["starts"]
    begun = [datetime.strptime(start["time"], TIME_FORMAT).timestamp() for start in starts]
    reports = [time for line in progress.read_bytes().splitlines() if (time := _time_of(line)) is not None]
    ends = [max((time for time in reports if begin <= time < after), default=begin)
            for begin, after in pairwise([*begun, float("inf")])]  # fmt: skip
    return sum(end - begin for begin, end in zip(begun, ends, strict=True))


def _time_of(line: bytes) -> float | None:
    """The time of a report; None for one that a killed process left incomplete."""
    try:
        return float(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError):
        return None
