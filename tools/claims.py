"""Measures the demo's aims and the paper's claims on rendered dancers with exact truth.

    python tools/claims.py                         # all of them, three seeds, at most 4 hours a call on two cores
    python tools/claims.py demo                    # only the demo's aims: what it trains is shared with the claims
    python tools/claims.py c a --seeds 0 --list    # only what they would train, and how long that takes

Called by tools/claims.sh. Every training is a recipe of recipes/demo with a few words changed, by the launcher; claims
share trainings. What is complete is not run again, and a training that was killed continues; what another recipe or
base model made is neither continued nor counted. The numbers are those of `evaluate`'s table.json. Trainings start from
what recipes/demo names: where that is a base model, all seeds share it, and it decides much of the result. LPIPS needs
the weights that `bash tools/networks.sh` fetches; without them nothing begins that would need them. Relative paths lie
in the project's folder. Exit codes: 0 done, 1 a part failed or weights are missing, 3 the hours are up: the same
command continues.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from claims_animate import Job
from claims_comparisons import TITLES
from claims_markdown import markdown
from claims_names import CLAIMS
from claims_people import people_of_aims
from claims_plan import make_plan
from claims_plot import draw
from claims_provenance import how_measured, seconds_of_starts
from claims_table import best_scales, collect, merge
from claims_tasks import ROOT, Plan, Settings, Task, guidance_words

from dreamdance.evaluation.network_metrics import open_networks
from dreamdance.recipe import EvaluateRecipe
from dreamdance.runs.durations import duration
from dreamdance.runs.files import write_atomically

PROCESSES = 2
# The committed numbers, without the suffixes of their files. A trial does not write them.
COMMITTED = ROOT / "tools/claims"


class FailedError(Exception):
    """A part ended with an error, which it has printed."""


class OutOfTimeError(Exception):
    """The hours are up."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parse(arguments)
    claims = options.claims or list(CLAIMS)
    plan = make_plan(options.settings, claims, options.seeds)
    runner = Runner(plan, hours=options.hours)
    print(describe(plan, runner, with_parts=options.list), flush=True)
    if options.list:
        return 0
    if absent := absent_networks(plan, runner.is_done, ROOT):
        print(f"\nclaims: run bash tools/networks.sh first: {'; '.join(absent)}", file=sys.stderr)
        return 1
    code = 0
    try:
        for unit in plan.units:
            runner.run_unit(unit)
            merge(options.table, collect(plan, runner.is_done))
    except (FailedError, OutOfTimeError) as reason:
        print(f"\nclaims: {reason}", file=sys.stderr)
        code = 3 if isinstance(reason, OutOfTimeError) else 1
    rows = merge(options.table, collect(plan, runner.is_done))
    write_atomically(options.table.with_suffix(".svg"), draw(rows))
    people = people_of_aims(plan, runner.is_done, rows)
    print(f"\n{markdown(rows, claims, people)}\n{how_measured(plan, runner.is_done)}\n\n{runner.times()}")
    print(f"\nnumbers: {options.table}, plot: {options.table.with_suffix('.svg')}")
    return code


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, and the settings that it makes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{', '.join(CLAIMS)}; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="data, runs, results (runs/claims)")
    parser.add_argument(
        "--table",
        type=Path,
        help=f"CSV file; the plot lies beside it (tools/{COMMITTED.name}.csv; claims.csv in --out for a trial: with "
        "another number of clips or steps, or with further words)",
    )
    parser.add_argument(
        "--hours", type=float, default=4.0, help="no part begins that would end later; each call has all its hours (4)"
    )
    parser.add_argument("--clips", type=int, default=12, help="held-out dancers (12)")
    parser.add_argument("--training-clips", type=int, default=240, help="clips to train on (240)")
    parser.add_argument("--steps", type=int, help="steps of every training, to try the command")
    for stage in ("stage1", "stage2"):
        parser.add_argument(f"--{stage}", nargs="+", default=[], metavar="KEY=VALUE", help=f"for trainings of {stage}")
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    options = parser.parse_intermixed_args(arguments)
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"no claim is named {', '.join(sorted(unknown))}; they are {', '.join(CLAIMS)}")
    options.out = ROOT / options.out
    options.settings = Settings(
        options.out, options.clips, options.training_clips, options.steps, tuple(options.stage1), tuple(options.stage2)
    )
    is_trial = options.settings != Settings(options.out)
    default = options.out / "claims.csv" if is_trial else COMMITTED.with_suffix(".csv")
    options.table = default if options.table is None else ROOT / options.table
    if is_trial and options.table.resolve().with_suffix("") == COMMITTED.resolve():
        parser.error(f"{options.table} has the numbers of the whole plan; a trial needs another --table")
    return options


def describe(plan: Plan, runner: "Runner", *, with_parts: bool) -> str:
    """What is left to do for each claim, or for each part too, with the time that it should take."""
    lines, seen, total = list[str](), set[str](), 0.0
    for (claim, seed), names in plan.units.items():
        new = [name for name in plan.with_needs(names) if name not in seen]
        seen |= set(new)
        left = [plan.tasks[name] for name in new if not runner.is_done(plan.tasks[name])]
        seconds = sum(task.seconds for task in left)
        total += seconds
        lines.append(f"{TITLES[claim]}, seed {seed}: {len(left)} parts to do, about {duration(seconds)}")
        for task in left if with_parts else []:
            steps = f"{task.steps} steps, " if task.steps else ""
            lines.append(f"    {task.name}: {steps}about {duration(task.seconds)}")
    return "\n".join([*lines, f"In all about {duration(total)} on two idle cores."])


def absent_networks(plan: Plan, is_done: Callable[[Task], bool], root: Path) -> list[str]:
    """What the evaluations to do would leave out of their tables, because weights are missing or damaged.

    Args:
        plan: what is measured.
        is_done: whether a task is done (`Runner.is_done`).
        root: the project's folder, in which relative paths lie.

    Returns:
        A reason for each network, as `evaluate` gives it; empty if all are there, or none is needed.
    """
    reasons = dict[str, None]()
    for task in plan.tasks.values():
        if isinstance(task.recipe, EvaluateRecipe) and not is_done(task):
            settings = task.recipe.metrics
            found = open_networks(settings.model_copy(update={"weights": str(root / settings.weights)}))
            reasons |= dict.fromkeys(found.absent.values())
    return list(reasons)


class Runner:
    """Runs the tasks of a plan that are not done, and notes each that is: its key, its seconds, the commit."""

    def __init__(self, plan: Plan, *, hours: float) -> None:
        self.plan, self.out, self.hours = plan, plan.settings.out, hours
        self.started, self._keys = time.monotonic(), dict[str, str]()

    def run_unit(self, unit: tuple[str, int]) -> None:
        """All tasks of one claim and seed.

        Raises:
            FailedError: one failed.
            OutOfTimeError: it would end after the hours are up.
        """
        names = self.plan.with_needs(self.plan.units[unit])
        tasks = [task for name in names if not self.is_done(task := self.plan.tasks[name])]
        print(f"\n==== {TITLES[unit[0]]}, seed {unit[1]}: {len(tasks)} of {len(names)} parts to do", flush=True)
        for task in tasks:
            left = 3600 * self.hours - (time.monotonic() - self.started)
            if task.seconds > left:
                raise OutOfTimeError(
                    f"{task.name} takes about {duration(task.seconds)}, and {duration(left)} of {self.hours:g} hours "
                    "are left; the same command continues"
                )
            self.run(task)

    def run(self, task: Task) -> None:
        """Runs one task to its end, and notes first that it began, then that it is done.

        Raises:
            FailedError: it failed, or another recipe, base model or need has left a part of it.
        """
        begun, note = time.monotonic(), {"key": self.key(task), "commit": commit(), "date": f"{date.today()}"}
        self._leave_nothing_of_others(task)
        self._write_note(task, note)
        print(f"\n== {task.name} (budget {duration(task.seconds)})", flush=True)
        if task.words:
            self._launch(task)
        else:
            self._animate(task)
        seconds = time.monotonic() - begun
        took = f"{duration(seconds)}, {duration(time.monotonic() - self.started)} in all"
        print(f"== {task.name}: {took}", flush=True)
        self._write_note(task, {**note, "seconds": round(seconds, 1)})

    def _leave_nothing_of_others(self, task: Task) -> None:
        """Removes the table of an evaluation that was another one; asks to remove what takes long to make again."""
        other = self.noted(task).get("key")
        if not task.words or other in (None, self.key(task)):
            return  # a clip knows itself what it was made from
        made = {self.out / f"runs/{task.name}", Path(getattr(task.recipe, "output", self.out / f"runs/{task.name}"))}
        found = sorted(str(folder) for folder in made if folder.exists())
        if isinstance(task.recipe, EvaluateRecipe):
            shutil.rmtree(self.out / f"runs/{task.name}", ignore_errors=True)
        elif found:
            raise FailedError(
                f"{task.name} was begun with another recipe, base model or data: remove {' and '.join(found)}, or give "
                "another --out"
            )

    def _seconds_of_starts(self, task: Task) -> float:
        return seconds_of_starts(self.out / f"runs/{task.name}") if task.steps else 0.0

    def _write_note(self, task: Task, note: dict[str, Any]) -> None:
        self.stamp(task).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.stamp(task), json.dumps(note) + "\n")

    def _launch(self, task: Task) -> None:
        command = launcher_command(task, self.out / "runs")
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise FailedError(f"{task.name} ended with exit code {code}; its command was {' '.join(command)}")

    def _animate(self, task: Task) -> None:
        """Two processes, each with half of the clips."""
        jobs = self.jobs_of(task)
        file = self.out / f"jobs/{task.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"runs": str(self.out / "runs"), "jobs": [asdict(job) for job in jobs]}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        script = str(Path(__file__).with_name("claims_animate.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        parts = [
            subprocess.Popen([sys.executable, script, str(file), f"{part}/{PROCESSES}"], cwd=ROOT, env=environment)
            for part in range(PROCESSES)
        ]
        try:
            codes = [part.wait() for part in parts]
        finally:
            for part in parts:
                part.terminate()
        if any(codes):
            raise FailedError(f"{task.name} ended with exit codes {codes}")

    def jobs_of(self, task: Task) -> list[Job]:
        """A task's jobs; where an evaluation decides their guidance scales, with these."""
        if task.scales_from is None:
            return list(task.jobs)
        table = json.loads((self.out / f"runs/{task.scales_from}/table.json").read_text(encoding="utf-8"))
        chosen = best_scales(table)
        one = f"one for all: {chosen.one_best_for_normals} for normals, {chosen.one_best_on_average} on average"
        print(f"own scales {chosen.own}; {one}", flush=True)
        return [replace(job, overrides=(*job.overrides, guidance_words(chosen.own))) for job in task.jobs]

    def is_done(self, task: Task) -> bool:
        """Whether the same work is noted as done."""
        noted = self.noted(task)
        return "seconds" in noted and noted.get("key") == self.key(task)

    def noted(self, task: Task) -> dict[str, Any]:
        """The note of a task that began or is done; empty if there is none, or a damaged one."""
        try:
            found = json.loads(self.stamp(task).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def stamp(self, task: Task) -> Path:
        """The file of a task's note."""
        return self.out / f"done/{task.name}.json"

    def key(self, task: Task) -> str:
        """Differs if the task, or one that it needs, is another one: see `Task.identity`."""
        if task.name not in self._keys:
            needs = [self.key(self.plan.tasks[name]) for name in task.needs]
            content = json.dumps([task.identity, needs])
            self._keys[task.name] = hashlib.sha256(content.encode()).hexdigest()
        return self._keys[task.name]

    def times(self) -> str:
        """What each part took, and all of them together.

        A training that was killed has the time of all its starts; other parts have that of the last one.
        """
        lines, total = ["| part | took | budget |", "|---|--:|--:|"], 0.0
        for task in self.plan.tasks.values():
            if self.is_done(task):
                # The note has the last start alone.
                seconds = max(self.noted(task)["seconds"], self._seconds_of_starts(task))
                total += seconds
                lines.append(f"| {task.name} | {duration(seconds)} | {duration(task.seconds)} |")
        rule = (
            "A training's time is that of all its starts, a killed one up to its last logged step; others' of the last."
        )
        return "\n".join([*lines, f"| all | {duration(total)} | |", "", rule])


def launcher_command(task: Task, runs: Path) -> list[str]:
    """The command of a task that is a recipe."""
    recipe, *overrides = task.words
    launcher = [sys.executable, "launchers/slurm.py", f"recipes/demo/{recipe}.yaml"]
    return [*launcher, "--cluster", "local", "--follow", "--runs", str(runs), *overrides]


def commit(root: Path = ROOT) -> str:
    """The commit of a checkout, with `-dirty` if a file under version control differs: any but the claims' own."""

    def git(*words: str) -> str:
        command = ("git", "-C", str(root), *words)
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()

    own = (f":(exclude)tools/{COMMITTED.name}{suffix}" for suffix in (".csv", ".svg"))
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *own)
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changes else "")


if __name__ == "__main__":
    sys.exit(main())
