"""How strongly the control maps guide a sample: one factor for the ControlNet, and one for each map."""

import copy

import pytest
import torch
from support.recipes import HEIGHT, WIDTH, record_inputs, tiny_clip_batch, tiny_stage2_recipe
from support.tiny_pipelines import fill_zero_parameters, random_pictures, tiny_animation_pipeline

from dreamdance.models import CrossDomainControllerModel
from dreamdance.recipe import rules
from dreamdance.training.stages.training_stage import stage_of

CONTROLS = ("pose", "depth", "normal")
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}


def sample(pipeline, **settings) -> torch.Tensor:
    maps = {name: random_pictures(2, 3, HEIGHT, WIDTH, seed=m) for m, name in enumerate(CONTROLS)}
    image, generator = random_pictures(3, HEIGHT, WIDTH, seed=9), torch.Generator().manual_seed(0)
    return pipeline(image, maps=maps, generator=generator, **SETTINGS, **settings).frames


def test_the_scale_of_the_controlnet_is_that_of_its_zero_convolutions():
    """The residuals are linear in them, and a factor of two is exact in floats. 1 changes no bit."""
    pipeline = tiny_animation_pipeline()
    scaled, plain = sample(pipeline, conditioning_scale=0.5), sample(pipeline)
    assert torch.equal(sample(pipeline, conditioning_scale=1.0, control_scales={}), plain)
    assert not torch.equal(scaled, plain)
    halved = copy.deepcopy(pipeline.controlnet)
    with torch.no_grad():
        for convolution in (*halved.down_zero_convolutions, halved.mid_zero_convolution):
            convolution.weight.mul_(0.5)
            convolution.bias.mul_(0.5)
    pipeline.controlnet = halved
    assert torch.equal(sample(pipeline), scaled)


def test_a_scale_of_zero_leaves_the_video_model_alone():
    """As zero convolutions do, whose pipeline is diffusers' own (numerics/test_svd_pipeline.py)."""
    found = sample(tiny_animation_pipeline(), conditioning_scale=0.0)
    assert torch.equal(found, sample(tiny_animation_pipeline(perturbed=False)))


@pytest.mark.parametrize("attention", [False, True])
def test_scales_of_controls_weigh_the_mean_after_attention(attention):
    """The zero convolution of the weighted mean, in float64, of the features that the network itself averages."""
    torch.manual_seed(0)
    settings = {"out_channels": 8, "channels": (8, 16), "head_width": 16, "downscale_factor": 2}
    controller = CrossDomainControllerModel(controls=CONTROLS, geometry_attention=attention, **settings).eval()
    fill_zero_parameters(controller)
    maps = {name: random_pictures(2, 3, 8, 12, seed=m) for m, name in enumerate(CONTROLS)}
    averaged = record_inputs(controller.zero_convolution)
    with torch.no_grad():
        plain = controller(maps)
        scaled = controller(maps, {"depth": 0.25, "normal": 0.0})
        assert torch.equal(controller(maps, {"depth": 1.0}), plain)
        parts = []
        for name in CONTROLS:  # three times the mean with the others' features at zero
            controller(maps, {other: 0.0 for other in CONTROLS if other != name})
            parts.append(3 * averaged[-1][0][0].double())
    weighted = (parts[0] + 0.25 * parts[1]) / 3
    weight, bias = controller.zero_convolution.weight.double(), controller.zero_convolution.bias.double()
    expected = torch.nn.functional.conv2d(weighted, weight, bias)
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(averaged[0][0][0].double(), sum(parts) / 3, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"reads \['pose', 'depth', 'normal'\].*scales were given for \['mask'\]"):
        controller(maps, {"mask": 0.5})


def test_recipes_refuse_scales_of_maps_that_are_not_read_and_windows_without_room_for_the_reference():
    recipe = tiny_stage2_recipe()
    foreign = recipe.sampling.model_copy(update={"control_scales": {"mask": 0.5}})
    (problem,) = rules.problems(recipe.model_copy(update={"sampling": foreign}))
    assert "sampling.control_scales names mask, which model.controls" in problem.message
    changes = {"objective": recipe.objective.model_copy(update={"reference_first": True})}
    changes["sampling"] = recipe.sampling.model_copy(update={"window_frames": 2, "window_overlap": 1})
    (problem,) = rules.problems(recipe.model_copy(update=changes))
    assert "sampling.window_overlap 1 must be below sampling.window_frames 2 - 1" in problem.message


@pytest.mark.parametrize(("fps", "number"), [(7.0, 6.0), ("clip", 7.0), (8.5, 7.5)])
def test_training_conditions_on_the_constant_or_on_the_clips_frame_rate(fps, number):
    """The clips have 8 frames per second; SVD reads one less (diffusers: `fps = fps - 1`)."""
    objective = stage_of(tiny_stage2_recipe({"objective.fps": fps})).build()
    calls = record_inputs(objective.controlnet)
    objective(tiny_clip_batch(num_clips=1, num_frames=4))
    assert calls[0][0][3][:, 0].tolist() == [number]
    assert objective.controlnet.config.trained_fps == (None if fps == "clip" else fps)
    assert objective.make_pipeline().trained_fps == objective.controlnet.config.trained_fps
