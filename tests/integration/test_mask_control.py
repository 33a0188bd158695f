"""The body mask as a control of stage 2, from a video to an animation; its entry in the table is all that it needs."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from support.dancer_shards import HEIGHT, NUM_FRAMES, WIDTH
from support.random_shards import random_clip
from support.ranks import run_ranks
from support.recipes import perturb, record_inputs, tiny_clip_batch, tiny_stage2_recipe
from support.training_scenarios import run_recorded
from support.video_folders import stored_clips, videos_recipe, write_videos

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.shard_writer import ClipRecord, Part, ShardFormat, write_shards
from dreamdance.errors import ManifestError, ShardError
from dreamdance.inference.animate import AnimateError, animate
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import write_video
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.recipe.sections import Shards
from dreamdance.runs.layout import export_folder
from dreamdance.training.stages.training_stage import stage_of

MASKED = {"model.controls": ["pose", "mask"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards) -> Path:
    """A runs folder with a run that was trained with the mask as a control, and its samples."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": 3,
        "validation.num_loss_clips": 1,
        "validation.num_sample_clips": 1,
        **MASKED,
    }
    run_ranks(run_recorded, 1, folder, recipe=tiny_stage2_recipe(changes), run=folder / "masked")
    return folder


@pytest.mark.slow
def test_a_recipe_that_names_the_mask_trains_validates_and_exports(runs):
    records = [json.loads(line) for line in (runs / "masked" / "record_0.jsonl").read_text().splitlines()]
    assert {math.isfinite(record["loss"]) for record in records} == {True}
    assert (runs / "masked" / "samples" / "step_00000003.png").is_file()
    exported = json.loads((export_folder(runs / "masked", 3) / "controller" / "config.json").read_text())
    assert exported["controls"] == ["pose", "mask"]


def test_the_controller_reads_the_mask_as_it_is_and_learns_from_it():
    batch = tiny_clip_batch()
    objective = perturb(stage_of(tiny_stage2_recipe(MASKED)).build()).eval()
    calls = record_inputs(objective.controller)
    objective(batch).loss.backward()
    mask = calls[0][0][0]["mask"]
    assert torch.equal(mask, rearrange(batch.maps["mask"], "b f c h w -> (b f) c h w"))
    assert 0 < mask.mean() < 1
    assert objective.controller.encoders["mask"].conv_in.weight.grad.abs().sum() > 0


def clips_without_a_mask() -> Iterator[ClipRecord]:
    whole = random_clip(0)
    yield replace(whole, maps={name: frames for name, frames in whole.maps.items() if name != "mask"})


def test_shards_without_a_mask_are_refused_with_the_key_to_change(tmp_path):
    part = Part("part_0", partial(clips_without_a_mask))
    write_shards(tmp_path / "bare", [part], settings={}, shard_format=ShardFormat())
    clips = ClipDataset(Shards(local=str(tmp_path / "bare")), width=8, height=12, num_frames=2, maps=["mask"])
    with pytest.raises(ShardError, match=r"clip_0000.* has no mask frames, .*remove mask from its `model\.controls`"):
        clips.training_sample(SampleKey(0, 0))


def test_a_video_of_masks_is_stored_beside_its_pictures(tmp_path):
    for name in "ab":
        write_videos(tmp_path / "videos", name)
    bright = np.zeros((20, 96, 64, 3), np.uint8)
    bright[:, 32:64] = 250
    write_video(tmp_path / "videos" / "a.mask.mp4", bright, fps=8)
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", split_by="time", validation_fraction=0.4)
    prepare(recipe, tmp_path / "run")
    with_mask = [clip for clip in stored_clips(tmp_path / "data", "train") if clip.has("mask")]
    assert {clip.metadata["source"] for clip in with_mask} == {"a.rgb.mp4"}
    rows = with_mask[0].frames("mask")[0, :, 20]
    assert set(rows.tolist()) == {0, 255}
    assert (rows == 255).sum() == 32


class Entries:
    """A manifest of one held-out dancer, and the animate task on it."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder, runs
        clip = render_clip(HELD_OUT_SEEDS[0], num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT)
        Image.fromarray(clip.rgb[-1]).save(folder / "dancer.png")
        self.write("pose", draw_poses(clip.keypoints, width=WIDTH, height=HEIGHT))
        self.mask = clip.mask[..., None].repeat(3, axis=-1).astype(np.uint8) * 255

    def write(self, name: str, frames: np.ndarray) -> None:
        write_video(self.folder / f"{name}.mkv", frames, fps=8.0, lossless=True)

    def frames(self, **more) -> np.ndarray:
        entry = {"id": "dancer", "image": "dancer.png", "pose": "pose.mkv", **more}
        (self.folder / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
        settings = {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1}
        recipe = AnimateRecipe(
            task="animate",
            name="masked_animate",
            manifest=str(self.folder / "manifest.jsonl"),
            output=str(self.folder / "results"),
            animation_from="masked",
            width=WIDTH,
            height=HEIGHT,
            precision="fp32",
            animation=settings,
        )
        animate(recipe, self.runs / self.folder.name)
        with np.load(self.folder / "results" / "dancer" / "arrays.npz", allow_pickle=False) as arrays:
            return arrays["frames"]


@pytest.mark.slow
def test_animate_takes_the_mask_from_the_manifest(tmp_path, runs):
    entries = Entries(tmp_path, runs)
    with pytest.raises(AnimateError, match=r"stage 2 reads mask maps, which stage 1 does not make: add 'mask'"):
        entries.frames()
    entries.write("mask", entries.mask)
    seen = entries.frames(mask="mask.mkv")
    assert len(seen) == NUM_FRAMES
    entries.write("mask", 255 - entries.mask)
    assert not np.array_equal(entries.frames(mask="mask.mkv"), seen)
    entries.write("mask", entries.mask[:-1])
    with pytest.raises(AnimateError, match=rf"has {NUM_FRAMES - 1} frames and the pose sequence has {NUM_FRAMES}"):
        entries.frames(mask="mask.mkv")
    with pytest.raises(ManifestError, match="'align' moves only the pose, so 'mask' would not match it"):
        entries.frames(mask="mask.mkv", align=True)
