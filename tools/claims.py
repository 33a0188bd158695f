"""Measures the paper's claims on rendered dancers with exact truth.

    python tools/claims.py                         # all claims, three seeds, at most 4 hours on two cores
    python tools/claims.py c a --seeds 0 --list    # only what they would train, and how long that takes

Called by tools/claims.sh. Every training is a recipe of recipes/demo with a few words changed, by the launcher; claims
share trainings. What is complete is not run again, and a training that was killed continues. The numbers are those of
`evaluate`'s table.json. All seeds start from the same base models (recipes/base), which decide much of the result. Exit
codes: 0 done, 1 a part failed, 3 the hours are up: the same command continues.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

from claims_plan import CLAIMS, guidance_words, make_plan
from claims_plot import draw
from claims_table import TITLES, best_scales, collect, markdown, merge
from claims_tasks import Plan, Settings, Task

from dreamdance.runs.durations import duration

ROOT = Path(__file__).parents[1]
PROCESSES = 2


class FailedError(Exception):
    """A part ended with an error, which it has printed."""


class OutOfTimeError(Exception):
    """The hours are up."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parse(arguments)
    settings = Settings(
        options.out, options.clips, options.training_clips, options.steps, tuple(options.stage1), tuple(options.stage2)
    )
    claims = options.claims or list(CLAIMS)
    plan = make_plan(settings, claims, options.seeds)
    runner = Runner(plan, hours=options.hours)
    print(describe(plan, runner, with_parts=options.list), flush=True)
    if options.list:
        return 0
    code = 0
    try:
        for unit in plan.units:
            runner.run_unit(unit)
            merge(options.table, collect(plan))
    except (FailedError, OutOfTimeError) as reason:
        print(f"\nclaims: {reason}", file=sys.stderr)
        code = 3 if isinstance(reason, OutOfTimeError) else 1
    rows = merge(options.table, collect(plan))
    options.table.with_suffix(".svg").write_text(draw(rows), encoding="utf-8")
    print(f"\n{markdown(rows, claims)}\n{runner.times()}")
    print(f"\nnumbers: {options.table}, plot: {options.table.with_suffix('.svg')}")
    return code


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{', '.join(CLAIMS)}; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="data, runs, results (runs/claims)")
    parser.add_argument(
        "--table", type=Path, default=Path("tools/claims.csv"), help="CSV file; the plot lies beside it"
    )
    parser.add_argument("--hours", type=float, default=4.0, help="no part begins that would end later (4)")
    parser.add_argument("--clips", type=int, default=12, help="held-out dancers (12)")
    parser.add_argument("--training-clips", type=int, default=240, help="clips to train on (240)")
    parser.add_argument("--steps", type=int, help="steps of every training, to try the command")
    for stage in ("stage1", "stage2"):
        parser.add_argument(f"--{stage}", nargs="+", default=[], metavar="KEY=VALUE", help=f"for trainings of {stage}")
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    options = parser.parse_intermixed_args(arguments)
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"no claim is named {', '.join(sorted(unknown))}; they are {', '.join(CLAIMS)}")
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


class Runner:
    """Runs the tasks of a plan that are not done, and notes each that is: its key, its seconds, the commit."""

    def __init__(self, plan: Plan, *, hours: float) -> None:
        self.plan, self.out, self.hours = plan, plan.settings.out, hours
        self.started = time.monotonic()

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
        """Runs one task to its end and notes it."""
        begun = time.monotonic()
        print(f"\n== {task.name} (budget {duration(task.seconds)})", flush=True)
        if task.words:
            self._launch(task)
        else:
            self._animate(task)
        seconds = time.monotonic() - begun
        told = f"{duration(seconds)}, {duration(time.monotonic() - self.started)} in all"
        print(f"== {task.name}: {told}", flush=True)
        stamp = self.stamp(task)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        noted = {"key": self.key(task), "seconds": round(seconds, 1), "commit": commit(), "date": f"{date.today()}"}
        stamp.write_text(json.dumps(noted) + "\n", encoding="utf-8")

    def _launch(self, task: Task) -> None:
        command = launcher_command(task, self.out / "runs")
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise FailedError(f"{task.name} ended with exit code {code}; its command was {' '.join(command)}")

    def _animate(self, task: Task) -> None:
        """Two processes, each with half of the clips."""
        jobs = list(task.jobs)
        if task.scales_from is not None:
            table = json.loads((self.out / f"runs/{task.scales_from}/table.json").read_text(encoding="utf-8"))
            scales, one = best_scales(table)
            print(f"own scales {scales}, best scale for all: {one}", flush=True)
            jobs = [replace(job, overrides=(*job.overrides, guidance_words(scales))) for job in jobs]
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

    def is_done(self, task: Task) -> bool:
        """Whether the same work is noted as done."""
        try:
            noted = json.loads(self.stamp(task).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(noted["key"] == self.key(task))

    def stamp(self, task: Task) -> Path:
        """The note of a task that is done."""
        return self.out / f"done/{task.name}.json"

    def key(self, task: Task) -> str:
        """Differs if the task, or one that it needs, is another one."""
        needs = [self.key(self.plan.tasks[name]) for name in task.needs]
        content = json.dumps([asdict(replace(task, seconds=0.0)), needs], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def times(self) -> str:
        """What each part took, and all of them together."""
        lines, total = ["| part | took | budget |", "|---|--:|--:|"], 0.0
        for task in self.plan.tasks.values():
            if self.is_done(task):
                seconds = json.loads(self.stamp(task).read_text(encoding="utf-8"))["seconds"]
                total += seconds
                lines.append(f"| {task.name} | {duration(seconds)} | {duration(task.seconds)} |")
        return "\n".join([*lines, f"| all | {duration(total)} | |"])


def launcher_command(task: Task, runs: Path) -> list[str]:
    """The command of a task that is a recipe."""
    recipe, *overrides = task.words
    launcher = [sys.executable, "launchers/slurm.py", f"recipes/demo/{recipe}.yaml"]
    return [*launcher, "--cluster", "local", "--follow", "--runs", str(runs), *overrides]


def commit() -> str:
    """The commit of this checkout."""
    command: Sequence[str] = ("git", "rev-parse", "--short=12", "HEAD")
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
