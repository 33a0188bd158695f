"""Steps of diffusers' own StableVideoDiffusionPipeline, repeated with the parts of stage 2."""

import math
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from einops import rearrange, repeat
from support.recipes import tiny_clip_batch, tiny_stage2_recipe
from support.tiny_svd import assert_close_to_rounding, tiny_svd_pipeline
from torch import Tensor, nn

from dreamdance.diffusion.guidance import classifier_free_guidance
from dreamdance.diffusion.noise import (
    edm_denoised,
    edm_preconditioning,
    edm_velocity,
    edm_weight,
    make_svd_scheduler,
)
from dreamdance.models import run_svd_unet
from dreamdance.models.autoencoding import decode_latents, encode_latents
from dreamdance.models.image_embedding import embed_images
from dreamdance.training.stages.training_stage import stage_of

SIZE, NUM_FRAMES, NUM_STEPS = 32, 3, 4
FPS, MOTION_BUCKET, NOISE_AUGMENTATION = 8, 100, 0.1


class FirstCall:
    """Records the arguments and the result of the first call of a UNet."""

    def __init__(self, unet: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.output: Tensor | None = None
        unet.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any], output: tuple[Tensor]) -> None:
        if self.output is None:
            conditions = {name: value for name, value in named.items() if name != "return_dict"}
            self.inputs = {"sample": positional[0], "timestep": positional[1], **conditions}
            self.output = output[0]


@pytest.fixture
def svd() -> StableVideoDiffusionPipeline:
    """A tiny random Stable Video Diffusion."""
    return tiny_svd_pipeline(SIZE)


def reference_image() -> Tensor:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def initial_noise() -> Tensor:
    return torch.randn(1, NUM_FRAMES, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(3))


def run_diffusers(svd: StableVideoDiffusionPipeline, *, guidance: float, **arguments: Any) -> Tensor:
    return svd(
        reference_image(),
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        num_inference_steps=NUM_STEPS,
        min_guidance_scale=guidance,
        max_guidance_scale=guidance,
        fps=FPS,
        motion_bucket_id=MOTION_BUCKET,
        noise_aug_strength=NOISE_AUGMENTATION,
        decode_chunk_size=2,
        generator=torch.Generator().manual_seed(4),
        latents=initial_noise(),
        **arguments,
    ).frames


def our_conditions(svd: StableVideoDiffusionPipeline) -> dict[str, Tensor]:
    """Conditioning latents `b f c h w`, image embedding and added time ids, as stage 2 makes them."""
    pixel_noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    # strengths are in units of pixels in [-1, 1], which are half of those in [0, 1]
    noised = reference_image() + 0.5 * NOISE_AUGMENTATION * pixel_noise
    latents = encode_latents(svd.vae, noised, scaled=False)
    return {
        "latents": repeat(latents, "b c h w -> b f c h w", f=NUM_FRAMES),
        "embedding": embed_images(svd.image_encoder, reference_image()),
        "added_time_ids": torch.tensor([[FPS - 1.0, MOTION_BUCKET, NOISE_AUGMENTATION]]),
    }


def test_the_unet_gets_the_same_inputs_as_in_svd_s_pipeline(svd):
    call = FirstCall(svd.unet)
    run_diffusers(svd, guidance=1.0, output_type="latent")
    sigma = svd.scheduler.sigmas[0]
    noisy = initial_noise() * svd.scheduler.init_noise_sigma
    _, _, c_in, timestep = edm_preconditioning(sigma)
    conditions = our_conditions(svd)
    assert_close_to_rounding(torch.cat([c_in * noisy, conditions["latents"]], dim=2), call.inputs["sample"])
    assert_close_to_rounding(timestep, call.inputs["timestep"])
    assert_close_to_rounding(conditions["embedding"], call.inputs["encoder_hidden_states"])
    assert torch.equal(conditions["added_time_ids"], call.inputs["added_time_ids"])


def test_a_dropped_reference_equals_the_unconditional_input_of_svd_s_pipeline(svd):
    call = FirstCall(svd.unet)
    run_diffusers(svd, guidance=2.5, output_type="latent")
    conditions = our_conditions(svd)
    conditioning, embedding = call.inputs["sample"][:, :, 4:], call.inputs["encoder_hidden_states"]
    assert not conditioning[0].any()
    assert not embedding[0].any()
    assert_close_to_rounding(conditions["latents"], conditioning[1:])
    assert_close_to_rounding(conditions["embedding"], embedding[1:])


def test_one_denoising_step_equals_that_of_svd(svd):
    call, after = FirstCall(svd.unet), []
    run_diffusers(
        svd,
        guidance=1.0,
        output_type="latent",
        callback_on_step_end=lambda pipeline, step, timestep, values: after.append(values["latents"]) or values,
    )
    assert torch.equal(run_svd_unet(svd.unet, **call.inputs), call.output)
    sigma, next_sigma = svd.scheduler.sigmas[:2]
    noisy = initial_noise() * svd.scheduler.init_noise_sigma
    c_skip, c_out, _, _ = edm_preconditioning(sigma)
    denoised = c_skip * noisy + c_out * call.output
    assert_close_to_rounding(noisy + (noisy - denoised) / sigma * (next_sigma - sigma), after[0])


def test_all_steps_with_guidance_and_decoding_give_svd_s_frames(svd):
    expected = run_diffusers(svd, guidance=2.5, output_type="pt")
    conditions, scheduler = our_conditions(svd), make_svd_scheduler()
    scheduler.set_timesteps(NUM_STEPS)
    latents = initial_noise() * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            unconditional, conditional = (
                run_svd_unet(
                    svd.unet,
                    torch.cat([scaled, kept * conditions["latents"]], dim=2),
                    timestep,
                    kept * conditions["embedding"],
                    conditions["added_time_ids"],
                )
                for kept in (0.0, 1.0)
            )
            prediction = classifier_free_guidance(conditional, unconditional, 2.5)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    frames = decode_latents(
        svd.vae, rearrange(latents, "b f c h w -> (b f) c h w"), chunk_size=2, num_frames=NUM_FRAMES
    )
    torch.testing.assert_close(rearrange(frames, "(b f) c h w -> b f c h w", b=1), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("num_steps", [1, 25])
def test_preconditioning_and_timesteps_are_those_of_the_euler_scheduler_at_every_sigma(num_steps):
    scheduler = make_svd_scheduler()
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(5)
    clean, noise, output = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    assert scheduler.sigmas[0] == 700
    assert num_steps == 1 or scheduler.sigmas[-2] == pytest.approx(0.002)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        c_skip, c_out, c_in, our_timestep = edm_preconditioning(sigma)
        noisy = clean + sigma * noise
        assert_close_to_rounding(our_timestep, timestep)
        assert_close_to_rounding(c_in * noisy, scheduler.scale_model_input(noisy, timestep))
        found = scheduler.step(output, timestep, noisy)
        assert_close_to_rounding(c_skip * noisy + c_out * output, found.pred_original_sample)


def test_a_network_that_meets_the_training_target_denoises_in_one_euler_step():
    scheduler = make_svd_scheduler()
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(5)
    clean, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = scheduler.sigmas[0].double()
    c_skip, c_out, _, _ = edm_preconditioning(sigma)
    noisy = clean + sigma * noise
    scheduler.scale_model_input(noisy, scheduler.timesteps[0])
    target = (clean - c_skip * noisy) / c_out
    # the weighted error of the denoised latents is the plain error of the network's output
    error = edm_weight(sigma) * ((c_skip * noisy + c_out * (target + 0.1)) - clean).square()
    torch.testing.assert_close(error, torch.full_like(error, 0.01))
    found = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
    torch.testing.assert_close(found.double(), clean, rtol=0, atol=700 * 1e-6)


def test_a_predicted_sample_takes_the_steps_that_diffusers_takes_with_it():
    """diffusers' Euler scheduler knows sample prediction; SVD's continuous timesteps it has for velocities alone."""
    scheduler = make_svd_scheduler()
    other = EulerDiscreteScheduler.from_config(scheduler.config, prediction_type="sample")
    scheduler.set_timesteps(10)
    other.set_timesteps(10)
    other.set_begin_index(0)  # several of its integer timesteps are equal
    torch.testing.assert_close(other.sigmas, scheduler.sigmas)
    generator = torch.Generator().manual_seed(5)
    clean, noise, sample = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    for number, sigma in enumerate(scheduler.sigmas[:-1]):
        noisy = clean + sigma * noise
        timestep, of_other = scheduler.timesteps[number], other.timesteps[number]
        velocity = edm_velocity(sample, scheduler.scale_model_input(noisy, timestep), timestep)
        found = scheduler.step(velocity, timestep, noisy).prev_sample
        other.scale_model_input(noisy, of_other)
        assert_close_to_rounding(found, other.step(sample, of_other, noisy).prev_sample)
        assert_close_to_rounding(edm_denoised(velocity, noisy, sigma, "v_prediction"), sample)
        assert torch.equal(edm_denoised(sample, noisy, sigma, "sample"), sample)


@pytest.mark.parametrize(
    ("prediction_type", "num_steps", "guidance_scale"),
    [*(("sample", steps, 1.0) for steps in (1, 3, 10)), ("blend", 3, 1.0), ("blend", 3, 2.0)],
)
def test_with_sample_prediction_the_loss_is_of_the_output_and_the_pipeline_ends_at_it(
    prediction_type, num_steps, guidance_scale
):
    """A network whose share is 3/4 everywhere ends at three quarters of the reference's latents, which are scaled."""
    recipe, fixed = tiny_stage2_recipe(), {"prediction_type": prediction_type, "augmentation_log_mean": -20.0}
    recipe = recipe.model_copy(update={"objective": recipe.objective.model_copy(update=fixed)})
    if prediction_type == "blend":
        recipe.model.unet.config["out_channels"] += 1
    objective = stage_of(recipe).build().eval()
    batch = tiny_clip_batch(num_clips=2, num_frames=4)
    latents = encode_latents(objective.vae, rearrange(batch.rgb, "b f c h w -> (b f) c h w"))
    own = torch.linspace(-1, 1, latents.shape[1])
    sample = rearrange(own, "c -> 1 1 c 1 1").expand(2, 4, -1, *latents.shape[2:])
    if prediction_type == "blend":
        own = torch.cat([own, torch.tensor([math.log(3)])])
        unguided = 0.25 * sample  # SVD guides away from a reference of zeros
        sample = unguided + 0.75 * encode_latents(objective.vae, batch.reference)[:, None]
    with torch.no_grad():
        objective.unet.conv_out.weight.zero_()
        objective.unet.conv_out.bias.copy_(own)
    error = (latents - sample.flatten(0, 1)).square().mean()
    torch.testing.assert_close(objective(batch).loss, error, rtol=1e-5, atol=0)
    pipeline = objective.make_pipeline()
    assert pipeline.controlnet.config.prediction_type == prediction_type
    maps = {name: batch.maps[name][:1] for name in pipeline.controls}
    conditions = {"guidance_scale": guidance_scale, "noise_augmentation": 0.0}
    if guidance_scale > 1:
        sample = unguided + guidance_scale * (sample - unguided)
    frames = pipeline(
        batch.reference[:1], maps=maps, num_inference_steps=num_steps, output_type="latent", **conditions
    ).frames
    torch.testing.assert_close(frames, sample[:1], rtol=0, atol=1e-3)
