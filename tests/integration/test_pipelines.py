"""The three pipelines on tiny real networks: saved and loaded, in windows, in batches, with refused inputs."""

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from einops import repeat
from PIL import Image
from support.tiny_pipelines import (
    fill_zero_parameters,
    random_pictures,
    tiny_animation_pipeline,
    tiny_geometry_pipeline,
)

from dreamdance.media.transforms import encode_normals
from dreamdance.pipelines import AnimationPipeline, DreamDancePipeline, GeometryPipeline

HEIGHT, WIDTH = 24, 16
IMAGE = random_pictures(3, HEIGHT, WIDTH, seed=1)


def poses(num_frames: int, *leading: int) -> torch.Tensor:
    return random_pictures(*leading, num_frames, 3, HEIGHT, WIDTH, seed=2)


def maps(num_frames: int, *leading: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normals = random_pictures(*leading, num_frames, 3, HEIGHT, WIDTH, seed=3)
    depths = random_pictures(*leading, num_frames, 1, HEIGHT, WIDTH, seed=4)
    return poses(num_frames, *leading), normals, depths


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_saved_geometry_pipeline_gives_the_same_maps_bit_for_bit(tmp_path):
    pipeline = tiny_geometry_pipeline()
    before = pipeline(IMAGE, poses(3), num_inference_steps=2, generator=seeded(), output_type="pt")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = GeometryPipeline.from_pretrained(tmp_path)
    after = loaded(IMAGE, poses(3), num_inference_steps=2, generator=seeded(), output_type="pt")
    assert all(torch.equal(before[name], after[name]) for name in ("normals", "depths", "images"))


def test_a_saved_animation_pipeline_gives_the_same_frames_bit_for_bit(tmp_path):
    pipeline = tiny_animation_pipeline()
    before = pipeline(IMAGE, *maps(3), num_inference_steps=2, generator=seeded(), output_type="pt").frames
    pipeline.save_pretrained(tmp_path)
    loaded = AnimationPipeline.from_pretrained(tmp_path)
    after = loaded(IMAGE, *maps(3), num_inference_steps=2, generator=seeded(), output_type="pt").frames
    assert torch.equal(before, after)


def test_both_stages_joined_saved_and_loaded_give_the_results_of_the_single_stages(tmp_path):
    geometry, animation = tiny_geometry_pipeline(), tiny_animation_pipeline()
    generator = seeded()
    maps_of_stage1 = geometry(IMAGE, poses(3), num_inference_steps=2, generator=generator, output_type="pt")
    expected = animation(
        IMAGE,
        poses(3),
        encode_normals(maps_of_stage1.normals),
        maps_of_stage1.depths,
        num_inference_steps=2,
        generator=generator,
        output_type="pt",
    )
    DreamDancePipeline.from_stages(geometry, animation).save_pretrained(tmp_path)
    joined = DreamDancePipeline.from_pretrained(tmp_path)
    output = joined(
        IMAGE,
        poses(3),
        geometry_height=HEIGHT,
        geometry_width=WIDTH,
        num_inference_steps=2,
        generator=seeded(),
        output_type="pt",
    )
    assert torch.equal(output.frames, expected.frames)
    assert torch.equal(output.normals, maps_of_stage1.normals)
    assert torch.equal(output.depths, maps_of_stage1.depths)


def test_a_component_put_in_later_is_saved_under_a_name_that_loads(tmp_path):
    pipeline = tiny_geometry_pipeline(seed=0)
    pipeline.unet = tiny_geometry_pipeline(seed=1).unet
    pipeline.save_pretrained(tmp_path)
    loaded = GeometryPipeline.from_pretrained(tmp_path)
    weights = loaded.unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.unet.state_dict().items())


def test_networks_that_see_frames_alone_give_the_same_in_windows_and_whole():
    pipeline = tiny_geometry_pipeline(temporal_attention=False)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    whole = pipeline(IMAGE, poses(11), window_frames=16, generator=seeded(), **options)
    windowed = pipeline(IMAGE, poses(11), window_frames=4, window_overlap=2, generator=seeded(), **options)
    for name in ("normals", "depths", "images"):
        torch.testing.assert_close(windowed[name], whole[name], rtol=1e-5, atol=1e-5)


def seam_and_other_jumps(frames: torch.Tensor, boundaries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean change from frame to frame, `f-1`, at the changes of windows and elsewhere."""
    jumps = frames.diff(dim=1).abs().mean(dim=(0, 2, 3, 4))
    seams = torch.zeros(len(jumps), dtype=torch.bool)
    seams[boundaries] = True
    return jumps[seams], jumps[~seams]


@pytest.mark.parametrize("stage", ["geometry", "animation"])
def test_a_clip_longer_than_a_window_shows_no_seam(stage):
    """Frames differ only by their place in the window: blending leaves no jump where windows meet."""
    num_frames, window, overlap = 20, 8, 4
    drawings, normals, depths = (repeat(frames, "1 c h w -> f c h w", f=num_frames) for frames in maps(1))

    def sample(overlap: int) -> torch.Tensor:
        options = {"num_inference_steps": 2, "window_frames": window, "window_overlap": overlap}
        if stage == "geometry":
            pipeline = tiny_geometry_pipeline()
            noise = torch.randn(1, 1, 3, 12, 12, 8, generator=seeded()).expand(-1, num_frames, -1, -1, -1, -1)
            return pipeline(IMAGE, drawings, latents=noise, output_type="latent", **options).normals
        pipeline = tiny_animation_pipeline()
        fill_zero_parameters(pipeline.unet)
        noise = torch.randn(1, 1, 12, 12, 8, generator=seeded()).expand(-1, num_frames, -1, -1, -1)
        return pipeline(IMAGE, drawings, normals, depths, latents=noise, output_type="latent", **options).frames

    # the rim of a window: the frames where its weight begins or ends
    blended_seams, blended_jumps = seam_and_other_jumps(sample(overlap), [3, 7, 11, 15])
    cut_seams, cut_jumps = seam_and_other_jumps(sample(0), [7, 11])
    assert cut_seams.max() > cut_jumps.max(), (
        "without an overlap there is a seam; otherwise this test would prove nothing"
    )
    assert blended_seams.max() <= blended_jumps.max()
    assert blended_seams.max() < 0.5 * cut_seams.max()


def test_a_clip_in_a_batch_is_sampled_as_it_is_alone():
    pipeline = tiny_geometry_pipeline()
    images, drawings = random_pictures(2, 3, HEIGHT, WIDTH, seed=8), poses(3, 2)
    together = pipeline(images, drawings, num_inference_steps=2, generator=[seeded(0), seeded(1)], output_type="latent")
    for index in range(2):
        alone = pipeline(
            images[index], drawings[index], num_inference_steps=2, generator=seeded(index), output_type="latent"
        )
        torch.testing.assert_close(together.normals[index : index + 1], alone.normals, rtol=1e-5, atol=1e-5)


def test_an_animation_in_a_batch_is_sampled_as_it_is_alone_at_its_own_frame_rate():
    pipeline = tiny_animation_pipeline()
    images, controls = random_pictures(2, 3, HEIGHT, WIDTH, seed=8), maps(3, 2)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    together = pipeline(images, *controls, fps=[8, 25], generator=[seeded(0), seeded(1)], **options).frames
    for index, fps in enumerate((8, 25)):
        own = [frames[index] for frames in controls]
        alone = pipeline(images[index], *own, fps=fps, generator=seeded(index), **options).frames
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-3)


def test_chunks_of_decoding_and_of_encoding_change_nothing():
    pipeline = tiny_geometry_pipeline()
    results = [
        pipeline(IMAGE, poses(5), num_inference_steps=1, decode_chunk_size=size, generator=seeded(), output_type="pt")
        for size in (1, 2, 8)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.normals, results[0].normals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_any_number_of_frames_can_be_animated(num_frames):
    frames = tiny_animation_pipeline()(
        IMAGE, *maps(num_frames), num_inference_steps=1, window_frames=4, window_overlap=1, output_type="pt"
    ).frames
    assert frames.shape == (1, num_frames, 3, HEIGHT, WIDTH)
    assert torch.isfinite(frames).all()


def test_the_controls_of_the_controller_are_the_maps_that_are_needed():
    pipeline = tiny_animation_pipeline(controls=("pose",))
    frames = pipeline(IMAGE, poses(3), num_inference_steps=1, generator=seeded(), output_type="pt").frames
    ignored = pipeline(IMAGE, *maps(3), num_inference_steps=1, generator=seeded(), output_type="pt").frames
    assert torch.equal(frames, ignored)
    with pytest.raises(ValueError, match=r"reads pose, depth, normal, but no depths were given"):
        tiny_animation_pipeline()(IMAGE, poses(3), maps(3)[1])
    with pytest.raises(ValueError, match=r'reads pose, mask, but no maps=\{"mask": \.\.\.\} were given'):
        tiny_animation_pipeline(controls=("pose", "mask"))(IMAGE, poses(3))


def test_smaller_maps_of_stage1_are_enlarged():
    pipeline = tiny_animation_pipeline()
    small = [frames[..., ::2, ::2] for frames in maps(3)[1:]]
    frames = pipeline(IMAGE, poses(3), *small, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 3, HEIGHT, WIDTH, 3)


def test_pictures_arrays_and_tensors_contain_the_same_values():
    pipeline = tiny_geometry_pipeline()
    picture = Image.fromarray((IMAGE.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    drawings = [picture.rotate(90 * i).resize((WIDTH, HEIGHT)) for i in range(3)]
    results = {
        kind: pipeline(picture, drawings, num_inference_steps=1, generator=seeded(), output_type=kind)
        for kind in ("pt", "np", "pil")
    }
    normals = results["pt"].normals
    torch.testing.assert_close(normals.norm(dim=2), torch.ones(1, 3, HEIGHT, WIDTH), rtol=1e-5, atol=0)
    assert np.array_equal(results["np"].normals, normals.permute(0, 1, 3, 4, 2).numpy())
    shades = np.stack([np.asarray(frame) for frame in results["pil"].normals[0]])
    assert np.abs(shades / 127.5 - 1 - results["np"].normals[0]).max() <= 0.5 / 127.5 + 1e-6
    assert results["pt"].depths.shape == (1, 3, 1, HEIGHT, WIDTH)
    assert results["pil"].depths[0][0].mode == "L"
    assert results["pil"].images[0][0].size == (WIDTH, HEIGHT)
    normals_alone, _, _ = pipeline(
        picture, drawings, num_inference_steps=1, generator=seeded(), output_type="pt", return_dict=False
    )
    assert torch.equal(normals_alone, normals)


def test_the_callback_sees_every_step_and_may_replace_the_latents():
    pipeline, steps = tiny_geometry_pipeline(), []

    def to_zero(_pipeline, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = pipeline(IMAGE, poses(2), num_inference_steps=3, callback_on_step_end=to_zero, output_type="latent")
    assert [step for step, _ in steps] == [0, 1, 2]
    assert [timestep for _, timestep in steps] == [999, 666, 332]
    assert not output.normals.any()


def test_networks_shared_with_a_trainer_keep_their_modes_and_get_no_gradient():
    pipeline = tiny_geometry_pipeline()
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    before = [module.training for module in pipeline.unet.modules()]
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    output = pipeline(IMAGE, poses(2), num_inference_steps=1, output_type="latent")
    handle.remove()
    assert seen == [False]
    assert not output.normals.requires_grad
    assert [module.training for module in pipeline.unet.modules()] == before

    def stop(*_arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(IMAGE, poses(2), num_inference_steps=1, callback_on_step_end=stop)
    assert [module.training for module in pipeline.unet.modules()] == before


def test_bfloat16_networks_sample_finite_float32_maps_near_those_of_float32():
    geometry, animation = tiny_geometry_pipeline(), tiny_animation_pipeline()
    exact = geometry(IMAGE, poses(3), num_inference_steps=2, generator=seeded(), output_type="pt")
    geometry.to(torch.bfloat16)
    animation.to(torch.bfloat16)
    output = geometry(IMAGE, poses(3), num_inference_steps=2, generator=seeded(), output_type="pt")
    frames = animation(IMAGE, *maps(3), num_inference_steps=2, generator=seeded(), output_type="np").frames
    assert output.normals.dtype == torch.float32
    assert frames.dtype == np.float32
    assert np.isfinite(frames).all()
    assert (output.depths - exact.depths).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"image": IMAGE * 255}, r"lie in \[0, 1\]"),
        ({"image": IMAGE[:1]}, "b 3 H W"),
        ({"image": (IMAGE * 255).to(torch.uint8)}, "must be floats"),
        ({"image": torch.stack([IMAGE] * 2)}, "2 reference images were given for 1"),
        ({"poses": []}, "poses is empty"),
        ({"height": 25}, "multiples of 2"),
        ({"guidance_scales": (1.0, 2.0)}, "rgb, normal and depth"),
        ({"window_frames": 4, "window_overlap": 4}, "window_overlap"),
        ({"poses": poses(20), "window_frames": 20}, "max_frames"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"latents": torch.zeros(1, 1, 3, 12, 12, 8)}, "latents must have the shape"),
        ({"generator": [seeded(), seeded()]}, "2 generators were given for a batch of 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        tiny_geometry_pipeline()(**{"image": IMAGE, "poses": poses(2), "num_inference_steps": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"fps": [8.0, 9.0]}, "fps has 2 values for 1 clips"),
        ({"guidance_scale": 0.5}, "1 is no guidance"),
        ({"depths": maps(3)[2]}, "control maps differ"),
        ({"normals": maps(2)[1] * 2 - 1}, r"normals must lie in \[0, 1\]"),
    ],
)
def test_inputs_that_stage_2_cannot_use_are_refused_by_name(arguments, named):
    drawings, normals, depths = maps(2)
    given = {"image": IMAGE, "poses": drawings, "normals": normals, "depths": depths, "num_inference_steps": 1}
    with pytest.raises(ValueError, match=named):
        tiny_animation_pipeline()(**{**given, **arguments})


@pytest.mark.parametrize("stage", ["geometry", "animation"])
def test_ancestral_schedulers_draw_from_the_given_generator(stage):
    if stage == "geometry":
        pipeline, inputs = tiny_geometry_pipeline(prediction_type="epsilon"), (IMAGE, poses(2))
    else:
        pipeline, inputs = tiny_animation_pipeline(), (IMAGE, *maps(2))
    plain = pipeline(*inputs, num_inference_steps=3, generator=seeded(), output_type="latent")[0]
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config)

    def sample(generator):
        return pipeline(*inputs, num_inference_steps=3, generator=generator, output_type="latent")[0]

    first = sample(seeded())
    torch.manual_seed(1)  # the global generator has no influence
    assert torch.equal(sample(seeded()), first)
    assert torch.equal(sample([seeded()]), first)
    assert not torch.equal(sample(torch.Generator().manual_seed(99)), first)
    assert not torch.equal(first, plain)
