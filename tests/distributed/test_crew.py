"""Ranks that share work hear of each other: of one that is slow, dies, never comes, or takes the main rank along."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from support.ranks import StartedRanks, run_ranks

from dreamdance.errors import LostWorkerError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.crew import Crew
from dreamdance.runs.layout import read_done
from dreamdance.runtime.ranks import Ranks

pytestmark = pytest.mark.distributed

SILENCE_SECONDS = 3
DIED = 7
WATCHED = Cluster(step_timeout_seconds=SILENCE_SECONDS, collective_timeout_seconds=60)


def share(ranks: Ranks, *, run: str, seconds: list[float]) -> dict[str, object]:
    """Two pieces of work, the second of which takes as long as is said for each rank."""
    with Crew(ranks, cluster=WATCHED, run_folder=Path(run)) as crew:
        crew.finish(f"first of {ranks.rank}")
        time.sleep(seconds[ranks.rank])
        crew.finish()
        told = crew.gather(f"rank {ranks.rank} was here", on_wait=lambda: None)
        return {"told": told, "through": crew.num_through() if ranks.is_main else None}


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_works_long_at_one_piece_is_waited_for_whichever_it_is(tmp_path, slow):
    seconds = [0.0, 0.0, 0.0]
    seconds[slow] = 2.5 * SILENCE_SECONDS
    results = run_ranks(share, 3, tmp_path / "ranks", run=str(tmp_path), seconds=seconds)
    assert results[0] == {"told": [f"rank {rank} was here" for rank in range(3)], "through": 6}
    assert [result["told"] for result in results[1:]] == [[], []]
    assert read_done(tmp_path) == [f"first of {rank}" for rank in range(3)], "what was there already is not noted"


def exchange_and_fail(ranks: Ranks) -> dict[str, object]:
    """The last rank calls the work off; what all tell is an error on all, the main rank the first to leave."""
    try:
        with Crew(ranks, cluster=WATCHED) as crew:
            at_first = crew.is_called_off() if ranks.is_main else None
            crew.exchange("begin", "")
            if ranks.rank == 2:
                crew.call_off()
            crew.exchange("middle", "")
            called_off = crew.is_called_off()
            told = crew.exchange("end", f"rank {ranks.rank}")
            if not ranks.is_main:
                time.sleep(1.0)
            raise ValueError(" and ".join(told))
    except ValueError as error:
        return {"at_first": at_first, "called_off": called_off, "error": str(error)}


def test_what_all_ranks_exchange_and_that_one_calls_off_is_known_to_all_before_any_leaves(tmp_path):
    results = run_ranks(exchange_and_fail, 3, tmp_path / "ranks")
    assert [result["at_first"] for result in results] == [False, None, None]
    assert [result["called_off"] for result in results] == [True] * 3
    assert [result["error"] for result in results] == ["rank 0 and rank 1 and rank 2"] * 3


def share_with_one_that_dies(ranks: Ranks, *, dying: int) -> str:
    try:
        with Crew(ranks, cluster=WATCHED) as crew:
            crew.finish()
            if ranks.rank == dying:
                time.sleep(2.0)  # the others have met it
                os._exit(DIED)
    except LostWorkerError as error:
        return str(error)
    return "through"


@pytest.mark.parametrize(
    ("dying", "said"),
    [(0, "the main rank is gone"), (1, r"rank 1 has given no sign for \d s: some ranks have not left")],
)
def test_a_rank_that_dies_is_missed_and_what_follows_may_be_tried_again(tmp_path, dying, said):
    with StartedRanks(share_with_one_that_dies, 2, tmp_path, dying=dying) as ranks:
        codes = ranks.wait()
    assert codes[dying] == DIED
    assert codes[1 - dying] == 0, ranks.output()
    told = torch.load(tmp_path / f"result_{1 - dying}.pt", weights_only=True)
    assert re.match(said, told), told


def come_late(ranks: Ranks) -> str:
    if ranks.rank == 1:
        time.sleep(600)
    watched = Cluster(step_timeout_seconds=1, collective_timeout_seconds=SILENCE_SECONDS)
    try:
        with Crew(ranks, cluster=watched) as crew:
            while True:
                crew.pause("a piece is missing")
    except LostWorkerError as error:
        return str(error)


def test_a_rank_that_never_comes_is_given_the_time_of_a_start_and_no_more(tmp_path):
    with StartedRanks(come_late, 2, tmp_path) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == 0, ranks.output()
    told = torch.load(tmp_path / "result_0.pt", weights_only=True)
    assert re.match(r"rank 1 has given no sign for \d s: a piece is missing\. What is done is kept", told), told
