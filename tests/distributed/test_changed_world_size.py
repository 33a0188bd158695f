"""4 ranks, then 2, then 3: the same values on the new ranks, the same samples, the same losses to rounding."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.dancer_shards import write_dancer_shards
from support.fault_log import record_fault
from support.interruptions import messages, output, run_settings, start_and_wait
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe
from support.training_scenarios import Recipe, prepare_and_inspect
from torch import Tensor

from dreamdance.errors import RecipeError
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.runs.layout import checkpoint_folder

pytestmark = pytest.mark.distributed

BATCH_SIZE = 12
WORLD_SIZES = (4, 2, 3)
STEPS_EACH = 3
# Largest relative difference of a loss: 17 units in the last place of fp32.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 clips: two batches of 12 in an epoch, with some left over."""
    folder = tmp_path_factory.mktemp("many_shards")
    write_dancer_shards(folder, num_train=30)
    return folder


def make_recipe(shards: Path, world_size: int, max_steps: int) -> Recipe:
    more = {"cluster.tasks_per_node": world_size, "batch_size": BATCH_SIZE, "optimizer.decay": "constant"}
    changes = run_settings(shards, max_steps=max_steps, **more)
    return tiny_stage1_recipe("domains", {**changes, "checkpoint.every_steps": STEPS_EACH, "checkpoint.keep_last": 5})


def consolidated(folder: Path, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Masters, moments and average, assembled from the files of all ranks without code of the library."""
    shapes = json.loads((folder / "state.json").read_text())["trainable"]
    kinds = ("master", "exp_avg", "exp_avg_sq", "average")
    whole = {kind: {name: torch.full(shape, torch.nan).flatten() for name, shape in shapes.items()} for kind in kinds}
    for rank in range(world_size):
        path = folder / f"rank_{rank:05d}.safetensors"
        with safe_open(path, framework="pt") as file:
            pieces = json.loads(file.metadata()["dreamdance"])["pieces"]
        for place, values in load_file(path).items():
            kind, name = place.split("/")
            first = pieces[name][0]
            whole[kind][name][first : first + len(values)] = values
    return {kind: {name: values.reshape(shapes[name]) for name, values in whole[kind].items()} for kind in kinds}


def samples_by_step(run: Path, segments: tuple[int, ...]) -> list[dict[tuple[int, int], float]]:
    """For each step: (epoch, sample id) -> loss, over starts on the given numbers of ranks."""
    records = [
        [json.loads(line) for line in (run / f"record_{rank}.jsonl").read_text().splitlines()]
        for rank in range(max(segments))
    ]
    steps: list[dict[tuple[int, int], float]] = []
    for world_size in segments:
        share = BATCH_SIZE // world_size
        for _ in range(STEPS_EACH):
            taken = [line for rank in range(world_size) for line in records[rank][:share]]
            steps.append({(line["epoch"], line["sample"]): line["loss"] for line in taken})
            for rank in range(world_size):
                del records[rank][:share]
    assert not any(records), "nothing was computed twice"
    return steps


def test_4_then_2_then_3_ranks_train_as_4_do(many_shards, tmp_path):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    all_steps = STEPS_EACH * len(WORLD_SIZES)
    assert start_and_wait(make_recipe(many_shards, WORLD_SIZES[0], all_steps), whole) == [0] * 4, output(whole)
    saved: tuple[int, Path] | None = None
    for segment, world_size in enumerate(WORLD_SIZES):
        last_step = STEPS_EACH * (segment + 1)
        if saved is not None:
            before, folder = saved
            assert_same_values(make_recipe(many_shards, world_size, last_step), changing, folder, before)
        assert start_and_wait(make_recipe(many_shards, world_size, last_step), changing) == [0] * world_size, output(
            changing
        )
        saved = world_size, checkpoint_folder(changing, last_step)

    resumed = [text for text in messages(changing) if text.startswith("resuming")]
    for before, after in pairwise(WORLD_SIZES):
        assert any(f"saved by {before} ranks and redistributed over {after}" in text for text in resumed)
    unbroken = samples_by_step(whole, (WORLD_SIZES[0],) * len(WORLD_SIZES))
    divided = samples_by_step(changing, WORLD_SIZES)
    assert [step.keys() for step in divided] == [step.keys() for step in unbroken]
    seen = Counter(key for step in divided for key in step)
    assert set(seen.values()) == {1}, "no sample is repeated"
    assert len(seen) == BATCH_SIZE * all_steps, "or skipped"
    differences = [
        abs(loss - unbroken[index][key]) / unbroken[index][key]
        for index, step in enumerate(divided)
        for key, loss in step.items()
    ]
    assert max(differences) < ROUNDING
    record_fault(
        "world size changed 4 -> 2 -> 3",
        how="started again on another number of ranks, twice; 12 samples per step",
        promised="same weights, moments and average; no sample repeated or skipped; losses equal to rounding",
        happened=f"values bit-identical to the consolidated ones; losses within {max(differences):.1e} of 4 ranks'",
        steps_lost=0,
    )


def assert_same_values(recipe: Recipe, run: Path, folder: Path, saved_world_size: int) -> None:
    """Checks that the new ranks together hold the values that the old ranks saved, bit for bit."""
    world_size = recipe.cluster.world_size
    longer = recipe.model_copy(update={"max_steps": recipe.max_steps + 1})
    arguments: dict[str, Any] = {"recipe": longer, "run": run, "steps": 0}
    found = run_ranks(prepare_and_inspect, world_size, run / "inspected", **arguments)[0]
    expected = consolidated(folder, saved_world_size)
    gathered = {
        "master": found["masters_gathered"],
        "average": found["average_gathered"],
        "exp_avg": found["moments_gathered"]["exp_avg"],
        "exp_avg_sq": found["moments_gathered"]["exp_avg_sq"],
    }
    for kind, values in expected.items():
        assert values.keys() == gathered[kind].keys()
        assert any(bool(value.any()) for value in values.values()), f"{kind} is not all zero"
        for name, value in values.items():
            assert torch.equal(gathered[kind][name], value), f"{kind} of {name} on {world_size} ranks"


def test_a_number_of_ranks_that_cannot_give_the_batch_is_refused_naming_those_that_can(shards):
    recipe = tiny_stage1_recipe(changes={"batch_size": BATCH_SIZE, "micro_batch_size": 1})
    with pytest.raises(RecipeError, match=r"x 5 processes; numbers of processes that fit: 1, 2, 3, 4, 6, 12 "):
        accumulation_steps(recipe.batch_size, recipe.micro_batch_size, 5)
    record_fault(
        "world size that cannot give the batch",
        how="5 ranks for 12 samples",
        promised="refused, naming the numbers of ranks that can",
        happened="RecipeError naming 1, 2, 3, 4, 6, 12",
    )
