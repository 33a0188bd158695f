"""Runs that are interrupted by a fault and started again, and checks that they end like an uninterrupted run."""

import json
import re
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamdance.runs.layout import progress_file
from support.ranks import StartedRanks
from support.training_scenarios import Recipe, run_recorded

WORLD_SIZE = 2
MAX_STEPS = 12
BATCH_SIZE = 4


def run_settings(shards: Path, **more: Any) -> dict[str, Any]:
    """Changes to a tiny recipe: 12 steps of 4 samples on two ranks, saved every second step, every step reported."""
    return {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": MAX_STEPS,
        "batch_size": BATCH_SIZE,
        "micro_batch_size": 1,
        "cluster.tasks_per_node": WORLD_SIZE,
        "checkpoint.every_steps": 2,
        "checkpoint.keep_last": 2,
        "optimizer.warmup_steps": 3,
        "optimizer.decay": "cosine",
        "optimizer.ema_decay": 0.9,
        "validation.loss_every_steps": 3,
        "validation.sample_every_steps": 100,
        "validation.num_sample_clips": 1,
        "sampling.num_inference_steps": 1,
        "logging.every_steps": 1,
        **more,
    }


def start_and_wait(recipe: Recipe, run: Path, fault: Any = None, **arguments: Any) -> list[int]:
    """Starts a run on as many ranks as its recipe asks for, waits, and returns their exit codes."""
    started = {"recipe": recipe, "run": run, "fault": fault, **arguments}
    with StartedRanks(run_recorded, recipe.cluster.world_size, run / "output", **started) as ranks:
        return ranks.wait()


def output(run: Path, rank: int = 0) -> str:
    """The output of a rank in the last start."""
    return (run / "output" / f"output_{rank}.txt").read_text(errors="replace")


def samples_in_order(run: Path) -> list[list[tuple[int, int, float]]]:
    """For each rank: (epoch, sample id, loss) in the order of computation, over all starts."""
    records = [(run / f"record_{rank}.jsonl").read_text().splitlines() for rank in range(WORLD_SIZE)]
    return [[(line["epoch"], line["sample"], line["loss"]) for line in map(json.loads, record)] for record in records]


def without_repeats(samples: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """The samples in the order of their first computation, without those that a later start computed again."""
    return list(dict.fromkeys(samples))


def assert_same_checkpoint(one: Path, other: Path, *, world_size: int = WORLD_SIZE) -> None:
    """Checks that every tensor and every number of two checkpoints is the same, bit for bit."""
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(other).as_posix() for path in other.rglob("*.safetensors"))
    assert len(names) == world_size
    for name in names:
        first, second = (load_file(folder / name) for folder in (one, other))
        assert first.keys() == second.keys(), name
        for path, value in first.items():
            assert torch.equal(value, second[path]), f"{name}: {path}"
        headers = []
        for folder in (one, other):
            with safe_open(folder / name, framework="pt") as file:
                headers.append(json.loads(file.metadata()["dreamdance"]))
        assert headers[0] == headers[1], f"{name}: pieces, counts of steps, generators"
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, other)]
    assert states[0] == states[1]


def assert_same_export(one: Path, other: Path) -> None:
    """Checks that all weights of two exports are the same, byte for byte."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def assert_same_tensorboard(whole: Path, broken: Path) -> None:
    """Checks that every step occurs once, with the value of the uninterrupted run; only times and saves may differ."""
    boards = [EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}) for run in (whole, broken)]
    for board in boards:
        board.Reload()
    tags = sorted(boards[0].Tags()["scalars"])
    assert tags == sorted(boards[1].Tags()["scalars"])
    for tag in tags:
        one, other = ([(event.step, event.value) for event in board.Scalars(tag)] for board in boards)
        steps = [step for step, _ in other]
        assert len(set(steps)) == len(steps), f"{tag} has a step twice"
        if tag.startswith(("train/", "val/", "optim/")):
            assert one == other, tag
        elif not tag.startswith("perf/checkpoint"):
            assert [step for step, _ in one] == steps, tag
    starts = [event.step for event in boards[1].Tensors("recipe/text_summary")]
    assert len(set(starts)) == len(starts)


def messages(run: Path) -> list[str]:
    """The messages in the progress file, over all starts."""
    return [line["message"] for line in progress(run) if "message" in line]


def fault_time(run: Path, rank: int) -> float:
    """The time of a fault in a forward pass of `rank`: when it last wrote a loss; seconds since 1970."""
    return (run / f"record_{rank}.jsonl").stat().st_mtime


@dataclass(frozen=True)
class FaultyStart:
    """The end of a start in which one rank had a fault.

    Attributes:
        codes: exit codes of all ranks.
        ended: the time at which the last rank ended; seconds since 1970.
        detected_seconds: time from the end of the first rank to the end of the last.
    """

    codes: list[int]
    ended: float
    detected_seconds: float


def run_with_fault(recipe: Recipe, run: Path, fault: Any) -> FaultyStart:
    """Starts a run with a fault in one rank, and measures how long the other ranks run on after that rank ended."""
    started = {"recipe": recipe, "run": run, "fault": fault}
    with StartedRanks(run_recorded, recipe.cluster.world_size, run / "output", **started) as ranks:
        wait([process.sentinel for process in ranks.processes], timeout=240)
        first = time.time()
        codes = ranks.wait()
        ended = time.time()
    return FaultyStart(codes, ended, ended - first)


def progress(run: Path) -> list[dict[str, Any]]:
    """All lines of the progress file, over all starts."""
    return [json.loads(line) for line in progress_file(run).read_text().splitlines()]


def first_step_after(run: Path, moment: float) -> float:
    """Seconds from a moment (seconds since 1970) to the first step that the run reported after it."""
    return min(float(line["time"]) for line in progress(run) if "loss" in line and line["time"] > moment) - moment


def steps_lost(run: Path, moment: float) -> int:
    """The number of steps done before a moment that the next start did again."""
    done = [int(line["done"]) for line in progress(run) if "loss" in line and line["time"] <= moment]
    again = next(int(line["done"]) for line in progress(run) if "message" in line and line["time"] > moment)
    return max(0, (done[-1] if done else 0) - again)


def resumed_step(run: Path) -> int:
    """The step from which the last start resumed; 0 if it started from the beginning."""
    found = [re.search(r" from step ([\d,]+) ", text) for text in messages(run) if text.startswith("resuming")]
    return int(found[-1][1].replace(",", "")) if found and found[-1] else 0
