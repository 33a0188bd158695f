"""A save that fails is tried again, or the run ends with the reason and loses nothing; hostile files are not loaded."""

import errno
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.fault_log import record_fault
from support.interruptions import (
    WORLD_SIZE,
    assert_same_checkpoint,
    first_step_after,
    messages,
    output,
    progress,
    resumed_step,
    run_settings,
    start_and_wait,
)
from support.ranks import StartedRanks
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import FailingDisk, Fault, ReadOnlyFolder, Recipe, SlowDisk, SmallDisk, classify_error

from dreamdance.errors import CheckpointError
from dreamdance.runs.files import hash_file
from dreamdance.runs.layout import checkpoint_folder, progress_file, step_folders
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.checkpointing.complete_file import FileRecord

pytestmark = pytest.mark.distributed

MAX_STEPS = 6
MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def recipe(shards: Path) -> Recipe:
    return tiny_stage1_recipe("domains", run_settings(shards, max_steps=MAX_STEPS))


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without any fault."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert start_and_wait(recipe, run) == [0, 0], output(run)
    return run


def test_a_run_without_copies_and_average_continues_after_a_kill_with_the_weights_of_one_with_both(
    shards: Path, whole: Path, tmp_path: Path
) -> None:
    """Neither changes training; an average that is the masters themselves is stored, and not read over them."""
    changes = {"checkpoint.copy_in_memory": False, "optimizer.ema_decay": 0}
    frugal = tiny_stage1_recipe("domains", run_settings(shards, max_steps=MAX_STEPS, **changes))
    run = tmp_path / "run"
    assert start_and_wait(frugal, run, Fault(0, forward=MICRO_BATCHES * 5))[0] == -signal.SIGKILL
    assert start_and_wait(frugal, run) == [0, 0], output(run)
    assert resumed_step(run) in (2, 4)
    expected = read_checkpoint_weights(checkpoint_folder(whole, MAX_STEPS), kind="master")
    for kind in ("master", "average"):
        weights = read_checkpoint_weights(checkpoint_folder(run, MAX_STEPS), kind=kind)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items()), kind


def test_a_disk_that_is_full_for_a_moment_costs_nothing_but_a_warning(recipe, whole, tmp_path):
    run = tmp_path / "run"
    disk = SmallDisk(rank=1, path_contains=("step_00000004", "rank_00001"), times=1)
    assert start_and_wait(recipe, run, disk) == [0, 0], output(run, 1)
    assert "rank_00001.safetensors failed, trying again in 1 s" in output(run, 1)
    assert any(text.startswith("saved step_00000004") for text in messages(run))
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    record_fault(
        "disk full for a moment",
        how="RLIMIT_FSIZE on rank 1 while it writes its part of step 4",
        promised="the part is written again, the run continues",
        happened="warned, written again after 1 s, weights bit-identical",
        steps_lost=0,
    )


def test_a_disk_that_stays_full_ends_the_run_on_all_ranks_and_the_next_start_loses_one_save(recipe, whole, tmp_path):
    run = tmp_path / "run"
    disk = SmallDisk(rank=1, path_contains=("step_00000004", "rank_00001"), times=99)
    assert start_and_wait(recipe, run, disk) == [1, 1]
    fault_time = (checkpoint_folder(run, 4) / "rank_00000.safetensors").stat().st_mtime
    for rank in range(WORLD_SIZE):
        assert "CheckpointError: step_00000004 could not be saved: rank 1: " in output(run, rank)
        assert "File too large" in output(run, rank)
        assert "started again, it continues from step_00000002" in output(run, rank)
    detected = (run / "output" / "output_0.txt").stat().st_mtime - fault_time
    restarted = time.time()
    assert start_and_wait(recipe, run) == [0, 0], output(run)
    assert "from step 2 " in next(text for text in messages(run) if text.startswith("resuming"))
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    record_fault(
        "disk full",
        how="RLIMIT_FSIZE on rank 1 from its part of step 4 on",
        promised="the run ends on all ranks with the reason; older checkpoints intact; started again, nothing is lost",
        happened="three attempts, then a CheckpointError that names rank and reason; weights bit-identical in the end",
        detected_seconds=detected,
        resumed_seconds=first_step_after(run, restarted),
        steps_lost=4 - resumed_step(run),
    )


@pytest.mark.parametrize(
    ("rank", "path", "number", "text"),
    [
        (0, ".writable", errno.ESTALE, "checkpoints cannot be saved: [Errno 116] Stale file handle"),
        (1, "rank_00001", errno.EIO, "could not be saved: rank 1: [Errno 5] Input/output error"),
    ],
)
def test_a_storage_error_is_transient_on_every_rank(rank, path, number, text, recipe, tmp_path):
    run = tmp_path / "run"
    fault = FailingDisk(rank, (str(run), path), number)
    with StartedRanks(classify_error, WORLD_SIZE, tmp_path / "output", recipe=recipe, run=run, fault=fault) as ranks:
        judged = ranks.results()
    assert not any(one["is_users"] for one in judged), "the job must be requeued"
    assert all(text in one["text"] for one in judged)
    record_fault(
        f"storage error {'at the start' if path == '.writable' else 'in a save'} ({errno.errorcode[number]})",
        how=f"every open of a file fails on rank {rank}",
        promised="the run ends on all ranks with the reason, which does not count as an error of the user",
        happened=text,
    )


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_skipped(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))
    shutil.copytree(checkpoint_folder(whole, MAX_STEPS - 2), checkpoint_folder(run, MAX_STEPS - 2))
    longer = recipe.model_copy(update={"max_steps": MAX_STEPS + 1})
    disk = FailingDisk(1, (f"{checkpoint_folder(run, MAX_STEPS)}/",), errno.EIO, times=1)
    assert start_and_wait(longer, run, disk) == [0, 0], output(run)
    assert resumed_step(run) == MAX_STEPS
    assert "failing to open" in output(run, 1)
    assert "skipping checkpoint" not in output(run)


def test_training_continues_while_a_slow_disk_takes_a_checkpoint_and_the_next_save_waits_for_it(
    recipe, whole, tmp_path
):
    run = tmp_path / "run"
    fourth_step = SlowDisk(path_contains=("step_00000002", "rank_00000"), forward=4 * MICRO_BATCHES)
    assert start_and_wait(recipe, run, fourth_step) == [0, 0], output(run)
    lines = [line["done"] if "loss" in line else line["message"] for line in progress(run)]
    first_saves = [index for index, text in enumerate(lines) if str(text).startswith("saved step_0000000")]
    assert lines.index(3) < first_saves[0] < first_saves[1], "step 3 was trained before the save of step 2 was complete"
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(run, MAX_STEPS))


@pytest.mark.parametrize("forward", [0, 8])
def test_a_folder_that_cannot_be_written_ends_the_run_on_all_ranks_with_its_name(forward, recipe, tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    began = time.time()
    try:
        assert start_and_wait(recipe, run, ReadOnlyFolder(checkpoints, forward)) == [1, 1]
        complete = [folder.name for folder in step_folders(checkpoints)]
    finally:
        checkpoints.chmod(0o755)
    for rank in range(WORLD_SIZE):
        assert "checkpoints cannot be saved: [Errno 13] Permission denied" in output(run, rank)
        assert str(checkpoints) in output(run, rank)
    assert complete == ([] if forward == 0 else ["step_00000002"])
    assert forward or not progress_file(run).exists(), "no step was lost"
    record_fault(
        "read-only checkpoint folder" + (" at the start" if forward == 0 else " in the middle"),
        how="mode 0555, and root without its capabilities",
        promised="refused by name before the first step; in the middle, at the next save; older checkpoints intact",
        happened="CheckpointError on all ranks",
        detected_seconds=time.time() - began if forward == 0 else None,
        steps_lost=None if forward == 0 else 2,
    )


class Hostile:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def replace_by_code(folder: Path, name: str, trace: Path) -> None:
    """Replaces a file of a checkpoint by code, and changes the manifest so that it agrees."""
    path = folder / name
    torch.save({"extra": Hostile(trace)}, path)
    manifest = complete_file.read_manifest(folder)
    files = [record for record in manifest.files if record.path != name]
    record = FileRecord(name, path.stat().st_size, hash_file(path))
    complete_file.complete(folder, replace(manifest, files=(*files, record)))


@pytest.mark.parametrize("world_size", [2, 1])
def test_code_in_one_ranks_file_is_refused_in_resume_on_any_number_of_ranks(world_size, recipe, whole, tmp_path):
    name = "rank_00001.safetensors"
    run = tmp_path / "run"
    folder = checkpoint_folder(run, MAX_STEPS)
    shutil.copytree(checkpoint_folder(whole, MAX_STEPS), folder)
    trace = tmp_path / "trace"
    replace_by_code(folder, name, trace)
    cluster = recipe.cluster.model_copy(update={"tasks_per_node": world_size})
    codes = start_and_wait(recipe.model_copy(update={"max_steps": MAX_STEPS + 1, "cluster": cluster}), run)
    assert 0 not in codes
    assert f"CheckpointError: {folder / name} is not a rank's file of a checkpoint" in output(run, world_size - 1)
    with pytest.raises(CheckpointError, match="is not a rank's file of a checkpoint"):
        read_checkpoint_weights(folder)
    assert not trace.exists(), "the code has not run"
    record_fault(
        f"hostile pickle in {name} (resume on {world_size} of 2 ranks)",
        how="an object that calls os.system, with a manifest that agrees",
        promised="refused with a clear error, the code does not run",
        happened="CheckpointError naming the file",
    )
