"""The command `dreamdance`, also `launchers/slurm.py` (C5).

Words without dashes change the recipe, options with dashes control the launcher, and each outcome has an exit code.
"""

import argparse
import contextlib
import difflib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dreamdance.errors import RecipeError, UserError
from dreamdance.launch import dry_run, preflight, status, submission
from dreamdance.launch.explain import explanation
from dreamdance.launch.finished import is_finished
from dreamdance.launch.follow import explain_failure, follow
from dreamdance.launch.initial_run import require_same_prediction
from dreamdance.launch.job import Job
from dreamdance.launch.local.heartbeat import Heartbeat
from dreamdance.launch.prepared_output import describe_output
from dreamdance.launch.program import DEFAULT_RUNS, launcher_command, program
from dreamdance.launch.run_folder import DifferentRecipeError, create_or_check, locked, refuse_different
from dreamdance.launch.sweeps import load_all
from dreamdance.recipe import LoadedRecipe, PrepareRecipe, Recipe
from dreamdance.runs.layout import progress_file
from dreamdance.runtime.gpus import DEFAULT_GPU, GPUS, Gpu

OK, FAILED, BAD_RECIPE, OTHER_RECIPE, HAS_JOB = 0, 1, 2, 3, 4
INTERRUPTED = 128 + signal.SIGINT
EPILOG = """Words such as optimizer.lr=1e-4 change the recipe, options with dashes control the launcher. The same
command again resumes where the run stopped. Exit codes: 0 done or submitted, 1 the job failed, 2 the recipe is wrong or
something is missing, 3 the run folder belongs to a different recipe, 4 the run is queued or running already and was not
submitted again (with --follow, that job is shown, and the exit code is the job's), 130 Ctrl-C under --follow (a local
job was stopped, a Slurm job continues)."""

Planner = Callable[[Recipe, float | None, Gpu], str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\nusage: {_usage()}")


def main(argv: Sequence[str], plan: Planner) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the words after the program's name.
        plan: describes a recipe's parameters, memory and time, given the memory in GiB of the GPUs here if there are
            any, and the GPU to estimate the time with; and the scores of its clips. May be empty. The caller passes
            it, because the launcher knows no models and no clips.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if argv and argv[0] == "explain":
            _show(explanation(argv[1:]))
            return OK
        options = _options(argv)
        if options.words and options.words[0] in ("status", "cancel"):
            return _ask(options)
        return _run_all(load_all(options.words, options.sweep, options.cluster, usage=_usage()), options, plan, argv)
    except DifferentRecipeError as error:
        sys.stderr.write(f"{error}\n")
        return OTHER_RECIPE
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_RECIPE


def _usage() -> str:
    return (
        f"{program()} RECIPE [key=value ...] [options]\n       {program()} status [RUN]\n"
        f"       {program()} cancel RUN\n       {program()} explain [KEY] [--task TASK]"
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=program(), usage=_usage(), epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="a recipe's file, and values to change")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local", "debug"),
        default="auto",
        help="auto (default): Slurm if a cluster answers, else this machine; debug: in this process",
    )
    parser.add_argument("--dry-run", action="store_true", help="show recipe, plan and batch script; submit nothing")
    parser.add_argument(
        "--gpu",
        choices=tuple(GPUS),
        help=f"with --dry-run: the GPU to estimate the time with (default: the one here if known, else {DEFAULT_GPU})",
    )
    parser.add_argument("--follow", action="store_true", help="show progress and exit with the job's own status")
    parser.add_argument(
        "--runs", type=Path, default=DEFAULT_RUNS, metavar="DIR", help="the folder of all runs (default: runs)"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=v1,v2",
        help="one run for each value (commas inside brackets do not separate values); may be repeated",
    )
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        key = unknown[0].lstrip("-").partition("=")[0]
        hint = f"; did you mean '{near[0]}'?" if near else f"; a recipe key has no dashes: {key}=..."
        raise RecipeError(f"unknown option '{unknown[0]}'{hint}")
    if options.gpu and not options.dry_run:
        raise RecipeError(f"--gpu {options.gpu} chooses the GPU of an estimate: add --dry-run, or leave it out")
    if not options.words:
        parser.print_help()
        raise RecipeError("no recipe given")
    return options


def _ask(options: argparse.Namespace) -> int:
    verb, *names = options.words
    if verb == "status":
        answers = [status.details(status.find_run(name, options.runs)) for name in names]
        _show("\n\n".join(answers) if names else status.table(options.runs))
        return OK
    if len(names) != 1:
        raise RecipeError(f"cancel needs the name of one run\nusage: {_usage()}")
    run_folder = status.find_run(names[0], options.runs)
    job = submission.last_job(run_folder)
    if job is None:
        raise UserError(f"run '{run_folder.name}' was never submitted")
    recipe = status.readable_recipe(run_folder)  # a job can be cancelled even if another version created its run
    standing = submission.status_of(job, recipe, run_folder) if recipe is not None else None
    if standing is not None and not standing.is_active:
        _show(f"nothing to cancel: the job of run '{run_folder.name}' has ended ({standing.state}, {standing.detail})")
        return OK
    submission.cancel(job)
    _show(f"cancelled {job.cluster} job {job.job_id} of run '{run_folder.name}'")
    return OK


def _run_all(recipes: Sequence[LoadedRecipe], options: argparse.Namespace, plan: Planner, argv: Sequence[str]) -> int:
    """Runs all: on Slurm at once, else one after the other. Returns the highest exit code; Ctrl-C ends the sequence."""
    cluster = submission.choose_cluster(options.cluster)
    worst = OK
    for group in _groups(recipes, cluster):
        if options.dry_run:
            for loaded in group:
                _show_plan(loaded, options, cluster, plan)
            continue
        for code in _run(group, cluster, options, argv):
            worst = max(worst, code)
            if code == INTERRUPTED:
                return worst
    return worst


def _groups(recipes: Sequence[LoadedRecipe], cluster: submission.ClusterName) -> list[list[LoadedRecipe]]:
    """Runs that are submitted together: on Slurm all with the same `cluster` section, as an array; else each alone."""
    if cluster != "slurm":
        return [[loaded] for loaded in recipes]
    groups: dict[str, list[LoadedRecipe]] = {}
    for loaded in recipes:
        cluster_of_run, name = loaded.recipe.cluster, loaded.recipe.name
        alike = cluster_of_run.model_dump_json() if cluster_of_run.array == 1 else name  # an array is one run's
        groups.setdefault(alike, []).append(loaded)
    return list(groups.values())


@dataclass(frozen=True)
class _Started:
    """A run whose job was submitted, now or before.

    Attributes:
        offset: where in the progress log the lines of this command begin, in bytes.
        state: the state of a job that existed before; None for a job that this command submitted.
    """

    job: submission.SubmittedJob
    loaded: LoadedRecipe
    run_folder: Path
    offset: int
    state: submission.State | None

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def is_new(self) -> bool:
        return self.state is None


def _run(
    group: Sequence[LoadedRecipe], cluster: submission.ClusterName, options: argparse.Namespace, argv: Sequence[str]
) -> Iterator[int]:
    """Submits the runs of a group that are neither finished, queued nor running; yields the exit code of each."""
    started = _start(group, cluster, options.runs, argv)
    for one in started:
        job, name = one.job, one.recipe.name
        if job.cluster == "debug" and one.is_new:
            yield _run_here(one, options.runs)
            return
        what = f"{job.cluster} job {job.job_id}"
        what = what if one.is_new else f"not submitted again, {what} is already {one.state}"
        _show(f"{name}: {what}, {_size_of(job)}, log {job.log_file(one.run_folder)}")
    if options.follow or (options.sweep and cluster == "local"):
        for one in started:
            yield _follow(one, options.runs)
    elif started:
        asking = launcher_command(f"status {started[0].recipe.name}", options.runs)
        _show(f"to see its progress, add --follow to the same command, or run: {asking}")
        yield OK if all(one.is_new for one in started) else HAS_JOB


def _size_of(job: submission.SubmittedJob) -> str:
    processes = f"{job.num_tasks} process{'es' * (job.num_tasks > 1)}"
    return processes if job.array == 1 else f"{job.array} jobs of {processes}"


def _start(
    group: Sequence[LoadedRecipe], cluster: submission.ClusterName, runs: Path, argv: Sequence[str]
) -> list[_Started]:
    """Creates and submits the runs without a job. A run with a job is left as it is: the job may reread its recipe."""
    unfinished = [loaded for loaded in group if not _show_finished(loaded, runs)]
    for loaded in unfinished:
        _check(loaded, cluster, runs)
        if cluster != "slurm" and (warning := preflight.oversize(loaded.recipe)):
            sys.stderr.write(f"{warning}\n")
    with _naming_what_fails(), contextlib.ExitStack() as locks:
        jobs: dict[str, submission.SubmittedJob] = {}
        states: dict[str, submission.State] = {}
        waiting: list[LoadedRecipe] = []
        for loaded in unfinished:
            recipe, run_folder = loaded.recipe, _run_folder(loaded, runs)
            run_folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(run_folder))
            if _show_finished(loaded, runs):  # another launcher's job may have finished while this one waited
                continue
            job = submission.last_job(run_folder)
            status = submission.status_of(job, recipe, run_folder) if job is not None else None
            if job is not None and status is not None and status.is_active:
                refuse_different(recipe, run_folder)
                jobs[recipe.name], states[recipe.name] = job, status.state
            else:
                create_or_check(recipe, run_folder, [program().rpartition("/")[2], *argv])
                waiting.append(loaded)
        offsets = {loaded.recipe.name: _size(progress_file(_run_folder(loaded, runs))) for loaded in unfinished}
        if waiting:
            folders = [_run_folder(loaded, runs) for loaded in waiting]
            new = submission.submit([loaded.recipe for loaded in waiting], folders, cluster)
            jobs |= {loaded.recipe.name: job for loaded, job in zip(waiting, new, strict=True)}
    return [
        _Started(
            job=jobs[loaded.recipe.name],
            loaded=loaded,
            run_folder=_run_folder(loaded, runs),
            offset=offsets[loaded.recipe.name],
            state=states.get(loaded.recipe.name),
        )
        for loaded in unfinished
        if loaded.recipe.name in jobs
    ]


@contextlib.contextmanager
def _naming_what_fails() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run cannot be started: {error}; make that folder writable, free space there, or give another --runs"
        ) from error


def _run_folder(loaded: LoadedRecipe, runs: Path) -> Path:
    return (runs / loaded.recipe.name).absolute()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _show_finished(loaded: LoadedRecipe, runs: Path) -> bool:
    recipe, run_folder = loaded.recipe, _run_folder(loaded, runs)
    if not is_finished(recipe, run_folder):
        return False
    refuse_different(recipe, run_folder)
    _show(f"{recipe.name} is finished: {run_folder}")
    _show_output(loaded, runs)
    return True


def _check(loaded: LoadedRecipe, cluster: submission.ClusterName, runs: Path) -> None:
    """Raises UserError if the run cannot start."""
    if missing := _missing(loaded, cluster, runs):
        raise UserError(preflight.report(loaded.recipe, loaded.file, runs, missing))


def _missing(loaded: LoadedRecipe, cluster: submission.ClusterName, runs: Path) -> list[preflight.Missing]:
    """What the run needs and lacks here; raises UserError for what no file or package would cure."""
    _refuse_nodes_on_one_machine(loaded.recipe, cluster)
    require_same_prediction(loaded.recipe, runs)
    return preflight.missing(loaded.recipe, loaded.file, runs, check_gpu=cluster != "slurm")


def _refuse_nodes_on_one_machine(recipe: Recipe, cluster: submission.ClusterName) -> None:
    if cluster == "local" and recipe.cluster.nodes > 1:
        raise UserError(
            f"--cluster local uses one machine, but cluster.nodes is {recipe.cluster.nodes}; add cluster.nodes=1"
        )
    if cluster == "local" and recipe.cluster.array > 1:
        raise UserError(
            f"--cluster local starts one job, but cluster.array is {recipe.cluster.array}; add cluster.array=1, and "
            "cluster.tasks_per_node for several processes"
        )


def _show_plan(
    loaded: LoadedRecipe, options: argparse.Namespace, cluster: submission.ClusterName, plan: Planner
) -> None:
    recipe, run_folder = loaded.recipe, _run_folder(loaded, options.runs)
    missing = _missing(loaded, cluster, options.runs)
    gpu = GPUS[options.gpu] if options.gpu else preflight.gpu_at_hand() or GPUS[DEFAULT_GPU]
    _show(dry_run.pages(loaded, run_folder, cluster, plan(recipe, preflight.gpu_memory_gib(), gpu)))
    warnings = [preflight.oversize(recipe)] if cluster != "slurm" else []
    warnings += [preflight.report(recipe, loaded.file, options.runs, missing)] if missing else []
    if text := "\n".join(warning for warning in warnings if warning):
        _show(f"\n# Warnings\n{text}")


def _run_here(started: _Started, runs: Path) -> int:
    """Runs the job in this process: breakpoints work, and an unexpected error shows its traceback."""
    try:
        with Heartbeat(started.run_folder):
            Job(started.run_folder)()
    except SystemExit as ending:
        if ending.code:
            return FAILED
    _show_output(started.loaded, runs)
    return OK


def _show_output(loaded: LoadedRecipe, runs: Path) -> None:
    """What a finished `prepare` has made, and the next command."""
    if isinstance(loaded.recipe, PrepareRecipe) and (text := describe_output(loaded.recipe, loaded.file, runs)):
        _show(text)


def _follow(started: _Started, runs: Path) -> int:
    job, recipe, run_folder = started.job, started.recipe, started.run_folder
    with contextlib.suppress(ValueError):  # signal handlers belong to the main thread
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    since = time.monotonic()
    try:
        outcome = follow(job, recipe, run_folder, started.offset, is_new=started.is_new)
    except KeyboardInterrupt:
        if job.cluster == "slurm":
            ending = launcher_command(f"cancel {recipe.name}", runs)
            _show(f"\njob {job.job_id} continues; to end it: {ending}")
        else:
            submission.cancel(job)
            _show(f"\nstopped {recipe.name}; the same command resumes from its last checkpoint")
        return INTERRUPTED
    if outcome.state == "cancelled":
        _show(f"{recipe.name} was cancelled; the same command resumes from its last checkpoint")
        return FAILED
    if outcome.state == "failed":
        sys.stderr.write(f"{explain_failure(job, run_folder, outcome)}\n")
        return FAILED
    if is_finished(recipe, run_folder):
        _show(f"{recipe.name} finished in {time.monotonic() - since:.0f} s: {run_folder}")
        _show_output(started.loaded, runs)
        return OK
    _show(f"{recipe.name} stopped before its end; the same command resumes")
    return FAILED


def _show(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
