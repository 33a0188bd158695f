"""Real processes with real process groups, cheap to start: a server that has imported everything forks them."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from dreamdance.launch.job import free_port
from dreamdance.runtime.ranks import START, Ranks

TIMEOUT_SECONDS = 240
PRELOADED = ["torch", "deepspeed", "dreamdance.training.train", __name__]


class StartedRanks:
    """The processes of one group; at the end of the `with` block, all that still run are killed."""

    def __init__(self, target: Callable[..., Any], world_size: int, folder: Path, **arguments: Any) -> None:
        """Calls `target(ranks, **arguments)` in every rank.

        Args:
            target: a function that can be imported by name; torch must be able to save its result without pickled code.
            world_size: number of processes.
            folder: a folder for their output and results.
            arguments: further arguments of `target`.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("result_*.pt"):
            stale.unlink()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.processes: list[BaseProcess] = [
            context.Process(
                target=_run_rank,
                args=(target, Ranks(rank, world_size, rank, str(port)), port, folder, arguments),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "StartedRanks":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid or 0, number)

    def wait(self) -> list[int]:
        """Waits for all ranks and returns their exit codes: -9 for one that was killed.

        Raises:
            TimeoutError: some are still running; the message contains their output.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise TimeoutError(f"{process.name} is still running\n{self.output()}")
        return [process.exitcode or 0 for process in self.processes]

    def output(self) -> str:
        """The output of all ranks."""
        texts = [(path.name, path.read_text(errors="replace")) for path in sorted(self.folder.glob("output_*.txt"))]
        return "\n".join(f"---- {name}\n{text}" for name, text in texts)

    def results(self) -> list[Any]:
        """The result of `target` in each rank, after all ranks have succeeded.

        Raises:
            AssertionError: a rank failed; the message contains the output of all ranks.
        """
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}\n{self.output()}"
        paths = [self.folder / f"result_{rank}.pt" for rank in range(len(self.processes))]
        return [torch.load(path, weights_only=True) for path in paths]


def run_ranks(target: Callable[..., Any], world_size: int, folder: Path, **arguments: Any) -> list[Any]:
    """Starts ranks, waits for them and returns the result of each."""
    with StartedRanks(target, world_size, folder, **arguments) as started:
        return started.results()


def _run_rank(target: Callable[..., Any], ranks: Ranks, port: int, folder: Path, arguments: dict[str, Any]) -> None:
    output = os.open(folder / f"output_{ranks.rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **{START: ranks.start},
    )
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    try:
        result = target(ranks, **arguments)
    except BaseException:  # noqa: BLE001 - the outermost frame of a process
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # as in a crash: the other ranks must notice the loss themselves
    torch.save(result, folder / f"result_{ranks.rank}.pt")
