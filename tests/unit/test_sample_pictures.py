"""Samples of held-out clips come from the real pipeline, are repeatable, and are drawn beside the truth."""

from typing import Any

import numpy as np
import pytest
import torch
from support.recipes import perturb, select_clips, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe, without

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.media.transforms import decode_normals, pass_through
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.training.sample_pictures import MAX_COLUMNS
from dreamdance.training.stages.training_stage import stage_of

QUICK = {"sampling.num_inference_steps": 2}


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return tiny_clip_batch(num_clips=2, num_frames=5, held_out=True)


def make(recipe: Any) -> Any:
    objective = perturb(stage_of(recipe).build())
    stage_of(recipe).set_trainable(objective)
    return objective


def test_stage_1_samples_are_the_pipelines_with_the_recipes_settings(batch):
    recipe = tiny_stage1_recipe("temporal", QUICK)
    objective = make(recipe)
    samples = stage_of(recipe).sample(objective, batch)
    expected = objective.make_pipeline()(
        batch.reference,
        batch.pose,
        num_inference_steps=2,
        guidance_scales=(2.5, 1.0, 1.5),
        window_frames=4,
        window_overlap=1,
        generator=[sample_generator(key, "sampling") for key in batch.keys.tolist()],
        output_type="pt",
    )
    assert torch.equal(samples.predictions["depth"], expected.depths)
    assert torch.equal(samples.predictions["rgb"], expected.images)
    torch.testing.assert_close(decode_normals(samples.predictions["normal"]), expected.normals)


@pytest.mark.parametrize("recipe", [tiny_stage1_recipe("temporal", QUICK), tiny_stage2_recipe(QUICK)])
def test_sampling_can_be_left_after_any_step(batch, recipe):
    class LeftError(Exception):
        pass

    def leave(*step: object) -> None:
        seen.append(step[1])
        if len(seen) == 2:
            raise LeftError

    objective, seen = make(recipe), []
    modes = [module.training for module in objective.modules()]
    with pytest.raises(LeftError):
        stage_of(recipe).sample(objective, batch, leave)
    assert seen == [0, 1]
    assert [module.training for module in objective.modules()] == modes


def test_stage_2_samples_are_the_pipelines_on_maps_of_stage_1_s_size(batch):
    recipe = tiny_stage2_recipe(QUICK)
    objective = make(recipe)
    samples = stage_of(recipe).sample(objective, batch)
    expected = objective.make_pipeline()(
        batch.reference[1:],
        batch.pose[1:],
        pass_through(batch.maps["normal"][1:], 12, 8, kind="normals"),
        pass_through(batch.maps["depth"][1:], 12, 8),
        num_inference_steps=2,
        fps=8.0,
        window_frames=4,
        window_overlap=1,
        generator=sample_generator(batch.keys[1].tolist(), "sampling"),
        output_type="pt",
    )
    assert torch.equal(samples.predictions["rgb"][1:], expected.frames)


def test_samples_repeat_and_leave_modes_and_random_state_alone(batch):
    recipe = tiny_stage1_recipe("geometry", QUICK)
    objective = make(recipe)
    state = torch.get_rng_state()
    first, second = stage_of(recipe).sample(objective, batch), stage_of(recipe).sample(objective, batch)
    assert np.array_equal(first.grid, second.grid)
    assert torch.equal(torch.get_rng_state(), state)
    assert objective.unet.training
    assert not objective.vae.training


def test_a_clips_sample_does_not_depend_on_its_batch(batch):
    recipe = tiny_stage1_recipe("geometry", QUICK)
    objective = make(recipe)
    together = stage_of(recipe).sample(objective, batch).predictions["depth"][1:]
    alone = stage_of(recipe).sample(objective, select_clips(batch, 1)).predictions["depth"]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_video_grid_has_a_block_per_clip_and_time_to_the_right(batch):
    recipe = tiny_stage1_recipe("geometry", QUICK)
    grid = stage_of(recipe).sample(make(recipe), batch).grid
    assert grid.dtype == np.uint8
    # pose, three predictions and three truths for each of two clips, each 24 pixels enlarged seven times
    rows, columns = 2 * 7, 1 + 5
    assert grid.shape[0] >= rows * 7 * 24
    assert grid.shape[1] >= columns * 7 * 16
    assert_shows(grid, batch.reference[0])
    assert_shows(grid, batch.rgb[1, 4])
    assert_shows(grid, batch.maps["depth"][1, 0])


def test_a_long_video_is_thinned_to_a_few_frames():
    long = tiny_clip_batch(num_clips=1, num_frames=12)
    recipe = tiny_stage1_recipe("geometry", QUICK)
    grid = stage_of(recipe).sample(make(recipe), long).grid
    assert grid.shape[1] < (1 + MAX_COLUMNS + 2) * 7 * 16
    assert_shows(grid, long.rgb[0, 0])
    assert_shows(grid, long.rgb[0, 11])


def test_single_frames_take_a_line_each():
    single = tiny_clip_batch(num_clips=3, num_frames=1)
    recipe = tiny_stage1_recipe("domains", QUICK)
    grid = stage_of(recipe).sample(make(recipe), single).grid
    assert grid.shape[0] < 4 * 7 * 24
    assert grid.shape[1] >= 8 * 7 * 16
    assert_shows(grid, single.maps["normal"][2, 0])


def test_the_grid_of_stage_2_shows_the_maps_that_its_controls_name(batch):
    given = pass_through(batch.maps["depth"], 12, 8)[0, 0]
    with_depth, without_depth = (
        tiny_stage2_recipe({**QUICK, "model.controls": controls}) for controls in (["pose", "depth"], ["pose"])
    )
    assert_shows(stage_of(with_depth).sample(make(with_depth), batch).grid, given)
    grid = stage_of(without_depth).sample(make(without_depth), without(batch, "normal", "depth")).grid
    with pytest.raises(AssertionError):
        assert_shows(grid, given)


def assert_shows(grid: np.ndarray, picture: torch.Tensor) -> None:
    """Checks that the picture, enlarged seven times, is somewhere in the grid, pixel by pixel."""
    wanted = np.rint(picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    rows, columns = np.nonzero((grid == wanted[0, 0]).all(axis=-1))
    for row, column in zip(rows, columns, strict=True):
        part = grid[row : row + 7 * 24, column : column + 7 * 16]
        if part.shape[:2] == (7 * 24, 7 * 16) and np.array_equal(part[3::7, 3::7], wanted):
            return
    raise AssertionError("the picture is not in the grid")
