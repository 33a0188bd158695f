"""Leaks: a process uses no more resources after many batches, loaders and saves than after a few."""

import json
import multiprocessing
import os
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.fault_log import record_fault
from support.interruptions import output, run_settings, start_and_wait
from support.random_shards import write_random_shards
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder
from dreamdance.recipe.sections import Shards
from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.objectives.geometry import GeometryObjective

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WIDTH, HEIGHT, NUM_FRAMES, MICRO_BATCH = 128, 192, 4, 2
BATCH_MIB = MICRO_BATCH * NUM_FRAMES * 12 * WIDTH * HEIGHT * 4 / 2**20  # of rgb, pose, normal and depth
NUM_LOADERS, NUM_STEPS = 4, 24
NUM_SAVES, FEW_SAVES = 40, 10


@dataclass(frozen=True)
class Resources:
    """The resources of a process.

    Attributes:
        descriptors: number of open file descriptors.
        threads: number of threads.
        children: number of running child processes of multiprocessing.
        mappings: number of mapped files in /dev/shm, which remain after the process is killed.
        resident_mib: resident memory in MiB.
    """

    descriptors: int
    threads: int
    children: int
    mappings: int
    resident_mib: float


def resources_of(process: int | str) -> Resources:
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Resources(
        descriptors=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        children=len(multiprocessing.active_children()),
        mappings=(folder / "maps").read_text().count(" /dev/shm/"),
        resident_mib=int(status["VmRSS"].split()[0]) / 1024,
    )


def load_much(ranks: Ranks, *, shards: str) -> dict[str, Any]:
    """The resources of this process after each of several loaders, and of both it and a worker in the last one."""
    clips = ClipDataset(
        Shards(local=shards), width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, cache_bytes=0, ranks=ranks
    )
    order = ClipOrder(clips.index.samples_per_shard, batch_size=2 * MICRO_BATCH, seed=3)
    after, within, worker = [], [], []
    for number in range(NUM_LOADERS):
        loader = ClipLoader(clips, order, micro_batch_size=MICRO_BATCH, ranks=ranks, num_workers=2)
        steps = iter(loader)
        for _ in islice(steps, NUM_STEPS if number == NUM_LOADERS - 1 else 3):
            if loader.step in (NUM_STEPS // 4, NUM_STEPS):
                within.append(asdict(resources_of("self")))
                worker.append(asdict(resources_of(multiprocessing.active_children()[0].pid)))
        steps.close()
        after.append(asdict(resources_of("self")))
    return {"after": after, "within": within, "worker": worker}


def assert_no_more(late: dict[str, Any], early: dict[str, Any], *, mib: float) -> None:
    for name in ("descriptors", "threads", "children", "mappings"):
        assert late[name] <= early[name], f"{name}: {early} -> {late}"
    assert late["resident_mib"] < early["resident_mib"] + mib, f"{early} -> {late}"


def test_many_loaders_and_many_batches_leak_nothing(tmp_path):
    write_random_shards(tmp_path / "shards", 8)
    (held,) = run_ranks(load_much, 1, tmp_path / "ranks", shards=str(tmp_path / "shards"))
    num_batches = 2 * (NUM_STEPS - NUM_STEPS // 4)
    some_batches = num_batches * BATCH_MIB / 3
    assert some_batches > 40, "a leak must be larger than the memory that the allocator keeps"
    after = held["after"]
    assert after[-1]["children"] == after[-1]["mappings"] == 0
    assert_no_more(after[-1], after[0], mib=some_batches)
    for early, late in (held["within"], held["worker"]):
        assert_no_more(late, early, mib=some_batches)
    record_fault(
        "long run: many batches",
        how=f"{NUM_LOADERS} loaders of 2 workers; {num_batches} batches of {BATCH_MIB:.0f} MiB in between",
        promised="no more descriptors, threads, processes, shared memory or memory than early on, in reader and worker",
        happened=f"descriptors {after[0]['descriptors']} -> {after[-1]['descriptors']}, "
        f"threads {after[0]['threads']} -> {after[-1]['threads']}, no process, nothing in /dev/shm, "
        f"memory {after[0]['resident_mib']:.0f} -> {after[-1]['resident_mib']:.0f} MiB",
    )


@dataclass(frozen=True)
class Counted:
    """Every rank records its resources in each training forward pass."""

    run: Path

    def prepare(self, ranks: Ranks) -> None:
        notes = (self.run / f"held_{ranks.rank}.jsonl").open("w", encoding="utf-8")

        def note(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, GeometryObjective) and module.training:
                notes.write(json.dumps(asdict(resources_of("self"))) + "\n")
                notes.flush()

        register_module_forward_pre_hook(note)


def test_a_training_holds_no_more_after_many_saves_than_after_a_few(shards, tmp_path):
    run = tmp_path / "run"
    changes = {
        "max_steps": NUM_SAVES,
        "checkpoint.every_steps": 1,
        "data.num_workers": 1,
        "batch_size": 1,
        "cluster.tasks_per_node": 1,
        "validation.loss_every_steps": 100,
    }
    recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
    assert start_and_wait(recipe, run, Counted(run)) == [0], output(run)
    held = [json.loads(line) for line in (run / "held_0.jsonl").read_text().splitlines()]
    assert len(held) == NUM_SAVES
    early, late = held[2:FEW_SAVES], held[-FEW_SAVES:]
    # A save is finished in the background: its resources differ between measurements.
    for name in ("descriptors", "threads", "children", "mappings"):
        assert min(one[name] for one in late) <= max(one[name] for one in early), name
        assert max(one[name] for one in late) <= max(one[name] for one in early) + 2, name
    saved_mib = sum(path.stat().st_size for path in checkpoint_folder(run, NUM_SAVES).rglob("*")) / 2**20
    grown_mib = late[-1]["resident_mib"] - early[-1]["resident_mib"]
    assert grown_mib < saved_mib * (NUM_SAVES - FEW_SAVES) / 3, f"{grown_mib} MiB; a checkpoint has {saved_mib}"
    record_fault(
        "long run: many saves",
        how=f"a save after each of {NUM_SAVES} steps, {saved_mib:.1f} MiB each",
        promised=f"no more descriptors, threads, processes, shared memory or memory than after {FEW_SAVES}",
        happened=f"descriptors {early[-1]['descriptors']} -> {late[-1]['descriptors']}, "
        f"threads {early[-1]['threads']} -> {late[-1]['threads']}, memory {grown_mib:+.1f} MiB",
    )
