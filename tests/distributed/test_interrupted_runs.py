"""The promise of contract C8: a run killed at any instant and started again equals an uninterrupted one bit for bit."""

import math
import random
import signal
from collections import Counter

import pytest
import torch
from support.fault_log import record_fault
from support.interruptions import (
    BATCH_SIZE,
    MAX_STEPS,
    WORLD_SIZE,
    assert_same_checkpoint,
    assert_same_export,
    assert_same_tensorboard,
    first_step_after,
    messages,
    run_settings,
    run_with_fault,
    samples_in_order,
    start_and_wait,
    steps_lost,
    without_repeats,
)
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from support.training_scenarios import Fault, Recipe, prepare_and_inspect, run_recorded

from dreamdance.runs.layout import checkpoint_folder, export_folder, step_folders
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights

pytestmark = pytest.mark.distributed


def in_save(step: int, operation: str, *path_contains: str, rank: int = 0) -> Fault:
    return Fault(rank, operation=operation, path_contains=(f"step_{step:08d}", *path_contains))


SAVE_PHASES = {
    "nothing written yet": in_save(2, "open", "rank_00000", "'w'"),
    "a rank's files written, not yet read back": in_save(4, "open", "rank_00001", "'r'", rank=1),
    "every file there, no manifest": in_save(4, "open", "COMPLETE.partial"),
    "the manifest there under its temporary name": in_save(6, "os.rename", "COMPLETE"),
    "complete, an older one half deleted": in_save(2, "shutil.rmtree"),  # in the save of step 6
}


def test_stage_1_killed_many_times_is_bit_identical_to_an_uninterrupted_run(shards, tmp_path):
    recipe = tiny_stage1_recipe("temporal", run_settings(shards))
    micro_batches = BATCH_SIZE // WORLD_SIZE
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_and_wait(recipe, whole) == [0, 0], (whole / "output" / "output_0.txt").read_text()

    step = random.Random(7).randint(1, 2)
    codes = start_and_wait(recipe, broken, Fault(1, forward=step * micro_batches))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL), "the surviving rank must fail by itself"
    endings = {}
    for phase, fault in SAVE_PHASES.items():
        endings[phase] = run_with_fault(recipe, broken, fault)
        codes = endings[phase].codes
        assert codes[fault.rank] == -signal.SIGKILL, (fault, codes)
        assert codes[1 - fault.rank] != 0 or fault.operation == "shutil.rmtree", (fault, codes)
    assert start_and_wait(recipe, broken, Fault(1, signal.SIGUSR2, forward=micro_batches)) == [0, 0]
    assert not export_folder(broken, MAX_STEPS).exists(), "it was asked to stop, so it must not have finished"
    stopped = step_folders(broken / "checkpoints")[-1]
    damaged = next(stopped.glob("rank_00001*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert start_and_wait(recipe, broken) == [0, 0], (broken / "output" / "output_0.txt").read_text()

    texts = messages(broken)
    assert texts[0].startswith("no checkpoint in")
    assert any("resuming" in text and "from step 6 (epoch " in text and "verified" in text for text in texts)
    output = (broken / "output" / "output_0.txt").read_text()
    assert f"skipping checkpoint {stopped.name}: {stopped.name}/{damaged.name} differs" in output
    assert_same_checkpoint(checkpoint_folder(whole, MAX_STEPS), checkpoint_folder(broken, MAX_STEPS))
    assert_same_export(export_folder(whole, MAX_STEPS), export_folder(broken, MAX_STEPS))
    for unbroken, interrupted in zip(samples_in_order(whole), samples_in_order(broken), strict=True):
        assert len(unbroken) == MAX_STEPS * micro_batches
        assert without_repeats(interrupted) == unbroken
    kept = [folder.name for folder in step_folders(broken / "checkpoints")]
    assert kept == ["step_00000006", "step_00000010", "step_00000012"], "the last two, and the one that it resumed from"
    assert_same_tensorboard(whole, broken)
    assert len(list((broken / "tensorboard").iterdir())) > 5, "one file for each start"
    record_fault(
        "TensorBoard after crashes",
        how="a run killed six times, stopped once, one checkpoint damaged",
        promised="steps after the resumed one are removed, no step occurs twice",
        happened="every tag has the steps and values of the uninterrupted run",
    )
    for phase, ending in endings.items():
        record_fault(
            f"killed during a save: {phase}",
            how=f"SIGKILL of rank {SAVE_PHASES[phase].rank} of 2 in this operation",
            promised="this checkpoint or the one before counts; started again, bit-identical to an uninterrupted run",
            happened="the other rank ended by itself; weights, losses and samples bit-identical in the end",
            detected_seconds=ending.detected_seconds,
            resumed_seconds=first_step_after(broken, ending.ended),
            steps_lost=steps_lost(broken, ending.ended),
        )


def test_stage_2_in_bf16_killed_three_times_is_bit_identical_to_an_uninterrupted_run(shards, tmp_path):
    changes = run_settings(shards, precision="bf16", max_steps=4, **{"sharding.gradient_checkpointing": True})
    recipe = tiny_stage2_recipe(changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_and_wait(recipe, whole) == [0, 0], (whole / "output" / "output_0.txt").read_text()
    assert start_and_wait(recipe, broken, Fault(0, forward=6))[0] == -signal.SIGKILL
    assert start_and_wait(recipe, broken, in_save(4, "open", "state.json"))[0] == -signal.SIGKILL
    exporting = Fault(0, operation="os.rename", path_contains=("exports",))
    assert start_and_wait(recipe, broken, exporting)[0] == -signal.SIGKILL
    assert step_folders(broken / "exports") == [], "written, but not yet renamed"
    assert start_and_wait(recipe, broken) == [0, 0]
    assert_same_checkpoint(checkpoint_folder(whole, 4), checkpoint_folder(broken, 4))
    assert_same_export(export_folder(whole, 4), export_folder(broken, 4))
    for unbroken, interrupted in zip(samples_in_order(whole), samples_in_order(broken), strict=True):
        assert without_repeats(interrupted) == unbroken


def test_no_sample_is_repeated_or_skipped_within_an_epoch(shards, tmp_path):
    recipe = tiny_stage1_recipe("domains", run_settings(shards, max_steps=4, **{"checkpoint.every_steps": 3}))
    run = tmp_path / "run"
    assert start_and_wait(recipe, run, Fault(0, forward=8))[0] == -signal.SIGKILL
    assert start_and_wait(recipe, run) == [0, 0]
    seen = Counter((epoch, sample) for rank in samples_in_order(run) for epoch, sample, _ in without_repeats(rank))
    assert set(seen.values()) == {1}
    assert len(seen) == 4 * BATCH_SIZE
    assert len([sample for epoch, sample in seen if epoch == 0]) == 8, "10 clips make two batches of 4 in an epoch"


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The length of the difference of all weights together."""
    return math.sqrt(sum(float((some[name] - others[name]).double().square().sum()) for name in others))


@pytest.mark.parametrize(
    ("precision", "zero_stage", "world_sizes"),
    [("fp32", 2, (1, 4)), ("bf16", 2, (4,)), ("bf16", 1, (1,)), ("fp32", 0, (1,))],
)
def test_another_number_of_ranks_resumes_the_same_values(precision, zero_stage, world_sizes, shards, tmp_path):
    def on(world_size: int, max_steps: int) -> Recipe:
        more = {"sharding.zero_stage": zero_stage, "cluster.tasks_per_node": world_size, "optimizer.decay": "constant"}
        return tiny_stage1_recipe("domains", run_settings(shards, max_steps=max_steps, precision=precision, **more))

    run = tmp_path / "run"
    run_ranks(run_recorded, 2, run / "output", recipe=on(2, 4), run=run)
    folder = checkpoint_folder(run, 4)
    average = read_checkpoint_weights(folder)
    kept = [run_ranks(prepare_and_inspect, 2, run / "kept", recipe=on(2, 6), run=run, steps=0)[0]]
    for world_size in world_sizes:
        found = run_ranks(prepare_and_inspect, world_size, run / "divided", recipe=on(world_size, 6), run=run, steps=0)
        assert all(torch.equal(found[0]["average_gathered"][name], value) for name, value in average.items())
        for name, master in kept[0]["masters_gathered"].items():
            assert torch.equal(found[0]["masters_gathered"][name], master), name
            for rank in found:
                assert torch.equal(rank["weights_before"][name], kept[0]["weights_before"][name]), name
        later, expected = found[0]["weights_one_step_later"], kept[0]["weights_one_step_later"]
        moved = distance(expected, kept[0]["weights_after"])
        # Weights of bf16 differ by whole roundings where a sum has another order.
        assert distance(later, expected) < {"fp32": 1e-5, "bf16": 0.05}[precision] * moved, "one step later"
        assert f"saved by 2 ranks and redistributed over {world_size}" in messages(run)[-1]
