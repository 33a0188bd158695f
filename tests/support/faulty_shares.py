"""Real ranks that share the work of a task; one has a fault in the middle of its share, then all start again."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dreamdance.recipe.schema import AnimateRecipe, EvaluateRecipe, PrepareRecipe
from dreamdance.runs.layout import read_done
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE
from dreamdance.runtime.ranks import Ranks
from support.ranks import StartedRanks

WORLD_SIZE = 2
STEP_TIMEOUT_SECONDS = 6
WATCHED = {"step_timeout_seconds": STEP_TIMEOUT_SECONDS, "collective_timeout_seconds": 60}
LOST = 1  # exit code of a rank that took over the work of a lost one
PAUSE_SECONDS = 1.0  # so that each rank gets some of the work

Recipe = AnimateRecipe | EvaluateRecipe | PrepareRecipe

# By task: its module, the one that calls the function that does one piece of the work, this function, and the class of
# its recipe.
_TASKS: dict[str, tuple[str, str, str, type[Recipe]]] = {
    "animate": ("dreamdance.inference.animate", "dreamdance.inference.animate", "run_stages", AnimateRecipe),
    "evaluate": ("dreamdance.evaluation.evaluate", "dreamdance.evaluation.evaluate", "evaluate_clip", EvaluateRecipe),
    "prepare": ("dreamdance.data.prepare", "dreamdance.data.planning", "render_record", PrepareRecipe),
}


@dataclass(frozen=True)
class FaultInShare:
    """A fault of one rank at the end of a piece of its work, before the result is written.

    Attributes:
        rank: the rank that has the fault.
        number: a signal that the rank sends to itself; None makes it hang instead.
        piece: number of the piece within its share, from 1.
        flag: a file that is created at that moment.
    """

    rank: int
    number: signal.Signals | None
    piece: int
    flag: Path

    def __call__(self) -> None:
        self.flag.touch()
        if self.number is None:
            time.sleep(600)
        else:
            os.kill(os.getpid(), self.number)


def work(ranks: Ranks, *, recipe: str, run_folder: str, fault: FaultInShare | None = None, pause: float = 0.0) -> None:
    """Runs a task on one rank; each piece of work takes `pause` seconds longer."""
    task = json.loads(recipe)["task"]
    name, caller, piece_of_work, recipe_class = _TASKS[task]
    module = import_module(caller)
    do, num_done = getattr(module, piece_of_work), 0

    def do_with_fault(*arguments: Any, **options: Any) -> Any:
        nonlocal num_done
        result = do(*arguments, **options)
        num_done += 1
        time.sleep(pause)
        if fault is not None and (fault.rank, fault.piece) == (ranks.rank, num_done):
            fault()
        return result

    setattr(module, piece_of_work, do_with_fault)
    getattr(import_module(name), task)(recipe_class.model_validate_json(recipe), Path(run_folder))


def start_task(recipe: Recipe, folder: Path, **more: Any) -> StartedRanks:
    """Starts the ranks of a task, whose run folder is `folder / "run"`."""
    arguments = {"recipe": recipe.model_dump_json(), "run_folder": str(folder / "run"), **more}
    return StartedRanks(work, WORLD_SIZE, folder / "ranks", **arguments)


@dataclass(frozen=True)
class Detection:
    """How a fault was detected: seconds until the ranks that could end had ended, and the output of all ranks."""

    seconds: float
    output: str


def fail_and_start_again(
    recipe: Recipe, folder: Path, fault: FaultInShare, is_complete: Callable[[], object]
) -> Detection:
    """Makes one rank fail, checks that the other does its work and ends in time, and starts all ranks again.

    The second start must do no piece of work twice.

    Args:
        recipe: the recipe of the task.
        folder: a folder for the run and the output of the ranks.
        fault: the fault in the first start.
        is_complete: returns whether all results exist.
    """
    watched = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=WATCHED)})
    with start_task(watched, folder, fault=fault, pause=PAUSE_SECONDS) as ranks:
        # A stopped rank can do nothing: srun ends it because of the other rank's error. A hanging rank ends itself.
        codes = dict.fromkeys(range(WORLD_SIZE), LOST)
        del codes[fault.rank]
        if fault.number is None:
            codes = dict.fromkeys(codes, 0) | {fault.rank: TRY_AGAIN_EXIT_CODE}
        for rank, code in codes.items():
            ranks.processes[rank].join(150)
            assert ranks.processes[rank].exitcode == code, ranks.output()
        detection = Detection(time.time() - fault.flag.stat().st_mtime, ranks.output())
    done = read_done(folder / "run")
    assert is_complete()
    with start_task(recipe, folder) as ranks:
        ranks.results()
    assert is_complete()
    assert read_done(folder / "run") == done
    assert set(Counter(done).values()) == {1}, "nothing is done twice"
    return detection
