"""ZeRO on real ranks equals plain training: same losses on any number of ranks, nothing frozen sharded, NaN skipped."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fault_log import record_fault
from support.ranks import StartedRanks, run_ranks
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from support.training_scenarios import Recipe, prepare_and_inspect, run_recorded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamdance.data.loading.batch import collate_clips
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.runs.layout import checkpoint_folder, export_folder, newest_export, progress_file
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.ema import ShardedEma
from dreamdance.training.schedule import learning_rate
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]

BATCH_SIZE = 4
# Largest relative difference of a loss after 20 steps: 17 units in the last place of fp32.
ROUNDING = 2e-6


def settings(shards: Path, *, world_size: int, **more: Any) -> dict[str, Any]:
    return {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": 20,
        "batch_size": BATCH_SIZE,
        "micro_batch_size": 1,
        "cluster.tasks_per_node": world_size,
        "checkpoint.every_steps": 100,
        "optimizer.warmup_steps": 3,
        "optimizer.decay": "linear",
        "optimizer.ema_decay": 0.9,
        "optimizer.gradient_clipping": 0.5,
        "validation.num_loss_clips": 3,
        "validation.num_sample_clips": 2,
        "validation.num_frames": 1,
        "logging.every_steps": 1,
        **more,
    }


def make_recipe(stage: str, shards: Path, *, world_size: int, **more: Any) -> Recipe:
    changes = settings(shards, world_size=world_size, **more)
    if stage == "stage2":
        return tiny_stage2_recipe({"validation.num_frames": 4, **changes})
    return tiny_stage1_recipe(stage, changes)


def losses_of(run: Path, world_size: int) -> list[dict[tuple[int, int], float]]:
    """For each step: (epoch, sample id) -> loss."""
    steps: list[dict[tuple[int, int], float]] = []
    for rank in range(world_size):
        records = [json.loads(line) for line in (run / f"record_{rank}.jsonl").read_text().splitlines()]
        share = BATCH_SIZE // world_size
        for index, record in enumerate(records):
            step = index // share
            steps += [{} for _ in range(step + 1 - len(steps))]
            steps[step][record["epoch"], record["sample"]] = record["loss"]
    return steps


def train_plainly(
    recipe: Recipe, *, micro_batch_size: int
) -> tuple[list[dict[tuple[int, int], float]], dict[str, Any]]:
    """The same training in a few lines of torch, without DeepSpeed; returns losses and the averaged weights."""
    recipe = recipe.model_copy(update={"micro_batch_size": micro_batch_size})
    objective = stage_of(recipe).build()
    names = stage_of(recipe).set_trainable(objective)
    parameters = {name: value for name, value in objective.named_parameters() if name in set(names)}
    section = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": [value], "factor": factor(name, section.lr_scales)} for name, value in parameters.items()],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    ema = ShardedEma([value.data for value in parameters.values()], decay=section.ema_decay)
    losses: list[dict[tuple[int, int], float]] = []
    batches = iter(make_loader(stage_of(recipe), Ranks()))
    for step in range(recipe.max_steps):
        losses.append({})
        micro_batches = next(batches)
        for batch in micro_batches:
            output = objective(batch)
            (output.loss / len(micro_batches)).backward()
            keys = [(epoch, sample) for _, epoch, sample in batch.keys.tolist()]
            losses[-1].update(zip(keys, output.sample_losses.tolist(), strict=True))
        torch.nn.utils.clip_grad_norm_(parameters.values(), section.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(section, step, max_steps=recipe.max_steps)
        optimizer.step()
        optimizer.zero_grad()
        ema.update([value.data for value in parameters.values()])
    return losses, dict(zip(parameters, ema.shards, strict=True))


def factor(parameter: str, scales: dict[str, float]) -> float:
    """What the longest name above a parameter says of its learning rate."""
    above = [name for name in scales if parameter.startswith(f"{name}.")]
    return scales[max(above, key=len)] if above else 1.0


def largest_difference(some: list[dict[Any, float]], others: list[dict[Any, float]]) -> float:
    """The largest relative difference over all samples of all steps."""
    assert [step.keys() for step in some] == [step.keys() for step in others]
    pairs = [(loss, other[key]) for step, other in zip(some, others, strict=True) for key, loss in step.items()]
    return max(abs(loss - other) / abs(other) for loss, other in pairs)


def last_value(run: Path, tag: str) -> float:
    """A scalar of TensorBoard at the last step."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return board.Scalars(tag)[-1].value


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The relative Euclidean distance of all weights together."""
    assert some.keys() == others.keys()
    return math.sqrt(sum(float((some[name] - others[name]).double().square().sum()) for name in some))


@pytest.mark.parametrize(("stage", "world_sizes"), [("domains", (1, 2, 4)), ("temporal", (2,)), ("stage2", (1, 2, 4))])
def test_losses_on_any_number_of_ranks_equal_a_plain_loop_in_one_process(stage, world_sizes, shards, tmp_path):
    frames = {"data.num_frames": 2, "validation.num_frames": 2} if stage == "stage2" else {}
    alone = make_recipe(stage, shards, world_size=1, **frames)
    plain, average = train_plainly(alone, micro_batch_size=BATCH_SIZE)
    split, split_average = train_plainly(alone, micro_batch_size=1)
    assert largest_difference(split, plain) < ROUNDING, (
        "the difference of the plain loop from itself with sums in another order"
    )
    held_out = []
    for world_size in world_sizes:
        recipe = make_recipe(stage, shards, world_size=world_size, **frames)
        run = tmp_path / f"ranks_{world_size}"
        run_ranks(run_recorded, world_size, run / "output", recipe=recipe, run=run)
        assert largest_difference(losses_of(run, world_size), plain) < ROUNDING
        saved = read_checkpoint_weights(checkpoint_folder(run, recipe.max_steps))
        assert distance(saved, average) < 3 * distance(split_average, average)
        held_out.append(last_value(run, "val/loss"))
    assert held_out == pytest.approx([held_out[0]] * len(held_out), rel=ROUNDING), "3 clips leave one of 4 ranks idle"


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("geometry", {}),
        ("geometry", {"precision": "bf16"}),
        ("temporal", {"sharding.zero_stage": 1, "precision": "bf16"}),
        ("temporal", {"sharding.zero_stage": 0}),
        ("stage2", {"model.unfreeze": "none", "sharding.gradient_checkpointing": True}),
    ],
)
def test_only_trained_weights_have_masters_moments_and_averages(stage, more, shards, tmp_path):
    recipe = make_recipe(stage, shards, world_size=2, **more)
    names = stage_of(recipe).set_trainable(objective := stage_of(recipe).build())
    num_trainable = sum(dict(objective.named_parameters())[name].numel() for name in names)
    arguments = {"recipe": recipe, "run": tmp_path / "run", "steps": 2}
    found = run_ranks(prepare_and_inspect, 2, tmp_path / "output", **arguments)

    copies = 2 if recipe.sharding.zero_stage == 0 else 1
    for count in ("num_masters", "num_moments", "num_average"):
        total = sum(rank[count] for rank in found)
        # sharding rounds each rank's partition up to a few elements
        assert copies * num_trainable <= total <= copies * num_trainable + 64, count
    for rank in found:
        assert rank["trainable"] == names
        assert rank["frozen_with_gradient"] == []
        assert set(rank["changed"]) <= set(names)
        assert rank["master_dtypes"] == ["torch.float32"]
    first, second = found
    for name in names:
        assert torch.equal(first["weights_before"][name], second["weights_before"][name]), "ranks agree"
        weights, masters = first["weights_before"][name], first["masters_gathered"][name]
        assert torch.equal(masters.to(weights.dtype), weights), "the weights are the masters, rounded"


@pytest.mark.parametrize(
    "more", [{}, {"precision": "bf16"}, {"sharding.zero_stage": 1, "precision": "bf16"}, {"sharding.zero_stage": 0}]
)
def test_the_weights_are_restored_bit_for_bit_after_the_average_was_used(more, shards, tmp_path):
    recipe = make_recipe("domains", shards, world_size=2, **more)
    arguments = {"recipe": recipe, "run": tmp_path / "run", "steps": 3}
    for rank in run_ranks(prepare_and_inspect, 2, tmp_path / "output", **arguments):
        assert not rank["is_training_in_average"]
        assert rank["is_training_after"]
        for name, weights in rank["weights_before"].items():
            assert torch.equal(rank["weights_after"][name], weights)
        changed = [
            name
            for name, weights in rank["weights_before"].items()
            if not torch.equal(rank["weights_in_average"][name], weights)
        ]
        assert changed, "the average is not the weights"
        moved = [
            name
            for name, weights in rank["weights_after"].items()
            if not torch.equal(rank["weights_one_step_later"][name], weights)
        ]
        assert moved, "training continues from the weights, not from the average"


def test_a_nan_on_one_rank_skips_the_update_on_all_and_names_the_sample(shards, tmp_path):
    recipe = make_recipe("domains", shards, world_size=2, max_steps=4, max_nonfinite_steps=4)
    first_steps = [key for keys in list(samples_in_order(recipe)) for key in keys]
    bad = first_steps[-1]
    run = tmp_path / "run"
    run_ranks(run_recorded, 2, run / "output", recipe=recipe, run=run, poisoned=(bad[1],))
    reports = [text for text in messages(run) if "not finite" in text]
    assert any(f"sample {bad[1]} of epoch {bad[0]} (clip dancer_{bad[1]})" in text for text in reports), reports
    assert all("update skipped on all ranks" in text for text in reports)
    state = json.loads((checkpoint_folder(run, 4) / "state.json").read_text())
    assert len(state["guard"]["nonfinite_steps"]) == len(reports) > 0
    assert all(bool(value.isfinite().all()) for value in read_checkpoint_weights(checkpoint_folder(run, 4)).values())
    assert export_folder(run, 4).is_dir()
    record_fault(
        "non-finite loss",
        how="the pose of one sample is NaN, on one of two ranks",
        promised="the update is skipped on all ranks and reported with the sample; the run continues",
        happened=f"{len(reports)} of 4 updates skipped, the sample named, all weights finite",
        steps_lost=len(reports),
    )


def test_too_many_nan_steps_end_the_run_with_the_samples_and_the_key_to_change(shards, tmp_path):
    recipe = make_recipe("domains", shards, world_size=2, max_steps=4, max_nonfinite_steps=1)
    run = tmp_path / "run"
    everything = tuple(range(10))
    with StartedRanks(run_recorded, 2, run / "output", recipe=recipe, run=run, poisoned=everything) as ranks:
        assert 0 not in ranks.wait()
        output = ranks.output()
    assert "UserError: step 2: update skipped on all ranks (2 within 100 steps), not finite: sample" in output
    assert "That is more than max_nonfinite_steps=1" in output
    record_fault(
        "non-finite losses again and again",
        how="every sample's pose is NaN; max_nonfinite_steps=1",
        promised="the run ends on all ranks at one more than allowed, with samples and the key to change",
        happened="UserError on both ranks at the second",
    )


def test_scaled_learning_rates_train_as_a_plain_loop_does_and_resume_on_fewer_ranks(shards, tmp_path):
    scales = {"unet": 0.5, "unet.domain_embedder": 10.0}
    more = {"optimizer.lr_scales": scales, "optimizer.decay": "constant"}
    whole = make_recipe("domains", shards, world_size=1, **more)
    _, average = train_plainly(whole, micro_batch_size=BATCH_SIZE)
    _, split_average = train_plainly(whole, micro_batch_size=1)
    _, unscaled = train_plainly(make_recipe("domains", shards, world_size=1), micro_batch_size=BATCH_SIZE)
    run = tmp_path / "run"
    for world_size, max_steps in ((2, 10), (1, 20)):
        recipe = make_recipe("domains", shards, world_size=world_size, max_steps=max_steps, **more)
        run_ranks(run_recorded, world_size, run / f"output_{world_size}", recipe=recipe, run=run)
    saved = read_checkpoint_weights(checkpoint_folder(run, 20))
    assert distance(saved, average) < 3 * distance(split_average, average)
    assert distance(saved, unscaled) > 1000 * distance(saved, average)
    assert last_value(run, "optim/lr_unet.domain_embedder") == pytest.approx(10 * recipe.optimizer.lr)
    assert last_value(run, "optim/lr_unet") == pytest.approx(0.5 * recipe.optimizer.lr)
    assert last_value(run, "optim/lr") == pytest.approx(recipe.optimizer.lr)


def test_losses_and_samples_of_held_out_clips_are_the_same_bits_on_any_number_of_ranks(shards, tmp_path):
    samples, losses = {}, {}
    for world_size in (1, 3):
        run = tmp_path / f"on_{world_size}"
        run.mkdir()
        changes = {"batch_size": 3, "validation.num_loss_clips": 4, "validation.num_sample_clips": 4}
        recipe = make_recipe("domains", shards, world_size=world_size, **changes)
        arguments = {"recipe": recipe, "run": run, "steps": 0}  # untrained: training rounds by the number of ranks
        found = run_ranks(prepare_and_inspect, world_size, tmp_path / f"output_{world_size}", **arguments)
        samples[world_size] = {name: clip for rank in found for name, clip in rank["samples"].items()}
        losses[world_size] = sum(rank["losses"] for rank in found)
        for rank in found:
            assert rank["encodings"] == len(rank["clips"]), "each clip is encoded once for its 8 noise levels"
    assert losses[1].any()
    assert torch.equal(losses[1], losses[3])
    assert samples[1].keys() == samples[3].keys()
    for name, clip in samples[1].items():
        assert all(torch.equal(values, samples[3][name][key]) for key, values in clip.items())


@pytest.mark.parametrize(
    ("stage", "precision"), [("temporal", "fp32"), ("domains", "bf16"), ("stage2", "fp32"), ("stage2", "bf16")]
)
def test_from_pretrained_reproduces_the_runs_own_samples_bit_for_bit(stage, precision, shards, tmp_path):
    recipe = make_recipe(stage, shards, world_size=2, precision=precision, max_steps=3)
    run = tmp_path / "run"
    run_ranks(run_recorded, 2, run / "output", recipe=recipe, run=run)
    # A run that is at its last step only draws samples from its last checkpoint.
    arguments = {"recipe": recipe, "run": run, "steps": 0}
    found = run_ranks(prepare_and_inspect, 2, tmp_path / "output", **arguments)
    own = found[0]["samples"] | found[1]["samples"]
    assert not set(found[0]["samples"]) & set(found[1]["samples"]), "each clip is sampled once"
    assert not set(found[0]["clips"]) & set(found[1]["clips"]), "each clip's loss is computed once"

    kind = AnimationPipeline if stage == "stage2" else GeometryPipeline
    dtype = {"torch_dtype": torch.bfloat16} if precision == "bf16" else {}
    pipeline = kind.from_pretrained(newest_export(run), **dtype)
    by_default = (pipeline.config.default_height, pipeline.config.default_width)
    assert by_default == (recipe.data.height, recipe.data.width)
    clips = fixed_clips(
        recipe.data.validation,
        width=recipe.data.width,
        height=recipe.data.height,
        num_frames=recipe.validation.num_frames,
        count=recipe.validation.num_sample_clips,
    )
    objective = stage_of(recipe).build()
    objective.make_pipeline = lambda: pipeline
    assert own.keys() == {clip.clip_id for clip in clips}
    for clip in clips:
        theirs = stage_of(recipe).predict(objective, collate_clips([clip]))
        assert own[clip.clip_id].keys() == theirs.keys()
        for name, frames in theirs.items():
            assert torch.equal(own[clip.clip_id][name], frames), name
    assert (run / "samples" / "step_00000003.png").is_file()


def samples_in_order(recipe: Recipe) -> Iterator[list[tuple[int, int]]]:
    """(epoch, sample id) of each step."""
    loader = make_loader(stage_of(recipe.model_copy(update={"micro_batch_size": BATCH_SIZE})), Ranks())
    for step in range(recipe.max_steps):
        yield [(key.epoch, key.sample_id) for key in loader.order.batch(step)]


def messages(run: Path) -> list[str]:
    lines = [json.loads(line) for line in progress_file(run).read_text().splitlines()]
    return [line["message"] for line in lines if "message" in line]
