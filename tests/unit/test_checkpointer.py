"""A checkpoint counts only if complete and undamaged, is restored bit for bit, and never runs code."""

import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from support.fault_log import record_fault
from support.recipes import tiny_stage1_recipe, tiny_unet_config

from dreamdance.errors import CheckpointError
from dreamdance.recipe.schema import Stage1Recipe
from dreamdance.runs.files import hash_file
from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder, step_folders
from dreamdance.runtime.process_group import process_group, repeatable_arithmetic
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.checkpointing.complete_file import FileRecord
from dreamdance.training.checkpointing.rank_file import generator_states, restore_generators
from dreamdance.training.inputs import PreparedInputs
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import build_trainer, train
from dreamdance.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

RANK_FILE = "rank_00000.safetensors"  # masters, moments, average and the generators
STATE_FILE = "state.json"  # position in the data, and state of the guard
FILES = [RANK_FILE, STATE_FILE]


def make_recipe(shards: Path, **changes: object) -> Stage1Recipe:
    return tiny_stage1_recipe(
        str(changes.pop("train", "domains")),
        {
            "data.train.local": str(shards / "train"),
            "data.validation.local": str(shards / "validation"),
            "data.num_workers": 0,
            "max_steps": 4,
            "checkpoint.every_steps": 2,
            "checkpoint.keep_last": 2,
            "optimizer.ema_decay": 0.5,
            "validation.num_sample_clips": 1,
            "sampling.num_inference_steps": 1,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(make_recipe(shards), run)
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def resume(run: Path, recipe: Stage1Recipe) -> Trainer:
    ranks = Ranks()
    with StopRequest() as stop, process_group(ranks, timeout_seconds=60), repeatable_arithmetic(enabled=True):
        trainer = build_trainer(
            stage_of(recipe), run, ranks, stop, Watchdog.from_limits(recipe.cluster), deterministic=True
        )
        trainer.metrics.close()
    return trainer


def recorded(folder: Path, name: str) -> FileRecord:
    """The manifest's record of a file in its present state."""
    path = folder / name
    return FileRecord(name, path.stat().st_size, hash_file(path))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes instead of"),
        (zero, "differs from what was saved (sha256)"),
        (flip_a_bit, "differs from what was saved (sha256)"),
        (delete, "is missing"),
    ],
)
def test_a_damaged_file_is_found_and_named(run, file, damage: Callable[[Path], None], reason):
    folder = checkpoint_folder(run, 4)
    manifest = complete_file.read_manifest(folder)
    assert sorted(record.path for record in manifest.files) == sorted(FILES)
    assert complete_file.find_damage(folder, manifest.files) == []
    damage(folder / file)
    (problem,) = complete_file.find_damage(folder, manifest.files)
    assert problem.startswith(f"step_00000004/{file} ")
    assert reason in problem


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (RANK_FILE, truncate),
        (RANK_FILE, flip_a_bit),
        (RANK_FILE, zero),
        (STATE_FILE, flip_a_bit),
        (COMPLETE_FILE, truncate),
        (COMPLETE_FILE, zero),
        (COMPLETE_FILE, flip_a_bit),
    ],
)
def test_resume_skips_a_damaged_checkpoint_with_the_reason_and_uses_the_one_before(run, shards, caplog, file, damage):
    damage(checkpoint_folder(run, 4) / file)
    with caplog.at_level(logging.INFO):
        trainer = resume(run, make_recipe(shards))
    assert trainer.step == trainer.loader.step == 2
    assert trainer.checkpointer._folders.newest() == "step_00000002", "it does not count as one of those kept"
    assert any(text.startswith(f"skipping checkpoint step_00000004: step_00000004/{file} ") for text in caplog.messages)
    assert any("from step 2 (epoch 0, sample 4 of 10; verified 2 files" in text for text in caplog.messages)
    record_fault(
        f"{file} of the newest checkpoint damaged ({damage.__name__.replace('_', ' ')})",
        how="one byte cut off, all bytes zero, or one bit flipped",
        promised="the next start names what it skips and why, and resumes from the newest that verifies",
        happened="resumed from the one before, 2 steps older",
        steps_lost=2,
    )


@pytest.mark.parametrize("other", [1, 2, 4])
def test_a_checkpoint_of_another_format_is_refused_and_not_skipped(run, shards, monkeypatch, other):
    folder = checkpoint_folder(run, 4)
    sound = complete_file.read_manifest(folder)
    with monkeypatch.context() as version:
        version.setattr(complete_file, "FORMAT", other)
        complete_file.complete(folder, sound)
    if other == 1:  # had no hash of itself
        values = json.loads((folder / COMPLETE_FILE).read_text())
        (folder / COMPLETE_FILE).write_text(json.dumps({key: values[key] for key in values if key != "sha256"}))
    converts = (
        rf"Convert this run's checkpoints by `python tools/convert_checkpoint\.py {run}`, or continue"
        if other == 2
        else "Continue"
    )
    named = (
        rf"step_00000004 was saved by another version of this software: its format is {other}, not 3\. "
        rf"{converts} with .*"
    )
    with pytest.raises(CheckpointError, match=named):
        resume(run, make_recipe(shards))
    assert folder.is_dir()


def test_a_checkpoint_that_lacks_requested_parts_is_refused_naming_them(run, shards):
    folder = checkpoint_folder(run, 4)
    state = json.loads((folder / STATE_FILE).read_text())
    del state["guard"], state["initial_digest"]
    (folder / STATE_FILE).write_text(json.dumps(state))
    files = tuple(recorded(folder, name) for name in FILES)
    complete_file.complete(folder, replace(complete_file.read_manifest(folder), files=files))
    named = r"step_00000004 was saved by another version .* state\.json has no guard, initial_digest\. .* init_from"
    with pytest.raises(CheckpointError, match=named):
        resume(run, make_recipe(shards))


@pytest.mark.parametrize("missing", [[RANK_FILE], FILES])
def test_a_complete_file_whose_files_are_missing_is_skipped_naming_them(run, shards, caplog, missing):
    for file in missing:
        (checkpoint_folder(run, 4) / file).unlink()
    assert resume(run, make_recipe(shards)).step == 2
    (message,) = [text for text in caplog.messages if text.startswith("skipping checkpoint step_00000004: ")]
    assert all(f"{file} is missing" in message for file in missing)
    record_fault(
        "shard file missing" if len(missing) == 1 else "COMPLETE without any of its files",
        how=f"{len(missing)} files of the newest checkpoint deleted",
        promised="the next start names them and resumes from the newest that verifies",
        happened="resumed from the one before, 2 steps older",
        steps_lost=2,
    )


def test_a_file_that_cannot_be_read_counts_as_damaged(run, shards, caplog):
    path = checkpoint_folder(run, 4) / RANK_FILE
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a regular file whose reading gives an I/O error
    assert resume(run, make_recipe(shards)).step == 2
    assert any("skipping checkpoint step_00000004" in text for text in caplog.messages)


def test_a_folder_without_complete_does_not_count_and_is_cleaned_away(run, shards, caplog):
    (checkpoint_folder(run, 4) / COMPLETE_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        trainer = resume(run, make_recipe(shards))
    assert trainer.step == 2
    assert not checkpoint_folder(run, 4).exists()
    assert any("deleting" in text and "step_00000004" in text for text in caplog.messages)


def test_a_wrong_latest_file_is_ignored(run, shards):
    latest = run / "checkpoints" / "latest"
    assert not latest.exists(), "our checkpoints have no such file"
    for text in ("step_00000002", "../../etc", ""):
        latest.write_text(text)
        assert resume(run, make_recipe(shards)).step == 4
    for target in ("step_00000009", "step_00000002"):
        latest.unlink()
        latest.symlink_to(target)
        assert resume(run, make_recipe(shards)).step == 4
    record_fault(
        "`latest` missing, empty, dangling, pointing to an older step or out of the folder",
        how="a file or a link of that name beside the checkpoints",
        promised="the newest checkpoint that verifies is taken",
        happened="step 4 in all cases",
        steps_lost=0,
    )


def test_a_run_whose_checkpoints_lost_their_manifests_is_not_started_over(run, shards):
    for folder in step_folders(run / "checkpoints"):
        (folder / COMPLETE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* or delete that folder to start over"):
        resume(run, make_recipe(shards))
    assert len(step_folders(run / "checkpoints")) == 2, "nothing is deleted"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(run, shards):
    for folder in step_folders(run / "checkpoints"):
        flip_a_bit(folder / RANK_FILE)
    with pytest.raises(
        CheckpointError,
        match=r"every checkpoint in .* is damaged: step_00000004: .*; step_00000002.* delete that folder to start over",
    ):
        resume(run, make_recipe(shards))
    assert len(step_folders(run / "checkpoints")) == 2, "nothing is deleted"
    record_fault(
        "every checkpoint damaged",
        how="one bit flipped in each",
        promised="the run is refused with what is wrong and how to start over, never started over silently",
        happened="CheckpointError naming both, both unchanged",
    )


def test_resumed_state_equals_the_saved_one_bit_for_bit(run, trained, shards):
    trainer = resume(run, make_recipe(shards))
    saved = load_file(checkpoint_folder(trained, 4) / RANK_FILE)
    assert trainer.step == 4
    assert trainer.ema.num_updates == 4
    assert trainer.engine.step_counts() == [4.0]
    held = {"master": trainer.engine.masters, **trainer.engine.moments(), "average": trainer.ema.shards}
    assert len(saved) == len(held) * len(trainer.engine.trainable)
    for kind, shards in held.items():
        for name, value in trainer.engine.gather_parameters(shards):
            assert torch.equal(saved[f"{kind}/{name}"], value.flatten()), (kind, name)
            assert value.any() or kind != "average", name
    for name, value in trainer.engine.gather_parameters(trainer.engine.masters):
        assert torch.equal(trainer.engine.trainable[name], value)
    average = read_checkpoint_weights(checkpoint_folder(trained, 4))
    gathered = dict(trainer.engine.gather_parameters(trainer.ema.shards))
    assert average.keys() == trainer.engine.trainable.keys()
    assert all(torch.equal(average[name], gathered[name]) for name in average)


def test_a_checkpoint_of_other_trainable_parameters_is_refused(run, shards):
    with pytest.raises(CheckpointError, match=r"contains other parameters than this recipe trains; \d+ differ"):
        resume(run, make_recipe(shards, **{"model.pose_channels": [8, 24]}))


def test_changed_frozen_weights_are_refused(shards, tmp_path):
    run = tmp_path / "run"
    train(make_recipe(shards, train="temporal", max_steps=2), run)
    other = make_recipe(shards, train="temporal", max_steps=2, seed=1)
    with pytest.raises(CheckpointError, match="the frozen weights are not those"):
        resume(run, other)


@pytest.mark.parametrize("trained_step", ["temporal", "domains"])
def test_a_changed_file_of_the_base_model_is_refused_if_frozen_and_logged_if_trained(
    trained_step, shards, tmp_path, caplog
):
    def download(version: int) -> None:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**tiny_unet_config())
        with torch.no_grad():
            unet.conv_in.weight[0, 0, 0, 0] += version
        unet.save_pretrained(tmp_path / "base")

    run = tmp_path / "run"
    changes = {"train": trained_step, "max_steps": 2, "model.unet": {"path": str(tmp_path / "base")}, "data.height": 32}
    download(1)
    train(make_recipe(shards, **changes), run)
    caplog.clear()
    assert resume(run, make_recipe(shards, **changes)).step == 2
    assert "have changed" not in caplog.text
    download(2)
    if trained_step == "temporal":
        with pytest.raises(CheckpointError, match=r"frozen weights are not those .* files under model\.\*\.path"):
            resume(run, make_recipe(shards, **changes))
    else:
        assert resume(run, make_recipe(shards, **changes)).step == 2
        assert "the weights with which this run began have changed" in caplog.text
    record_fault(
        f"base model's file changed between runs ({'frozen' if trained_step == 'temporal' else 'trained'})",
        how="one weight of the UNet in that folder changed",
        promised="refused where it is frozen; logged where all of it comes from the checkpoint anyway",
        happened="CheckpointError naming the key" if trained_step == "temporal" else "warned, resumed from step 2",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 2), ("bf16", 2), ("bf16", 1), ("fp32", 0)])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_skips_the_update(precision, zero_stage, shards, tmp_path):
    changes = {"precision": precision, "sharding.zero_stage": zero_stage}
    ranks, recipe, run = Ranks(), make_recipe(shards, max_steps=6, **changes), tmp_path / "run"
    with StopRequest() as stop, process_group(ranks, timeout_seconds=60), repeatable_arithmetic(enabled=True):
        trainer = build_trainer(
            stage_of(recipe), run, ranks, stop, Watchdog.from_limits(recipe.cluster), deterministic=True
        )
        parameter = next(iter(trainer.engine.trainable.values()))
        before = {name: value.detach().clone() for name, value in trainer.engine.trainable.items()}
        hook = parameter.register_hook(lambda gradient: gradient * math.inf)
        trainer.inputs = PreparedInputs(iter(trainer.loader), trainer.engine.objective, ranks.device)
        tally = trainer._take_step()
        hook.remove()
        assert tally.is_skipped
        assert math.isfinite(tally.losses.mean)
        assert tally.nonfinite_samples == []
        assert all(torch.equal(value, before[name]) for name, value in trainer.engine.trainable.items())
        assert not trainer._take_step().is_skipped
        trainer.metrics.close()
    record_fault(
        "non-finite gradient",
        how=f"one parameter's gradient times infinity, the loss finite; {precision}, ZeRO {zero_stage}",
        promised="the update is skipped, no weight changes, the next step is applied",
        happened="as promised",
        steps_lost=1,
    )


class Hostile:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("echo never",))


@pytest.mark.parametrize("file", FILES)
def test_nothing_in_a_checkpoint_is_unpickled_into_code(run, shards, file, capfd):
    folder = checkpoint_folder(run, 4)
    torch.save({"extra": Hostile()}, folder / file)
    manifest = complete_file.read_manifest(folder)
    complete_file.complete(
        folder, replace(manifest, files=tuple(recorded(folder, record.path) for record in manifest.files))
    )
    with pytest.raises(CheckpointError, match=rf"{file} is not (in our format|a rank's file of a checkpoint)"):
        resume(run, make_recipe(shards))
    assert "never" not in capfd.readouterr().out, "the code has not run"


def test_the_last_few_and_every_nth_checkpoint_are_kept(shards, tmp_path):
    changes = {"max_steps": 7, "checkpoint.every_steps": 1, "checkpoint.keep_every_steps": 3}
    train(make_recipe(shards, **changes), tmp_path / "run")
    kept = [int(folder.name.removeprefix("step_")) for folder in step_folders(tmp_path / "run" / "checkpoints")]
    assert kept == [3, 6, 7]


def test_global_generators_continue_where_they_were():
    states = generator_states()
    drawn = (torch.rand(3), np.random.normal(size=3), random.gauss(0, 1))
    restore_generators(states)
    again = (torch.rand(3), np.random.normal(size=3), random.gauss(0, 1))
    assert torch.equal(drawn[0], again[0])
    assert np.array_equal(drawn[1], again[1])
    assert drawn[2] == again[2]


def test_the_checkpoint_that_a_start_resumed_from_is_kept_through_all_its_saves(run, shards):
    flip_a_bit(checkpoint_folder(run, 4) / RANK_FILE)
    changes = {"max_steps": 5, "checkpoint.every_steps": 1}
    train(make_recipe(shards, **changes), run)
    kept = [folder.name for folder in step_folders(run / "checkpoints")]
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    for step in (4, 5):
        flip_a_bit(checkpoint_folder(run, step) / RANK_FILE)
    assert resume(run, make_recipe(shards, **changes)).step == 2


def test_a_raised_max_steps_resumes_from_the_last_checkpoint(run, shards):
    train(make_recipe(shards, max_steps=5), run)
    assert step_folders(run / "checkpoints")[-1] == checkpoint_folder(run, 5)
    assert [folder.name for folder in step_folders(run / "exports")] == ["step_00000004", "step_00000005"]
