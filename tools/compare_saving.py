"""Measures how long training waits for a checkpoint: with our background save, and with DeepSpeed's own save.

    python tools/compare_saving.py [--parameters 50] [--ranks 2] [--rounds 5] [--csv tools/compare_saving.csv]

Both save the same engine on the same ranks to the same disk, in turn, at step boundaries of a real run of DeepSpeed
with ZeRO-2. DeepSpeed's `engine.save_checkpoint` does not hash its files, sync them to disk or read them back, and it
does not save our average of the weights; our save does all of this. The table also has the time of a step during the
background save, because that save uses part of the machine.
"""

import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Row:
    """Medians over the rounds, each of the slowest rank; `load` is the machine's mean load over the last minute."""

    method: str
    million_parameters: float
    ranks: int
    rounds: int
    megabytes: float
    wait_seconds: float
    first_wait_seconds: float
    total_seconds: float
    step_seconds: float
    step_while_writing_seconds: float
    cores: int
    load: float
    torch: str
    deepspeed: str
    date: str


def main() -> None:
    """Runs both in new processes and prints the table; with --csv, also writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.1, 50], help="millions, one or several sizes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    for millions in arguments.parameters:
        with tempfile.TemporaryDirectory(prefix="compare_saving_") as folder:
            rows += measure(Path(folder), millions, arguments.ranks, arguments.rounds)
    print(table(rows))
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def measure(folder: Path, millions: float, num_ranks: int, rounds: int) -> list[Row]:
    """Measures both methods on the same ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A spawned process tears its interpreter down, under which a thread of gloo may abort it; these end without that.
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=run_rank, args=(rank, num_ranks, port, folder, millions, rounds))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"a rank failed: exit codes {[process.exitcode for process in processes]}")
    return [Row(**row) for row in json.loads((folder / "rows.json").read_text())]


def run_rank(rank: int, num_ranks: int, port: int, folder: Path, millions: float, rounds: int) -> None:
    """Runs one rank of the measurement; the main rank writes the result to a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from dreamdance.runtime.process_group import gather_from_ranks, process_group
    from dreamdance.runtime.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    with process_group(ranks, timeout_seconds=600):
        comparison = Comparison(folder, millions, ranks)
        ours, theirs = [], []
        for number in range(rounds + 1):  # round 0 is the first save of a run, and has a column of its own
            theirs.append(gather_from_ranks(comparison.save_as_deepspeed(number)))
            ours.append(gather_from_ranks(comparison.save_in_background(number)))
        comparison.checkpointer.close()
        if ranks.is_main:
            rows = [comparison.row(name, found) for name, found in (("DeepSpeed", theirs), ("DreamDance", ours))]
            (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))


class Comparison:
    """An engine that trains a stack of linear layers, and two ways to save it."""

    def __init__(self, folder: Path, millions: float, ranks: Any) -> None:
        import torch

        from dreamdance.recipe.schema import Checkpoint
        from dreamdance.training.checkpointing.checkpointer import Checkpointer
        from dreamdance.training.ema import ShardedEma
        from dreamdance.training.engine import Engine
        from dreamdance.training.same_start import weights_digests

        torch.manual_seed(0)
        self.folder, self.ranks = folder, ranks
        width = max(16, round((millions * 1e6 / 8) ** 0.5))
        self.objective = make_objective(width)
        weights = weights_digests(self.objective)
        self.engine = Engine(self.objective, _recipe(ranks.world_size), ranks, deterministic=True)
        self.ema = ShardedEma(self.engine.masters, decay=0.9)
        section = Checkpoint(every_steps=1, keep_last=2)
        self.checkpointer = Checkpointer(
            folder / "run", self.engine, self.ema, ranks, section, recipe_digest="", weights=weights
        )
        self.parameters = sum(parameter.numel() for parameter in self.objective.parameters())
        self.batch = torch.randn(4, width)
        self.step()
        self.checkpointer.reserve()
        self.usual_step = statistics.median(self.step() for _ in range(10))

    def step(self) -> float:
        """Takes one optimizer step; returns its seconds."""
        from torch import distributed as dist

        dist.barrier()
        started = time.perf_counter()
        self.engine.backward(self.engine.forward(self.batch).loss)
        self.engine.update(1e-4)
        self.ema.update(self.engine.masters)
        return time.perf_counter() - started

    def save_as_deepspeed(self, number: int) -> dict[str, float]:
        """Saves with `engine.save_checkpoint`, which returns when everything is written."""
        folder = self.folder / "deepspeed"
        if self.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self.step()
        started = time.perf_counter()
        self.engine._engine.save_checkpoint(str(folder), tag=f"step_{number}")
        seconds = time.perf_counter() - started
        return {"wait": seconds, "total": seconds, "step": self.step(), "bytes": _size(folder)}

    def save_in_background(self, number: int) -> dict[str, float]:
        """Saves with our checkpointer, and trains until the checkpoint counts."""
        from dreamdance.runtime.process_group import gather_from_ranks

        self.step()
        self.checkpointer.begin(number + 1, {})
        meanwhile = [self.step()]
        while any(gather_from_ranks(self.checkpointer.is_writing)):
            meanwhile.append(self.step())
        saved = self.checkpointer.finish()
        times = {"wait": saved.waited_seconds, "total": saved.seconds, "step": statistics.median(meanwhile)}
        return {**times, "bytes": _size(saved.folder)}

    def row(self, method: str, found: list[list[dict[str, float]]]) -> Row:
        """Medians over all rounds except the first."""
        slowest = [{name: max(rank[name] for rank in ranks) for name in ranks[0]} for ranks in found]
        first, later = slowest[0], slowest[1:]
        median = {name: statistics.median(one[name] for one in later) for name in first}
        return Row(
            method=method,
            million_parameters=round(self.parameters / 1e6, 2),
            ranks=self.ranks.world_size,
            rounds=len(later),
            megabytes=round(median["bytes"] / 1e6, 1),
            wait_seconds=round(median["wait"], 4),
            first_wait_seconds=round(first["wait"], 4),
            total_seconds=round(median["total"], 4),
            step_seconds=round(self.usual_step, 4),
            step_while_writing_seconds=round(median["step"], 4),
            cores=os.cpu_count() or 0,
            load=round(os.getloadavg()[0], 1),
            torch=importlib.metadata.version("torch"),
            deepspeed=importlib.metadata.version("deepspeed"),
            date=time.strftime("%Y-%m-%d"),
        )


def _recipe(world_size: int) -> Any:
    from dreamdance.recipe import load_recipe

    path = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "stage1_domains.yaml"
    words = [f"batch_size={world_size}", "micro_batch_size=1", f"cluster.tasks_per_node={world_size}", "precision=fp32"]
    return load_recipe(path, words)


class _Output(NamedTuple):
    loss: Any


def make_objective(width: int) -> Any:
    import torch

    class Objective(torch.nn.Module):
        """Eight square layers; the loss is the mean square of the output."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))

        def forward(self, batch: torch.Tensor) -> _Output:
            return _Output(self.layers(batch).square().mean())

    return Objective()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(rows: list[Row]) -> str:
    """The rows as text, one line for each size and method."""
    lines = [
        f"{'':<12}{'parameters':>12}{'on disk':>12}{'wait':>10}{'first wait':>12}{'total':>10}{'step':>10}"
        f"{'step meanwhile':>16}"
    ]
    for row in rows:
        lines.append(
            f"{row.method:<12}{row.million_parameters:>10.2f} M{row.megabytes:>9.1f} MB{row.wait_seconds:>8.3f} s"
            f"{row.first_wait_seconds:>10.3f} s{row.total_seconds:>8.2f} s{row.step_seconds:>8.3f} s"
            f"{row.step_while_writing_seconds:>14.3f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
