"""Training from stored latents equals training from pixels; ranks share the encoding, which continues after a kill."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.autoencoder_recipes import recipe_with_autoencoder, save_autoencoder
from support.dancer_shards import write_dancer_shards
from support.latents import encode_recipe, with_latents
from support.ranks import StartedRanks, run_ranks
from support.training_scenarios import run_recorded

from dreamdance.recipe.encode_recipe import EncodeRecipe
from dreamdance.runs.array_member import MEMBER
from dreamdance.runs.layout import read_done
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.encoding import encode as encoding

pytestmark = pytest.mark.distributed

NUM_STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dancer_shards(folder, num_train=6, references=3)
    for temporal in (False, True):
        save_autoencoder(folder / f"vae_{temporal}", temporal=temporal)
    return folder


def training_recipe(data: Path, kind: str, **more: Any):
    """Steps of two clips, half of them mirrored; the targets are samples of their distributions."""
    changes = {
        "data.train": {"local": str(data / "train")},
        "data.validation": {"local": str(data / "validation")},
        "data.flip_probability": 0.5,
        "objective.target_latents": "sample",
        "max_steps": NUM_STEPS,
        "batch_size": 2,
        "micro_batch_size": 2,
        "checkpoint.every_steps": NUM_STEPS,
        **({} if kind == "domains" else {"data.num_frames": 2}),
        **more,
    }
    temporal = kind == "stage2"
    vae = data / f"vae_{temporal}"
    return recipe_with_autoencoder(vae, temporal=temporal, train="domains" if temporal else kind, changes=changes)


def encode_and_train(ranks: Ranks, *, encoded: list[EncodeRecipe], recipe, run: Path) -> None:
    """Encodes, then trains, in one process."""
    for each in encoded:
        encoding.encode(each, run.parent / Path(each.output).name)
    run_recorded(ranks, recipe=recipe, run=run)


def train(recipe, run: Path, *encoded: EncodeRecipe) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The loss of every sample, as written, and the exported weights; before, latents are encoded."""
    run_ranks(encode_and_train, 1, run.parent / "ranks", encoded=list(encoded), recipe=recipe, run=run)
    losses = (run / "record_0.jsonl").read_text().splitlines()
    weights = {}
    for file in sorted((run / "exports").rglob("*.safetensors")):
        weights.update({f"{file.parent.name}.{name}": value for name, value in load_file(file).items()})
    return losses, weights


@pytest.mark.parametrize("kind", ["domains", "geometry", "temporal", "stage2"])
def test_losses_and_weights_are_those_of_training_from_pixels_bit_for_bit(data, tmp_path, kind):
    recipe = training_recipe(data, kind)
    exact = encode_recipe(recipe, tmp_path / "latents", flip=True)
    rounded = encode_recipe(recipe, tmp_path / "bf16", flip=True, precision="bf16")
    losses, weights = train(recipe, tmp_path / "pixels" / "run", *([exact, rounded] if kind == "temporal" else [exact]))
    assert len(losses) == 2 * NUM_STEPS
    stored, stored_weights = train(with_latents(recipe, exact.output, {}), tmp_path / "from_latents" / "run")
    assert stored == losses
    assert stored_weights.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(stored_weights[name], value), name
    if kind == "temporal":
        nearly, _ = train(with_latents(recipe, rounded.output, {}), tmp_path / "from_bf16" / "run")
        assert 0 < largest_difference(losses, nearly) < 0.01


def largest_difference(losses: list[str], others: list[str]) -> float:
    """The largest relative difference of a sample's loss."""
    pairs = [(json.loads(one)["loss"], json.loads(other)["loss"]) for one, other in zip(losses, others, strict=True)]
    return max(abs(one - other) / one for one, other in pairs)


def encode_on_ranks(
    ranks: Ranks, *, recipe: EncodeRecipe, run: Path, dies_after: int | None = None, member: str = ""
) -> None:
    """Encodes with other ranks, or as a member of an array; with `dies_after` it is killed at its n-th clip."""
    os.environ[MEMBER] = member
    if dies_after is not None:
        original, count = encoding.Encoder.encode, 0

        def encode_or_die(self, sample_id):
            nonlocal count
            count += 1
            if count == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, sample_id)

        encoding.Encoder.encode = encode_or_die
    encoding.encode(recipe, run)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.mds")} | {
        "index": (folder / "index.json").read_bytes()
    }


def test_two_ranks_and_a_killed_process_give_the_folder_of_one(data, tmp_path):
    recipe = training_recipe(data, "domains")
    alone, shared, killed = (encode_recipe(recipe, tmp_path / name) for name in ("alone", "shared", "killed"))
    run_ranks(encode_on_ranks, 1, tmp_path / "one", recipe=alone, run=tmp_path / "run_alone")
    run_ranks(encode_on_ranks, 2, tmp_path / "ranks", recipe=shared, run=tmp_path / "run_shared")
    with StartedRanks(encode_on_ranks, 1, tmp_path / "one", recipe=killed, run=tmp_path / "run", dies_after=4) as one:
        one.processes[0].join(60)
        assert one.processes[0].exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "index.json").exists()
    kept = tmp_path / "killed" / ".parts" / "0000000" / "shard.00000.mds"
    number = kept.stat().st_ino
    run_ranks(encode_on_ranks, 1, tmp_path / "again", recipe=killed, run=tmp_path / "run")
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone") == contents(tmp_path / "killed")
    found = {path.stat().st_ino for path in (tmp_path / "killed").glob("*.mds")}
    assert number in found, "a part that was complete at the kill is kept, not written again"


def test_two_jobs_of_an_array_share_the_encoding(data, tmp_path):
    recipe = training_recipe(data, "domains")
    alone, shared = (encode_recipe(recipe, tmp_path / name, clips_per_part=1) for name in ("alone", "shared"))
    run_ranks(encode_on_ranks, 1, tmp_path / "one", recipe=alone, run=tmp_path / "run_alone")
    arguments = {"recipe": shared, "run": tmp_path / "run"}
    with (
        StartedRanks(encode_on_ranks, 1, tmp_path / "first", **arguments, member="7_0") as first,
        StartedRanks(encode_on_ranks, 1, tmp_path / "second", **arguments, member="7_1") as second,
    ):
        for process in (*first.processes, *second.processes):
            process.join(60)
            assert process.exitcode == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    done = read_done(tmp_path / "run")
    assert len(done) == len(set(done)), "no part was encoded twice"
