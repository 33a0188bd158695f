"""Scores of samples equal those of `evaluate`; samples with other references take those of other videos."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.recipes import perturb, tiny_clip_batch, tiny_stage1_recipe, without

from dreamdance.evaluation import geometry_metrics, image_metrics
from dreamdance.media.transforms import decode_normals, encode_normals
from dreamdance.training.sample_scores import other_references, sample_scores
from dreamdance.training.stages.training_stage import stage_of


@pytest.fixture(scope="module")
def batch():
    return tiny_clip_batch(num_clips=3, num_frames=2)


def frames(maps: torch.Tensor) -> np.ndarray:
    """`b f c H W` to `(b f) H W c` in float64."""
    return maps.flatten(0, 1).movedim(1, -1).double().numpy()


def test_scores_are_those_of_evaluate(batch):
    generator = torch.Generator().manual_seed(0)
    rgb = (batch.rgb + 0.1 * torch.randn(batch.rgb.shape, generator=generator)).clamp(0, 1)
    depth = (batch.maps["depth"] + 0.2).clamp(0, 1)
    normal = encode_normals(decode_normals(torch.rand(batch.rgb.shape, generator=generator)))
    scores = sample_scores(batch, {"rgb": rgb, "depth": depth, "normal": normal})
    truth = {name: frames(maps) for name, maps in batch.maps.items()}
    assert scores["l1_rgb"] == pytest.approx(image_metrics.l1(frames(rgb), truth["rgb"]))
    assert scores["psnr_rgb"] == pytest.approx(image_metrics.psnr(frames(rgb), truth["rgb"]))
    assert scores["l1_depth"] == pytest.approx(image_metrics.l1(frames(depth), truth["depth"]))
    inside = truth["mask"][..., 0] > 0
    normals, true_normals = (frames(decode_normals(maps)) for maps in (normal, batch.maps["normal"]))
    errors = geometry_metrics.angular_error(normals, true_normals, inside)
    assert scores["normal_degrees_body"] == pytest.approx(errors.mean, rel=1e-5)
    assert set(scores) == {"l1_rgb", "psnr_rgb", "l1_depth", "normal_degrees_body"}


def test_without_masks_normals_count_everywhere_and_equal_frames_have_100_decibel(batch):
    bare = without(batch, "mask", "depth")
    scores = sample_scores(bare, {"rgb": batch.rgb, "normal": batch.maps["normal"], "depth": batch.maps["depth"]})
    assert scores == pytest.approx({"l1_rgb": 0.0, "psnr_rgb": 100.0, "normal_degrees": 0.0}, abs=1e-3)


def test_other_references_are_those_of_the_next_clip_of_another_video(batch):
    named = replace(batch, clip_ids=["a.b.validation.0000", "a.b.validation.0001", "c.validation.0000"])
    crossed = other_references(named, 3)
    assert torch.equal(crossed.reference, batch.reference[[2, 2, 0]])
    assert torch.equal(crossed.pose, batch.pose)
    assert torch.equal(crossed.keys, batch.keys)
    assert crossed.clip_ids[1] == "a.b.validation.0001\nreference of c.validation.0000"
    first = other_references(named, 1, reference_first=True)
    assert torch.equal(first.rgb[0, 0], batch.rgb[2, 0])
    assert torch.equal(first.rgb[0, 1:], batch.rgb[0, 1:])
    assert other_references(replace(batch, clip_ids=["a.t.0", "a.t.1", "a.t.2"]), 3) is None
    assert other_references(batch, 0) is None


def test_a_sample_with_another_reference_follows_it(batch):
    recipe = tiny_stage1_recipe("geometry", {"sampling.num_inference_steps": 2})
    stage = stage_of(recipe)
    objective = perturb(stage.build())
    stage.set_trainable(objective)
    own = stage.sample(objective, batch)
    crossed = stage.sample(objective, other_references(batch, 1))
    assert (own.predictions["rgb"][0] - crossed.predictions["rgb"][0]).abs().max() > 1e-3
    assert crossed.grid.shape[1] >= own.grid.shape[1]
