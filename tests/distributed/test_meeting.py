"""How ranks find one another: only their own, whatever else listens or knocks at the port that their job has drawn."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from support.fault_log import record_fault
from support.ranks import StartedRanks
from torch import distributed as dist

from dreamdance.launch.job import free_port
from dreamdance.runtime.process_group import process_group, sum_over_ranks
from dreamdance.runtime.ranks import Ranks

TIMEOUT_SECONDS = 120


def meet(ranks: Ranks, *, start: str, port: int, last_waits_for: Path | None = None) -> float:
    """Sums over the ranks of a job; the last of them comes only when a file is there."""
    if last_waits_for is not None and ranks.rank == ranks.world_size - 1:
        _wait_until(last_waits_for.exists)
    os.environ["MASTER_PORT"] = str(port)
    with process_group(replace(ranks, start=start), timeout_seconds=TIMEOUT_SECONDS):
        return sum_over_ranks(torch.tensor([10.0**ranks.rank])).item()


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_jobs_that_drew_one_port_do_not_take_each_others_ranks_for_their_own(tmp_path):
    port, everybody = free_port(), tmp_path / "everybody may come"
    with StartedRanks(meet, 2, tmp_path / "first", start="first", port=port, last_waits_for=everybody) as first:
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=False, wait_for_workers=False
        )  # answers when rank 0 is there

        def has_come(start: str) -> bool:
            return any(key.startswith(f"{start}/") for key in store.list_keys())

        _wait_until(lambda: has_come("first"))
        with StartedRanks(meet, 2, tmp_path / "second", start="second", port=port) as second:
            second.processes[0].join(TIMEOUT_SECONDS)
            assert second.processes[0].exitcode == 1
            expected = f"UserError: port {port} of {socket.gethostname()} (MASTER_PORT) is taken by another program"
            assert expected in second.output()
            _wait_until(lambda: has_come("second"))
            everybody.touch()
            assert first.results() == [11.0, 11.0]
    record_fault(
        "two jobs draw one port of a node",
        how="ranks of a second job come to the first job's rank 0 before that one's own",
        promised="neither job counts or hears the other's ranks; the later one says so and draws another port",
        happened="the first job summed over its own ranks, the second named the port",
    )
