"""Guidance in both pipelines: which passes run on which inputs; switches change memory but no result."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from support.tiny_pipelines import random_pictures, tiny_animation_pipeline, tiny_geometry_pipeline
from torch import nn

from dreamdance.pipelines import AnimationPipeline

HEIGHT, WIDTH, NUM_FRAMES = 24, 16, 3
IMAGE = random_pictures(3, HEIGHT, WIDTH, seed=1)
POSES = random_pictures(NUM_FRAMES, 3, HEIGHT, WIDTH, seed=2)
NORMALS = random_pictures(NUM_FRAMES, 3, HEIGHT, WIDTH, seed=3)
DEPTHS = random_pictures(NUM_FRAMES, 1, HEIGHT, WIDTH, seed=4)


@pytest.fixture(scope="module")
def geometry():
    return tiny_geometry_pipeline()


@pytest.fixture(scope="module")
def animation():
    return tiny_animation_pipeline()


def sample_geometry(pipeline, **options) -> torch.Tensor:
    """Latents `b f m c h w` of stage 1."""
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **options}
    output = pipeline(IMAGE, POSES, output_type="latent", **options)
    return torch.stack([output.images, output.normals, output.depths], dim=2)


def sample_animation(pipeline, **options) -> torch.Tensor:
    """Latents `b f c h w` of stage 2."""
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **options}
    return pipeline(IMAGE, POSES, NORMALS, DEPTHS, output_type="latent", **options).frames


class Calls:
    """Records the positional inputs of every forward pass of a network inside the block."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.inputs = network, []

    def __enter__(self) -> "Calls":
        self._handle = self.network.register_forward_pre_hook(lambda _, inputs: self.inputs.append(inputs))
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def test_stage1_guidance_is_the_same_batched_and_sequential(geometry):
    batched = sample_geometry(geometry, sequential_guidance=False)
    torch.testing.assert_close(sample_geometry(geometry, sequential_guidance=True), batched, rtol=1e-5, atol=1e-5)


def test_stage2_guidance_is_the_same_batched_and_sequential(animation):
    batched = sample_animation(animation, sequential_guidance=False)
    # sampling subtracts from noise of sigma 700: float32 rounds there
    rounding = 1e-6 * float(animation.scheduler.init_noise_sigma)
    torch.testing.assert_close(sample_animation(animation, sequential_guidance=True), batched, rtol=1e-5, atol=rounding)


def test_reference_features_are_computed_once_per_image_however_many_steps_and_windows(geometry):
    with Calls(geometry.reference_unet) as reference, Calls(geometry.unet) as denoiser:
        sample_geometry(geometry, num_inference_steps=3, window_frames=2, window_overlap=1)
    assert len(reference.inputs) == 2
    assert len(denoiser.inputs) == 3 * 2


def test_the_unconditional_reference_is_zero_latents_and_a_zero_embedding(geometry):
    with Calls(geometry.reference_unet) as reference, Calls(geometry.unet) as denoiser:
        sample_geometry(geometry, sequential_guidance=True, num_inference_steps=1)
    (dropped_latents, dropped_timestep, dropped_tokens), (latents, timestep, tokens) = reference.inputs
    assert not dropped_latents.any()
    assert not dropped_tokens.any()
    assert latents.any()
    assert tokens.any()
    assert not torch.cat([dropped_timestep, timestep]).any()
    (noisy, _, unconditional_tokens), (same_noisy, _, conditional_tokens) = denoiser.inputs
    assert torch.equal(noisy, same_noisy)
    assert not unconditional_tokens.any()
    assert torch.equal(conditional_tokens, tokens)


def test_without_scales_the_unconditional_pass_is_saved(geometry):
    with Calls(geometry.reference_unet) as reference, Calls(geometry.unet) as denoiser:
        unguided = sample_geometry(geometry, guidance_scales=(0, 0, 0))
    assert len(reference.inputs) == 1
    assert all(len(inputs[0]) == NUM_FRAMES * 3 for inputs in denoiser.inputs)
    assert not torch.equal(unguided, sample_geometry(geometry, guidance_scales=(0, 0, 1)))


@pytest.mark.parametrize("guided_domain", [0, 1, 2])
def test_a_scale_guides_its_own_domain_in_the_order_rgb_normal_depth(geometry, guided_domain):
    scales = [0.0, 0.0, 0.0]
    unguided = sample_geometry(geometry, num_inference_steps=1, guidance_scales=scales)
    scales[guided_domain] = 2.0
    guided = sample_geometry(geometry, num_inference_steps=1, guidance_scales=scales)
    changes = (guided - unguided).abs().amax(dim=(0, 1, 3, 4, 5))
    assert changes[guided_domain] > 1e-3
    others = [domain for domain in range(3) if domain != guided_domain]
    # equal only up to rounding: the guided pass runs in a batch of twice the size
    assert changes[others].max() < 1e-5


def test_equal_scales_are_plain_guidance_of_weight_one_more(geometry):
    """One step that predicts the sample is its prediction, which is affine in the weight."""
    results = [
        sample_geometry(geometry, num_inference_steps=1, guidance_scales=(scale,) * 3) for scale in (0.0, 1.0, 2.0)
    ]
    torch.testing.assert_close(results[2] - results[1], results[1] - results[0], rtol=1e-4, atol=1e-5)


def test_stage2_at_weight_one_runs_the_conditional_pass_only(animation):
    with Calls(animation.unet.conv_in) as inputs:
        sample_animation(animation, guidance_scale=1.0)
    assert all(len(sample) == NUM_FRAMES for (sample,) in inputs.inputs)


def test_stage2_guidance_drops_latents_and_embedding_and_keeps_the_controls(animation):
    with Calls(animation.controlnet) as controlnet:
        sample_animation(animation, sequential_guidance=True, num_inference_steps=1)
    unconditional, conditional = controlnet.inputs
    channels = animation.unet.config.out_channels
    assert torch.equal(unconditional[0][:, :, :channels], conditional[0][:, :, :channels])
    assert not unconditional[0][:, :, channels:].any()
    assert conditional[0][:, :, channels:].any()
    assert not unconditional[2].any()
    assert conditional[2].any()
    assert torch.equal(unconditional[3], conditional[3])
    assert torch.equal(unconditional[4], conditional[4])
    assert conditional[4].any()


def test_stage2_guidance_is_affine_in_its_weight(animation):
    """At a small sigma, where float32 does not round the predictions away."""
    scheduler = EulerDiscreteScheduler.from_config(animation.scheduler.config, sigma_max=1.0)
    pipeline = AnimationPipeline(**{**animation.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    results = [sample_animation(pipeline, num_inference_steps=1, guidance_scale=weight) for weight in (1.0, 2.0, 4.0)]
    step = results[1] - results[0]
    assert step.abs().max() > 1e-3
    torch.testing.assert_close(results[2] - results[1], 2 * step, rtol=1e-3, atol=2e-6)


def test_conditioning_latents_are_the_noised_reference_unscaled(animation):
    """Mode of the encoded reference plus pixel noise in units of [-1, 1], not times the scaling factor."""
    with Calls(animation.controlnet) as controlnet:
        sample_animation(animation, guidance_scale=1.0, num_inference_steps=1, noise_augmentation=0.3)
    channels = animation.unet.config.out_channels
    conditioning = controlnet.inputs[0][0][:, :, channels:]
    noise = torch.randn(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = animation.vae.encode(2 * IMAGE[None] - 1 + 0.3 * noise).latent_dist.mode()
    for frame in range(NUM_FRAMES):
        torch.testing.assert_close(conditioning[:, frame], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(controlnet.inputs[0][3], torch.tensor([[7.0, 127.0, 0.3]]))
