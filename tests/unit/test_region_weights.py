"""`objective.region_weights`: boxes of face and hands, their exact coverage of the latents, and the weighted loss."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.random_shards import HEIGHT, WIDTH, write_random_shards
from support.recipes import perturb, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.data.loading.shared_memory import SharedSlots
from dreamdance.media.keypoint_regions import UNKNOWN, region_boxes
from dreamdance.media.keypoints import FACE, LEFT_HAND, RIGHT_HAND
from dreamdance.recipe.objective_sections import RegionWeights
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.objectives.region_weights import region_weights
from dreamdance.training.stages.training_stage import stage_of


def test_boxes_hold_the_certain_points_with_a_margin_and_their_mean_confidence():
    points = np.zeros((2, 128, 3), np.float32)
    points[0, FACE][:4] = [[0.4, 0.2, 0.9], [0.6, 0.2, 0.9], [0.5, 0.4, 0.6], [0.4, 0.3, 0.6]]
    points[0, FACE][4] = [0.9, 0.9, 0.29]  # too uncertain to be drawn
    points[1, LEFT_HAND][:5] = [[0.1, 0.5, 0.5]] * 4 + [[0.3, 0.9, 0.5]]
    points[1, RIGHT_HAND][:3] = [0.5, 0.5, 1.0]  # three points are too few
    boxes = region_boxes(points)
    expected = np.zeros((2, 3, 5))
    expected[0, 0] = [0.35, 0.15, 0.65, 0.45, 0.75]
    expected[1, 1] = [0.05, 0.4, 0.35, 1.0, 0.5]
    np.testing.assert_allclose(boxes, expected, rtol=0, atol=1e-6)


def test_weights_are_the_exact_coverage_of_each_place():
    """Against counting on a grid of 40 x 40 points per place, on whose lines the boxes end."""
    height, width, fine = 6, 4, 40
    rows, columns = (np.arange(count * fine) + 0.5 for count in (height, width))
    generator = np.random.default_rng(0)
    ends = np.sort(generator.integers(-20, [[width * fine + 20], [height * fine + 20]], (2, 3, 2, 2)), axis=-1)
    boxes, reference = np.zeros((2, 3, 3, 5)), np.ones((2, 3, height, width))
    for clip in range(2):
        for frame in range(3):
            for number, factor in ((0, 4.0), (1 + clip, 2.5)):
                (left, right), (top, bottom) = ends[(clip + number) % 2, frame]
                confidence = generator.random()
                boxes[clip, frame, number] = [
                    left / width / fine, top / height / fine, right / width / fine, bottom / height / fine, confidence
                ]  # fmt: skip
                inside = np.outer((top < rows) & (rows < bottom), (left < columns) & (columns < right))
                share = inside.reshape(height, fine, width, fine).mean(axis=(1, 3))
                reference[clip, frame] = np.maximum(reference[clip, frame], 1 + (factor - 1) * confidence * share)
    reference /= reference.mean(axis=(1, 2, 3), keepdims=True)
    settings = RegionWeights(face=4.0, hands=2.5)
    found = region_weights(torch.tensor(boxes, dtype=torch.float32), settings, height=height, width=width)
    assert np.ptp(reference) > 1
    np.testing.assert_allclose(found.numpy(), reference, rtol=1e-5)
    np.testing.assert_allclose(found.mean(dim=(1, 2, 3)), 1.0, rtol=1e-6)


def test_unknown_regions_have_the_weight_of_the_rest():
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, UNKNOWN]).repeat(1, 2, 3, 1)
    assert torch.equal(region_weights(boxes, RegionWeights(face=9.0), height=3, width=2), torch.ones(1, 2, 3, 2))


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return tiny_clip_batch(num_clips=2, num_frames=4)


def with_face(batch: ClipBatch, left: float, right: float) -> ClipBatch:
    regions = torch.zeros(2, 4, 3, 5)
    regions[:, :, 0] = torch.tensor([left, 0.0, right, 1.0, 1.0])
    return replace(batch, regions=regions)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_region_takes_what_the_rest_gives(batch, stage):
    """Half of the frame at weight 3 has 1.5 of a mean of 1, the rest 0.5: the two halves in turn add up to twice."""
    changes: dict[str, Any] = {"objective.region_weights": {"face": 3.0}}
    recipe = tiny_stage1_recipe("geometry", changes) if stage == "stage1" else tiny_stage2_recipe(changes)
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    perturb(objective)

    def losses(*face: float) -> Tensor:
        with torch.no_grad():
            loss: Tensor = objective(with_face(batch, *face)).sample_losses
        return loss

    whole, left, right = losses(0.0, 1.0), losses(0.0, 0.5), losses(0.5, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(whole, objective(batch).sample_losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(left + right, 2 * whole, rtol=1e-5, atol=0)
    assert ((left - whole).abs() > 1e-3 * whole).all()
    objective.eval()
    assert torch.equal(losses(0.0, 0.5), losses(0.5, 1.0)), "the held-out loss is not weighted"


def clips_of(tmp_path, *, with_keypoints: bool) -> ClipDataset:
    shards = write_random_shards(tmp_path / "shards", num_clips=4, with_keypoints=with_keypoints)
    return ClipDataset(shards, width=WIDTH, height=HEIGHT, num_frames=2, with_regions=True)


@pytest.mark.parametrize("with_keypoints", [True, False])
def test_the_log_says_once_that_clips_have_no_key_points(tmp_path, caplog, with_keypoints):
    clips = clips_of(tmp_path, with_keypoints=with_keypoints)
    order = ClipOrder(clips.index.samples_per_shard, batch_size=2, seed=0)
    loader = iter(ClipLoader(clips, order, micro_batch_size=1, ranks=Ranks()))
    with caplog.at_level(logging.WARNING):
        batches = [batch for _ in range(3) for batch in next(loader)]
    loader.close()
    assert len(caplog.records) == (0 if with_keypoints else 1)
    assert all(("has no key points" in text) for text in caplog.messages)
    assert {batch.regions.shape for batch in batches} == {(1, 2, 3, 5)}
    assert all((batch.regions[..., 4] == UNKNOWN).all() != with_keypoints for batch in batches)


def test_boxes_pass_through_shared_memory_and_reach_the_device_unchanged(tmp_path):
    clips = clips_of(tmp_path, with_keypoints=True)
    batch = collate_clips([clips.stored_sample(SampleKey(0, sample)) for sample in (0, 1)])
    expected = region_boxes(np.concatenate([clips.clip(0).keypoints, clips.clip(1).keypoints]))
    assert batch.regions.abs().max() > 0
    assert all(any(np.allclose(box, one) for one in expected) for box in batch.regions.flatten(0, 1).numpy())
    slots = SharedSlots(1)
    again = slots.read(slots.write(batch, slot=0), pin=False)
    slots.close()
    assert torch.equal(again.regions, batch.regions)
    assert torch.equal(again.to("cpu").regions, batch.regions)
