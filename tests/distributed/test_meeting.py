"""Ranks connect to ranks of their own job only, whatever other process uses the port that their job has chosen."""

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
    """Sums over the ranks of a job; the last rank joins only when a file exists."""
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


def test_two_jobs_with_the_same_port_do_not_mix_their_ranks(tmp_path):
    port, everybody = free_port(), tmp_path / "everybody may come"
    with StartedRanks(meet, 2, tmp_path / "first", start="first", port=port, last_waits_for=everybody) as first:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # answers when rank 0 listens

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
        "two jobs choose the same port of a node",
        how="ranks of a second job connect to rank 0 of the first job before its own ranks",
        promised="neither job accepts ranks of the other; the later one names the port and chooses another",
        happened="the first job summed over its own ranks, the second named the port",
    )
