"""An annotator that knows the right answers, notes each search for poses, and kills its process in one of them."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.protocols import Person, PersonPoses
from dreamdance.runtime.ranks import Ranks
from support.faulty_shares import work
from support.true_maps import TrueMaps, open_truth

# In a recipe: `annotators: {pose: "support.killed_search:open_killed"}`.
NAME = f"{__name__}:open_killed"
# A file with a line for each search: the rank and the number of frames.
SEARCHES = "DREAMDANCE_SEARCHES"
# The rank that dies, and the number of frames of the search in which it does; only if `FLAG` does not exist.
DYING_RANK, DEADLY_FRAMES = "DREAMDANCE_DYING_RANK", "DREAMDANCE_DEADLY_FRAMES"
FLAG = "DREAMDANCE_FLAG"


def work_in(ranks: Ranks, *, environment: Mapping[str, str], **arguments: Any) -> None:
    """Runs a task on one rank with further environment variables: the server that forks the ranks has older ones."""
    os.environ.update(environment)
    work(ranks, **arguments)


class KilledSearch:
    """Finds the people of known frames."""

    networks = ()

    def __init__(self, truth: TrueMaps) -> None:
        self._truth = truth

    def find_people(self, rgb: NDArray[np.uint8]) -> list[list[Person]]:
        return self._truth.find_people(rgb)

    def annotate_pose(self, rgb: NDArray[np.uint8], people: list[Person | None]) -> PersonPoses:
        rank = os.environ.get("RANK", "0")
        with Path(os.environ[SEARCHES]).open("a") as searches:
            searches.write(f"{rank} {len(rgb)}\n")
        flag = Path(os.environ[FLAG])
        is_deadly = (rank, str(len(rgb))) == (os.environ[DYING_RANK], os.environ[DEADLY_FRAMES])
        if is_deadly and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._truth.annotate_pose(rgb, people)


def open_killed() -> KilledSearch:
    """The annotator of the folders and the fault that the environment names."""
    return KilledSearch(open_truth())
