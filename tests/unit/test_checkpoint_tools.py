"""The commands for checkpoints: conversion of old ones without loss, and export of plain weights from any."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.recipes import tiny_stage1_recipe
from support.tool_modules import load_tool

from dreamdance.errors import CheckpointError
from dreamdance.runs.files import hash_file
from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder, export_folder
from dreamdance.runtime.process_group import process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest
from dreamdance.training.checkpointing.rank_file import Piece, RankFile, generator_states, rank_path
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


convert_tool, export_tool = load_tool("convert_checkpoint"), load_tool("export_checkpoint")


class Output(NamedTuple):
    loss: torch.Tensor


class Affine(torch.nn.Module):
    """An objective of two parameters, and one that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) / 7)
        self.bias = torch.nn.Parameter(torch.tensor([0.5, -0.25]))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> Output:
        return Output((self.weight @ (batch * self.frozen) + self.bias).square().sum())


def states_as_they_were_saved() -> dict[str, Any]:
    """The states of the generators in the old format: tensors among plain numbers."""
    states = generator_states()
    name, keys, *rest = states["numpy"]
    numpy_state = [name, torch.from_numpy(np.asarray(keys)), *rest]
    return {**states, "torch": torch.tensor(states["torch"], dtype=torch.uint8), "numpy": numpy_state}


def save_as_before(engine: Engine, ema: ShardedEma, run: Path) -> Path:
    """Writes a checkpoint as commit 5194bb1 did; DeepSpeed itself writes its files."""
    folder = checkpoint_folder(run, 4)
    folder.mkdir(parents=True)
    engine._engine._copy_recovery_script = lambda folder: None  # it did not write these either
    engine._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    fragments = [[part.name, part.shard, part.offset, part.start, part.length] for part in engine.fragments()]
    average = {"num_updates": ema.num_updates, "shards": ema.shards}
    own = {"ema": average, "fragments": fragments, "generators": states_as_they_were_saved()}
    torch.save(own, folder / "rank_00000.pt")
    (folder / "state.json").write_text(json.dumps({"trainable": {"weight": [2, 3], "bias": [2]}}))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".pt", ".json"))
    records = tuple(FileRecord(name, (folder / name).stat().st_size, hash_file(folder / name)) for name in names)
    with pytest.MonkeyPatch.context() as version:
        version.setattr(complete_file, "FORMAT", 2)
        complete_file.complete(folder, Manifest(4, 1, "digest", records))
    return folder


def content_of(engine: Engine, ema: ShardedEma) -> RankFile:
    shares = {"master": engine.masters, **engine.moments(), "average": ema.shards}
    counts = engine.step_counts()
    pieces = {
        part.name: Piece(part.start, {kind: part.of(share) for kind, share in shares.items()}, counts[part.shard])
        for part in engine.fragments()
    }
    return RankFile.of(pieces, average_updates=ema.num_updates, generators=generator_states())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 2), ("bf16", 1), ("bf16", 2)])
def test_a_converted_checkpoint_equals_a_newly_saved_one_byte_for_byte(precision, zero_stage, steps, tmp_path):
    changes = {"precision": precision, "sharding.zero_stage": zero_stage, "batch_size": 1, "micro_batch_size": 1}
    with process_group(Ranks(), timeout_seconds=60):
        engine = Engine(Affine(), tiny_stage1_recipe(changes=changes), Ranks(), deterministic=True)
        ema = ShardedEma(engine.masters, decay=0.5)
        for number in range(steps):
            batch = torch.tensor([1.0, -2.0, 0.5 * number], dtype=next(iter(engine.trainable.values())).dtype)
            engine.backward(engine.forward(batch).loss)
            assert engine.update(0.1).applied
            ema.update(engine.masters)
        folder = save_as_before(engine, ema, tmp_path / "run")
        state = (folder / "state.json").read_bytes()
        with (tmp_path / "expected").open("wb") as file:
            content_of(engine, ema).write(file)
    with pytest.raises(CheckpointError, match=rf"`python tools/convert_checkpoint\.py {tmp_path / 'run'}`"):
        read_checkpoint_weights(folder)
    for _ in range(2):  # a second conversion has nothing to do
        assert convert_tool.main([str(tmp_path / "run")]) == 0
        assert sorted(path.name for path in folder.iterdir()) == [COMPLETE_FILE, "rank_00000.safetensors", "state.json"]
        assert rank_path(folder, 0).read_bytes() == (tmp_path / "expected").read_bytes()
        assert (folder / "state.json").read_bytes() == state
    manifest = complete_file.read_manifest(folder)
    assert (manifest.step, manifest.world_size, manifest.recipe_digest) == (4, 1, "digest")
    assert complete_file.find_damage(folder, manifest.files) == []
    for name, value in read_checkpoint_weights(folder, "master").items():
        assert torch.equal(value.to(engine.trainable[name].dtype), engine.trainable[name])


def test_a_damaged_checkpoint_is_not_converted_and_stays_as_it_is(tmp_path, capsys):
    changes = {"precision": "fp32", "batch_size": 1, "micro_batch_size": 1}
    with process_group(Ranks(), timeout_seconds=60):
        engine = Engine(Affine(), tiny_stage1_recipe(changes=changes), Ranks(), deterministic=True)
        folder = save_as_before(engine, ShardedEma(engine.masters, decay=0.5), tmp_path / "run")
    (folder / "rank_00000.pt").write_bytes(b"")
    before = sorted(folder.rglob("*"))
    assert convert_tool.main([str(tmp_path / "run")]) == 1
    assert "rank_00000.pt has 0 bytes instead of" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    assert convert_tool.main([str(tmp_path / "nowhere")]) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of 2 steps with a checkpoint of each step, and its export."""
    run = tmp_path_factory.mktemp("runs") / "tiny_run"
    changes = {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": 2,
        "checkpoint.every_steps": 1,
        "optimizer.ema_decay": 0.5,
        "validation.num_sample_clips": 1,
        "sampling.num_inference_steps": 1,
    }
    recipe = tiny_stage1_recipe("domains", changes)
    train(recipe, run)
    (run / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    return run


def test_plain_weights_of_any_step_are_one_file_of_whole_parameters(run, tmp_path):
    for words, step, kind in (([], 2, "average"), (["--step", "1", "--weights", "current"], 1, "master")):
        out = tmp_path / f"{kind}.safetensors"
        assert export_tool.main([str(run), str(out), *words]) == 0
        found, expected = load_file(out), read_checkpoint_weights(checkpoint_folder(run, step), kind)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    average, current = load_file(tmp_path / "average.safetensors"), load_file(tmp_path / "master.safetensors")
    assert any(not torch.equal(value, current[name]) for name, value in average.items())


def test_the_exported_last_checkpoint_equals_the_export_of_the_run(run, tmp_path):
    assert export_tool.main([str(run), str(tmp_path / "pipeline")]) == 0
    exported = export_folder(run, 2)
    names = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "pipeline") for path in (tmp_path / "pipeline").rglob("*") if path.is_file()
    )
    for name in names:
        assert (tmp_path / "pipeline" / name).read_bytes() == (exported / name).read_bytes(), name


def test_a_checkpoint_that_cannot_be_exported_is_refused_by_name(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    copy = shutil.copytree(run, tmp_path / "copy")
    rank_path(checkpoint_folder(copy, 2), 0).write_bytes(b"")
    for words, refusal in (
        ([run, tmp_path / "x", "--step", "7"], "no complete checkpoint of step 7; complete steps: 1, 2"),
        ([tmp_path / "there", tmp_path / "x"], "no complete checkpoint; complete steps: none"),
        ([run, tmp_path / "there"], "there exists; give another name"),
        ([copy, tmp_path / "x.safetensors"], "rank_00000.safetensors has 0 bytes instead of"),
    ):
        assert export_tool.main([str(word) for word in words]) == 1
        assert refusal in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
