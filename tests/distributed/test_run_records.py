"""Records of a short real run for people: every promised number in TensorBoard, pictures, progress, recipe."""

import io
import json
import math
import stat
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from support.training_scenarios import Recipe, run_recorded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamdance.recipe.schema import Stage1Recipe
from dreamdance.runs.layout import export_folder, newest_export, progress_file, step_name
from dreamdance.training.planning.step_cost import count_recipe
from dreamdance.training.schedule import learning_rate

pytestmark = pytest.mark.distributed

MAX_STEPS = 3
# What the files of samples with another person's reference end with.
OTHER_REFERENCE = "_other_reference"
UMASKS = {"stage1": 0o022, "stage2": 0o027}
SCALARS = {
    "train/loss", "optim/lr", "optim/grad_norm", "perf/samples_per_second", "perf/step_seconds",
    "perf/data_wait_share", "perf/data_wait_milliseconds", "perf/host_milliseconds", "perf/tflops",
    "perf/memory_gib", "val/loss",
    "perf/checkpoint_seconds", "perf/checkpoint_wait_seconds",
}  # fmt: skip


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def finished(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(recipe, run folder, TensorBoard) of a run of three steps in one process."""
    changes = {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": MAX_STEPS,
        "batch_size": 2,
        "micro_batch_size": 1,
        "optimizer.warmup_steps": 2,
        "validation.loss_every_steps": 2,
        "validation.sample_every_steps": 2,
        "validation.num_sample_clips": 2,
        "validation.num_cross_clips": 1,
        "validation.num_frames": 4,
        "sampling.num_inference_steps": 1,
        "logging.every_steps": 1,
    }
    defaults = {"objective.reference_first": True, "objective.fps": 7.0}  # the tiny recipe of stage 2 has others
    recipe = (
        tiny_stage1_recipe("temporal", changes) if request.param == "stage1" else tiny_stage2_recipe(changes | defaults)
    )
    run = tmp_path_factory.mktemp("runs") / request.param
    output = tmp_path_factory.mktemp("output")
    run_ranks(run_recorded, 1, output, recipe=recipe, run=run, umask=UMASKS[request.param])
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    board.Reload()
    return recipe, run, board


def scalars(board: EventAccumulator, tag: str) -> dict[int, float]:
    events = board.Scalars(tag)
    assert len({event.step for event in events}) == len(events), f"{tag} has a step twice"
    return {event.step: event.value for event in events}


def test_every_promised_number_is_there_for_every_step(finished: tuple[Recipe, Path, EventAccumulator]) -> None:
    recipe, _, board = finished
    domains = ("rgb", "normal", "depth") if isinstance(recipe, Stage1Recipe) else ("rgb",)
    of_domains = {f"{part}/loss_{domain}" for part in ("train", "val") for domain in domains}
    # the quartiles of 1,000 timesteps, and of exp(normal(0.7, 1.6))
    levels = ("timestep_250", "timestep_750") if isinstance(recipe, Stage1Recipe) else ("sigma_0.684", "sigma_5.93")
    scores = {"samples/l1_rgb", "samples/psnr_rgb"}
    if isinstance(recipe, Stage1Recipe):
        scores |= {"samples/l1_depth", "samples/normal_degrees_body"}
    expected = SCALARS | of_domains | scores | {f"val_by_noise/{level}" for level in levels}
    assert set(board.Tags()["scalars"]) == expected
    for tag in board.Tags()["scalars"]:
        found = scalars(board, tag)
        # Held-out losses and samples every second step and at the last; the only checkpoint is that of the last step.
        steps = (
            [2, 3] if tag.startswith(("val", "samples")) else [3] if tag.startswith("perf/checkpoint") else [1, 2, 3]
        )
        assert list(found) == steps, tag
        assert all(math.isfinite(value) for value in found.values()), tag


def test_numbers_have_the_meaning_of_their_tags(finished: tuple[Recipe, Path, EventAccumulator]) -> None:
    recipe, run, board = finished
    rates = [learning_rate(recipe.optimizer, step, max_steps=MAX_STEPS) for step in range(MAX_STEPS)]
    assert list(scalars(board, "optim/lr").values()) == pytest.approx(rates, rel=1e-6)
    assert min(scalars(board, "optim/grad_norm").values()) > 0
    assert all(0 <= share <= 1 for share in scalars(board, "perf/data_wait_share").values())
    assert all(0.05 < memory < 64 for memory in scalars(board, "perf/memory_gib").values())
    lines = [json.loads(line) for line in (run / "record_0.jsonl").read_text().splitlines()]
    batches = [lines[start : start + recipe.batch_size] for start in range(0, len(lines), recipe.batch_size)]
    means = [sum(line["loss"] for line in batch) / len(batch) for batch in batches]
    assert list(scalars(board, "train/loss").values()) == pytest.approx(means, rel=1e-5)
    if isinstance(recipe, Stage1Recipe):
        for step, loss in scalars(board, "train/loss").items():
            domains = [scalars(board, f"train/loss_{domain}")[step] for domain in ("rgb", "normal", "depth")]
            assert min(domains) <= loss <= max(domains)


def test_tflops_are_the_operations_of_a_simulated_step_by_the_measured_seconds(
    finished: tuple[Recipe, Path, EventAccumulator],
) -> None:
    """The run counts the operations of its own first step. It has no peak rate here, so there is no MFU."""
    recipe, _, board = finished
    flops = recipe.accumulation_steps * count_recipe(recipe).model_flops
    seconds = scalars(board, "perf/step_seconds")
    for step, tflops in scalars(board, "perf/tflops").items():
        assert tflops * 1e12 == pytest.approx(flops / seconds[step], rel=1e-4)
        host, waited = (scalars(board, f"perf/{kind}_milliseconds")[step] / 1000 for kind in ("host", "data_wait"))
        assert 0 < host < seconds[step] - waited <= seconds[step]  # the last step reads nothing ahead


def test_all_files_and_folders_of_a_run_follow_the_umask(finished: tuple[Recipe, Path, EventAccumulator]) -> None:
    recipe, run, _ = finished
    umask = UMASKS[recipe.task]
    found = {path.relative_to(run): path for path in run.rglob("*") if not path.is_symlink()}
    assert {"checkpoints", "exports", "samples", "tensorboard", "logs"} <= {path.parts[0] for path in found}
    assert any(path.suffix == ".safetensors" for path in found)
    wrong = {
        str(name): oct(mode)
        for name, path in found.items()
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_the_recipe_in_tensorboard_is_the_whole_recipe(finished: tuple[Recipe, Path, EventAccumulator]) -> None:
    recipe, _, board = finished
    (event,) = board.Tensors("recipe/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    content = yaml.safe_load(text.removeprefix("```yaml\n").removesuffix("\n```"))
    assert type(recipe).model_validate_json(json.dumps(content)) == recipe


def test_samples_are_grids_and_videos_in_tensorboard_and_as_files(
    finished: tuple[Recipe, Path, EventAccumulator],
) -> None:
    recipe, run, board = finished
    names = ("normal", "depth", "rgb") if isinstance(recipe, Stage1Recipe) else ("rgb",)
    suffixes = {"": 2, OTHER_REFERENCE: 1}  # with the number of clips
    assert set(board.Tags()["images"]) == {
        f"samples/{name}{suffix}" for name in ("grid", *names) for suffix in suffixes
    }
    for step, (suffix, count) in product((2, 3), suffixes.items()):
        with Image.open(run / "samples" / f"{step_name(step)}{suffix}.png") as grid:
            assert grid.width > 300
        for name in names:
            with Image.open(run / "samples" / f"{step_name(step)}_{name}{suffix}.gif") as video:
                assert video.is_animated
                assert video.size == (count * recipe.data.width, recipe.data.height)
    assert [event.step for event in board.Images("samples/grid")] == [2, 3]
    # The same clip with another person: the first clip's frames differ, which only `num_cross_clips` draws.
    own, other = (board.Images(f"samples/{names[-1]}{suffix}")[0].encoded_image_string for suffix in suffixes)
    first, crossed = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (own, other))
    assert not np.array_equal(first[:, : recipe.data.width], crossed)


def test_progress_ends_at_the_last_step_with_the_name_of_the_export(
    finished: tuple[Recipe, Path, EventAccumulator],
) -> None:
    recipe, run, _ = finished
    lines = [json.loads(line) for line in progress_file(run).read_text().splitlines()]
    assert [line["done"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line["total"] == MAX_STEPS and line["unit"] == "steps" for line in lines)
    messages = [line["message"] for line in lines if "message" in line]
    assert "starting at step 0" in messages[0]
    assert messages[-1] == f"finished at step 3; exported to {export_folder(run, MAX_STEPS)}"
    assert newest_export(run) == export_folder(run, MAX_STEPS)
    assert (newest_export(run) / "model_index.json").is_file()
    if not isinstance(recipe, Stage1Recipe):
        config = json.loads((newest_export(run) / "controlnet" / "config.json").read_text(encoding="utf-8"))
        facts = {name: config[name] for name in ("trained_frames", "reference_first", "trained_fps")}
        assert facts == {"trained_frames": recipe.data.num_frames, "reference_first": True, "trained_fps": 7.0}


@pytest.mark.parametrize(("only", "learns"), [("controlnet.down_blocks.0.*", False), ("controlnet.*zero_conv*", True)])
def test_a_run_whose_gradients_are_all_zero_says_so_once(shards: Path, tmp_path: Path, only: str, learns: bool) -> None:
    changes = {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": 2,
        "model.unfreeze": "none",
        "optimizer.only": [only],
        "validation.num_loss_clips": 1,
        "validation.num_sample_clips": 1,
        "validation.num_frames": 4,
        "sampling.num_inference_steps": 1,
    }
    run_ranks(run_recorded, 1, tmp_path / "output", recipe=tiny_stage2_recipe(changes), run=tmp_path / "run")
    lines = map(json.loads, progress_file(tmp_path / "run").read_text().splitlines())
    messages = [line["message"] for line in lines if "nothing is learned" in line.get("message", "")]
    assert len(messages) == (0 if learns else 1)
    assert learns or "optimizer.only" in messages[0]
