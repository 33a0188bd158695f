"""Inputs and outputs of the pipelines: equivalent pictures and tensors, noise, sizes, callbacks."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_pipelines import random_pictures, tiny_animation_pipeline, tiny_geometry_pipeline

from dreamdance.models.autoencoding import downscale_factor
from dreamdance.pipelines import DreamDancePipeline
from dreamdance.pipelines.inputs import clip_tensor, image_tensor
from dreamdance.pipelines.outputs import check_output_type, frames_output, normals_output
from dreamdance.pipelines.sampling import check_size, checked_latents, draw_initial_noise

HEIGHT, WIDTH = 24, 16
IMAGE = random_pictures(3, HEIGHT, WIDTH, seed=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_shade() -> torch.Tensor:
    """`1 1 3 16 16`: all 256 values of a byte."""
    shades = torch.arange(256).reshape(16, 16) / 255
    return torch.stack([shades, shades.flip(0), shades.T])[None, None]


def test_a_picture_a_list_and_a_tensor_of_it_are_the_same_reference():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    tensor = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)
    for image in (picture, [picture], tensor, tensor[None], tensor.double()):
        assert torch.equal(image_tensor(image), tensor[None])
        assert image_tensor(image).dtype == torch.float32
    assert image_tensor([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]).shape == (2, 3, 5, 4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_other_modes_become_rgb(mode):
    picture = Image.new("RGB", (4, 5), (255, 255, 255)).convert(mode)
    assert torch.equal(image_tensor(picture), torch.ones(1, 3, 5, 4))


def test_pictures_clips_and_tensors_of_them_are_the_same_poses():
    frames = [Image.fromarray(np.full((5, 4, 3), shade, np.uint8)) for shade in (0, 51, 255)]
    expected = torch.tensor([0.0, 0.2, 1.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 5, 4)
    for poses in (frames, [frames], expected[0], expected, expected[:, :, :1], tuple(frames)):
        assert torch.equal(clip_tensor(poses, "poses"), expected)
    assert clip_tensor([frames, frames], "poses").shape == (2, 3, 3, 5, 4)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3, 4, 5, 6, 7), r"normals must be pictures or a tensor b f 3 H W, not of shape \(2, 3, 4, 5"),
        (torch.zeros(3, 2, 4, 4), r"not of shape \(1, 3, 2, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), r"not of shape \(1, 0, 3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"normals must be floats in \[0, 1\], not torch.uint8"),
        (torch.full((1, 3, 4, 4), 255.0), r"normals must lie in \[0, 1\], but its values are from 255 to 255"),
        (torch.full((1, 3, 4, 4), -1.0), "but its values are from -1 to -1"),
        (torch.full((1, 3, 4, 4), torch.nan), r"normals must lie in \[0, 1\], but its values are from nan to nan"),
    ],
)
def test_tensors_of_another_kind_are_refused_by_name_shape_and_range(tensor, message):
    with pytest.raises(ValueError, match=message):
        clip_tensor(tensor, "normals")


def test_values_slightly_outside_of_the_range_are_accepted():
    assert clip_tensor(torch.full((1, 3, 2, 2), 1.005), "poses").max() == torch.tensor(1.005)


def test_every_shade_is_the_same_after_conversion_to_pictures_and_back():
    shades = every_shade()
    pictures = frames_output(shades, "pil")
    assert pictures[0][0].mode == "RGB"
    assert torch.equal(clip_tensor(pictures, "poses"), shades)
    array = frames_output(shades, "np")
    assert array.shape == (1, 1, 16, 16, 3)
    assert np.array_equal(array[0, 0], shades[0, 0].permute(1, 2, 0).numpy())
    assert torch.equal(frames_output(shades, "pt"), shades)


def test_pictures_round_to_the_nearest_shade_and_clamp():
    values = torch.tensor([-0.2, 0.499 / 255, 0.501 / 255, 1.7]).reshape(1, 1, 1, 2, 2)
    picture = frames_output(values, "pil")[0][0]
    assert picture.mode == "L"
    assert np.asarray(picture).ravel().tolist() == [0, 0, 1, 255]


def test_normals_stay_unit_vectors_as_numbers_and_become_colours_as_pictures():
    normals = torch.tensor([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]).reshape(1, 2, 3, 1, 1)
    assert torch.equal(normals_output(normals, "pt"), normals)
    pixels = [np.asarray(frame).ravel().tolist() for frame in normals_output(normals, "pil")[0]]
    assert pixels == [[128, 128, 255], [0, 128, 128]]


def test_half_precision_results_are_delivered_in_float32():
    for kind in ("pt", "np"):
        assert str(frames_output(torch.zeros(1, 1, 3, 2, 2, dtype=torch.bfloat16), kind).dtype).endswith("float32")


def test_unknown_output_types_are_refused_with_the_accepted_ones():
    with pytest.raises(ValueError, match="output_type is 'jpg'; it must be one of pil, np, pt, latent"):
        check_output_type("jpg")
    with pytest.raises(ValueError, match=r"'latent'; it must be one of pil, np, pt$"):
        check_output_type("latent", accepted=("pil", "np", "pt"))


def test_noise_of_a_clip_does_not_depend_on_the_clips_beside_it():
    alone = [draw_initial_noise((1, 3, 2, 4, 4), seeded(seed)) for seed in (5, 6)]
    together = draw_initial_noise((2, 3, 2, 4, 4), [seeded(5), seeded(6)])
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(draw_initial_noise((2, 3, 2, 4, 4), (seeded(5), seeded(6))), together)
    assert not torch.equal(together[0], together[1])


def test_noise_is_of_unit_variance_and_of_another_kind_each_time_without_a_generator():
    noise = draw_initial_noise((4, 5000), seeded())
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.03
    assert noise.var() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(draw_initial_noise((1, 8), None), draw_initial_noise((1, 8), None))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_generators_as_clips_are_needed(count):
    with pytest.raises(ValueError, match=f"{count} generators were given for a batch of 2"):
        draw_initial_noise((2, 4), [seeded()] * count)


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 12), (0, 16), (16, -8)])
def test_sizes_that_do_not_divide_into_latents_are_refused(height, width):
    with pytest.raises(ValueError, match=f"must be multiples of 8, the autoencoder's factor: {width}x{height}"):
        check_size(height, width, 8)
    check_size(8, 16, 8)


def test_given_noise_is_used_unchanged_or_refused_by_shape():
    latents = torch.zeros(1, 2, 3)
    assert checked_latents(latents, (1, 2, 3)) is latents
    with pytest.raises(ValueError, match=r"must have the shape \(1, 2, 4\), not \(1, 2, 3\)"):
        checked_latents(latents, (1, 2, 4))


@pytest.mark.parametrize(("num_frames", "window_frames", "overlap"), [(1, 4, 1), (5, 2, 1), (7, 3, 0)])
def test_odd_lengths_give_every_map_of_every_frame(num_frames, window_frames, overlap):
    poses = random_pictures(num_frames, 3, HEIGHT, WIDTH, seed=2)
    output = tiny_geometry_pipeline()(
        IMAGE, poses, num_inference_steps=1, window_frames=window_frames, window_overlap=overlap,
        generator=seeded(), output_type="pt",
    )  # fmt: skip
    assert output.normals.shape == output.images.shape == (1, num_frames, 3, HEIGHT, WIDTH)
    assert output.depths.shape == (1, num_frames, 1, HEIGHT, WIDTH)
    for maps in (output.depths, output.images):
        assert 0 <= maps.min() <= maps.max() <= 1


def test_given_latents_replace_those_drawn_by_the_generator():
    pipeline, poses = tiny_geometry_pipeline(), random_pictures(2, 3, HEIGHT, WIDTH, seed=2)
    factor, channels = downscale_factor(pipeline.vae), pipeline.unet.config.in_channels
    noise = draw_initial_noise((1, 2, 3, channels, HEIGHT // factor, WIDTH // factor), seeded(4))
    drawn, given = (
        pipeline(IMAGE, poses, num_inference_steps=2, output_type="pt", **options).depths
        for options in ({"generator": seeded(4)}, {"latents": noise})
    )
    assert torch.equal(drawn, given)


def test_several_clips_are_guided_the_same_batched_and_one_after_the_other():
    """Two clips and two passes make four batch entries: none may use the reference or poses of another."""
    pipeline = tiny_geometry_pipeline()
    images = random_pictures(2, 3, HEIGHT, WIDTH, seed=3)
    poses = random_pictures(2, 3, 3, HEIGHT, WIDTH, seed=4)
    batched, sequential = (
        pipeline(
            images, poses, num_inference_steps=2, sequential_guidance=way,
            generator=[seeded(1), seeded(2)], output_type="latent",
        )
        for way in (False, True)
    )  # fmt: skip
    for name in ("normals", "depths", "images"):
        torch.testing.assert_close(batched[name], sequential[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batched.depths[0], batched.depths[1], atol=1e-2)


def test_a_callback_that_returns_nothing_changes_nothing():
    poses = random_pictures(2, 3, HEIGHT, WIDTH, seed=2)
    results = [
        tiny_geometry_pipeline()(
            IMAGE, poses, num_inference_steps=2, generator=seeded(), output_type="pt", callback_on_step_end=callback
        ).depths
        for callback in (None, lambda *_: None, lambda *_: {})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


class TestBothStages:
    """`DreamDancePipeline`: its own arguments, which neither stage has."""

    @pytest.fixture(scope="class")
    def pipeline(self):
        joined = DreamDancePipeline.from_stages(tiny_geometry_pipeline(), tiny_animation_pipeline())
        joined.set_progress_bar_config(disable=True)
        return joined

    def call(self, pipeline, **options):
        poses = random_pictures(2, 3, HEIGHT, WIDTH, seed=2)
        options = {"num_inference_steps": 1, "generator": seeded(), "output_type": "pt", **options}
        return pipeline(IMAGE, poses, geometry_height=HEIGHT // 2, geometry_width=WIDTH // 2, **options)

    def test_stage_1_works_at_its_own_size_and_stage_2_at_the_references(self, pipeline):
        output = self.call(pipeline)
        assert output.frames.shape == (1, 2, 3, HEIGHT, WIDTH)
        assert output.normals.shape == (1, 2, 3, HEIGHT // 2, WIDTH // 2)
        assert output.depths.shape == (1, 2, 1, HEIGHT // 2, WIDTH // 2)
        torch.testing.assert_close(output.normals.norm(dim=2), torch.ones(1, 2, HEIGHT // 2, WIDTH // 2), rtol=1e-5,
                                   atol=0)  # fmt: skip

    def test_both_stages_show_a_progress_bar_as_the_pipeline_is_configured(self, capsys):
        stages = tiny_geometry_pipeline(), tiny_animation_pipeline()
        shown = []
        for options in ({"desc": "a dance", "disable": False}, {"disable": True}):
            pipeline = DreamDancePipeline.from_stages(*stages)
            pipeline.set_progress_bar_config(**options)
            self.call(pipeline)
            shown.append(capsys.readouterr().err)
        bars = shown[0].removesuffix("\n").split("\n")
        assert ["a dance: 100%" in bar for bar in bars] == [True, True]
        assert shown[1] == ""

    def test_each_stage_takes_its_own_number_of_steps_and_the_callback_sees_both(self, pipeline):
        seen = []

        def record(stage, step, _timestep, tensors):
            seen.append((type(stage).__name__, step, tensors["latents"].ndim))

        self.call(pipeline, num_inference_steps=1, geometry_num_inference_steps=3, callback_on_step_end=record)
        assert seen == [("GeometryPipeline", step, 6) for step in range(3)] + [("AnimationPipeline", 0, 5)]

    def test_a_tuple_has_the_frames_first(self, pipeline):
        frames, normals, depths = self.call(pipeline, return_dict=False)
        output = self.call(pipeline)
        assert torch.equal(frames, output.frames)
        assert torch.equal(normals, output.normals)
        assert torch.equal(depths, output.depths)

    def test_latents_of_two_stages_are_no_output(self, pipeline):
        with pytest.raises(ValueError, match=r"it must be one of pil, np, pt$"):
            self.call(pipeline, output_type="latent")

    def test_the_stages_share_their_networks_with_the_whole(self, pipeline):
        assert pipeline.geometry.unet is pipeline.geometry_unet
        assert pipeline.animation.unet is pipeline.unet
        assert set(pipeline.components) == {
            *(f"geometry_{name}" for name in pipeline.geometry.components), *pipeline.animation.components
        }  # fmt: skip

    def test_pictures_come_out_as_lists_of_clips(self, pipeline):
        output = self.call(pipeline, output_type="pil")
        assert [picture.size for picture in output.frames[0]] == [(WIDTH, HEIGHT)] * 2
        assert output.normals[0][0].mode == "RGB"
        assert output.depths[0][0].mode == "L"
