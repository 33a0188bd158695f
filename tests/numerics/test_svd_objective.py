"""The objective of stage 2 against one step of diffusers' SVD pipeline and Euler scheduler."""

import math
from typing import Any

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from einops import rearrange
from support.tiny_svd import assert_close_to_rounding, tiny_svd_pipeline
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.diffusion.noise import draw_noise, make_svd_scheduler
from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.models.autoencoding import encode_latents
from dreamdance.recipe.schema import AnimationObjectiveSettings as Settings
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.training.objectives.animation import AnimationObjective

SIZE, NUM_FRAMES = 32, 3
FPS, MOTION_BUCKET, NOISE_AUGMENTATION = 8.0, 100, 0.1
KEY = [7, 1, 42]
# logarithms of draws vary only by this, so that a test can choose sigma and the strength of the augmentation
NEARLY_FIXED = 1e-9


@pytest.fixture(scope="module")
def svd() -> StableVideoDiffusionPipeline:
    """A tiny random Stable Video Diffusion."""
    return tiny_svd_pipeline(SIZE)


def make_objective(svd: StableVideoDiffusionPipeline, sigma: float) -> AnimationObjective:
    settings = Settings(
        sigma_log_mean=math.log(sigma),
        sigma_log_std=NEARLY_FIXED,
        augmentation_log_mean=math.log(NOISE_AUGMENTATION),
        augmentation_log_std=NEARLY_FIXED,
        motion_bucket=MOTION_BUCKET,
        fps="clip",
        target_latents="mode",
        geometry_width=SIZE,
        geometry_height=SIZE,
    )
    controller = CrossDomainControllerModel(["pose"], svd.unet.config.block_out_channels[0], (8, 16), 8, 2)
    controlnet = SpatioTemporalControlNetModel.from_unet(svd.unet)
    return AnimationObjective(svd.unet, controlnet, controller, svd.vae, svd.image_encoder, settings=settings).eval()


def make_batch() -> ClipBatch:
    generator = torch.Generator().manual_seed(2)
    frames = torch.rand(1, NUM_FRAMES, 3, SIZE, SIZE, generator=generator)
    return ClipBatch(
        maps={"rgb": frames, "pose": frames.flip(-1)},
        reference=torch.rand(1, 3, SIZE, SIZE, generator=generator),
        fps=torch.tensor([FPS]),
        keys=torch.tensor([KEY]),
        clip_ids=["random"],
    )


def noisy_latents(svd: StableVideoDiffusionPipeline, batch: ClipBatch, sigma: float) -> tuple[Tensor, Tensor]:
    """Clean target latents and the intermediate values of the objective at `sigma`."""
    latents = encode_latents(svd.vae, rearrange(batch.rgb, "b f c h w -> (b f) c h w"))
    latents = rearrange(latents, "(b f) c h w -> b f c h w", b=1)
    return latents, latents + sigma * draw_noise([KEY], latents.shape[1:])


def run_diffusers_once(
    svd: StableVideoDiffusionPipeline, batch: ClipBatch, noisy: Tensor, sigma: float
) -> dict[str, Any]:
    """The inputs of diffusers' UNet at `sigma`, and the denoised latents that it computes from the output."""
    record: dict[str, Any] = {}

    def keep(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any], output: tuple[Tensor]) -> None:
        record.update(sample=positional[0], timestep=positional[1], **named)
        # the step itself, repeated here because the pipeline returns only the next latents
        scheduler = make_svd_scheduler()
        scheduler.set_timesteps(sigmas=[sigma, 0.0])
        scheduler.scale_model_input(noisy, scheduler.timesteps[0])
        record["denoised"] = scheduler.step(output[0], scheduler.timesteps[0], noisy).pred_original_sample

    handle = svd.unet.register_forward_hook(keep, with_kwargs=True)
    svd.scheduler.set_timesteps(sigmas=[sigma, 0.0])
    svd(
        batch.reference,
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        sigmas=[sigma, 0.0],
        min_guidance_scale=1.0,
        max_guidance_scale=1.0,
        fps=int(FPS),
        motion_bucket_id=MOTION_BUCKET,
        noise_aug_strength=NOISE_AUGMENTATION,
        generator=sample_generator(KEY, "augmentation noise"),
        # the pipeline multiplies them by this number
        latents=noisy / svd.scheduler.init_noise_sigma,
        output_type="latent",
    )
    handle.remove()
    return record


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_the_objective_gives_its_networks_the_inputs_that_diffusers_gives_svd(svd, sigma):
    batch = make_batch()
    _, noisy = noisy_latents(svd, batch, sigma)
    expected = run_diffusers_once(svd, batch, noisy, sigma)
    objective = make_objective(svd, sigma)
    calls: list[tuple[Any, ...]] = []
    objective.controlnet.register_forward_pre_hook(lambda network, arguments: calls.append(arguments))
    with torch.no_grad():
        objective(batch)
    sample, timestep, embeddings, added_time_ids, _ = calls[0]
    assert_close_to_rounding(sample, expected["sample"])
    assert_close_to_rounding(embeddings, expected["encoder_hidden_states"])
    torch.testing.assert_close(added_time_ids, expected["added_time_ids"], rtol=1e-6, atol=0)
    # ln(1) / 4 is 0 up to rounding
    torch.testing.assert_close(timestep[0], expected["timestep"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_objective_s_loss_is_the_weighted_error_of_diffusers_denoised_latents(svd, sigma):
    batch = make_batch()
    latents, noisy = noisy_latents(svd, batch, sigma)
    denoised = run_diffusers_once(svd, batch, noisy, sigma)["denoised"]
    expected = (sigma**2 + 1) / sigma**2 * (denoised - latents).square().mean()
    with torch.no_grad():
        loss = make_objective(svd, sigma)(batch).loss
    # at small sigma the error is a small difference of large numbers
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
