"""Real ranks that share the work of a task, one of which is struck in the middle of its share, and started again."""

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
LOST = 1  # how a rank ends that took over another one's work
PAUSE_SECONDS = 1.0  # so that each rank gets some of the work

Recipe = AnimateRecipe | EvaluateRecipe | PrepareRecipe

_TASKS = {
    "animate": ("dreamdance.inference.animate", "run_stages", AnimateRecipe),
    "evaluate": ("dreamdance.evaluation.evaluate", "evaluate_clip", EvaluateRecipe),
    "prepare": ("dreamdance.data.prepare", "render_record", PrepareRecipe),
}
"""By task: its module, what there does one piece of the work, and its recipe."""


@dataclass(frozen=True)
class Strike:
    """What happens to a rank at the end of some piece of its work, before that is written.

    Attributes:
        rank: which one.
        number: a signal that it sends to itself; None has it wait for something that never comes.
        piece: of its share, from 1.
        flag: a file that is made at that moment.
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


def work(ranks: Ranks, *, recipe: str, run_folder: str, strike: Strike | None = None, pause: float = 0.0) -> None:
    """Runs a task on one rank; each piece of work takes as much longer as `pause` says, in seconds."""
    task = json.loads(recipe)["task"]
    name, piece_of_work, recipe_class = _TASKS[task]
    module = import_module(name)
    do, num_done = getattr(module, piece_of_work), 0

    def do_and_be_struck(*arguments: Any) -> Any:
        nonlocal num_done
        result = do(*arguments)
        num_done += 1
        time.sleep(pause)
        if strike is not None and (strike.rank, strike.piece) == (ranks.rank, num_done):
            strike()
        return result

    setattr(module, piece_of_work, do_and_be_struck)
    getattr(module, task)(recipe_class.model_validate_json(recipe), Path(run_folder))


def start(recipe: Recipe, folder: Path, **more: Any) -> StartedRanks:
    """Starts the ranks of a task, whose run folder is `folder / "run"`."""
    arguments = {"recipe": recipe.model_dump_json(), "run_folder": str(folder / "run"), **more}
    return StartedRanks(work, WORLD_SIZE, folder / "ranks", **arguments)


@dataclass(frozen=True)
class Noticed:
    """What came of a strike: seconds until the ranks that could had ended, and what they wrote."""

    seconds: float
    output: str


def strike_and_start_again(recipe: Recipe, folder: Path, strike: Strike, look: Callable[[], object]) -> Noticed:
    """Has a rank struck, sees the other do its work and end in time, and starts all again, which does nothing twice.

    Args:
        recipe: of the task.
        folder: for the run and what the ranks write.
        strike: what happens in the first start.
        look: whether all is complete.
    """
    watched = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=WATCHED)})
    with start(watched, folder, strike=strike, pause=PAUSE_SECONDS) as ranks:
        # What is stopped can do nothing: the other's error has srun end it. What hangs ends itself.
        codes = dict.fromkeys(range(WORLD_SIZE), LOST)
        del codes[strike.rank]
        if strike.number is None:
            codes = dict.fromkeys(codes, 0) | {strike.rank: TRY_AGAIN_EXIT_CODE}
        for rank, code in codes.items():
            ranks.processes[rank].join(150)
            assert ranks.processes[rank].exitcode == code, ranks.output()
        noticed = Noticed(time.time() - strike.flag.stat().st_mtime, ranks.output())
    done = read_done(folder / "run")
    assert look()
    with start(recipe, folder) as ranks:
        ranks.results()
    assert look()
    assert read_done(folder / "run") == done
    assert set(Counter(done).values()) == {1}, "nothing is done twice"
    return noticed
