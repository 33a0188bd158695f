"""The animation pipeline without control against diffusers' own StableVideoDiffusionPipeline, on the same networks."""

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from support.tiny_pipelines import random_pictures
from support.tiny_svd import tiny_svd_pipeline

from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.pipelines import AnimationPipeline

SIZE = 32


@pytest.fixture(scope="module")
def svd() -> StableVideoDiffusionPipeline:
    """A tiny random Stable Video Diffusion."""
    return tiny_svd_pipeline(SIZE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def animation_of(svd: StableVideoDiffusionPipeline) -> AnimationPipeline:
    """Our pipeline with copies of the same networks, its control branches at their zero initialisation.

    Copies, because it folds temporal convolutions, and the networks of diffusers must stay unchanged.
    """
    torch.manual_seed(1)
    pipeline = AnimationPipeline(
        unet=copy.deepcopy(svd.unet),
        controlnet=SpatioTemporalControlNetModel.from_unet(svd.unet),
        controller=CrossDomainControllerModel(out_channels=32, channels=(8, 16), head_width=16, downscale_factor=2),
        vae=copy.deepcopy(svd.vae),
        image_encoder=svd.image_encoder,
        scheduler=EulerDiscreteScheduler.from_config(svd.scheduler.config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_without_control_every_step_is_that_of_diffusers_svd_pipeline(svd, guidance_scale):
    """The reference has the input size of CLIP, because the two pipelines resize with different filters."""
    num_frames, num_steps = 3, 4
    image = random_pictures(1, 3, SIZE, SIZE, seed=5)
    initial = torch.randn(1, num_frames, 4, SIZE // 2, SIZE // 2, generator=seeded(6))
    theirs, ours = [], []

    def record(into: list[torch.Tensor]):
        return lambda _pipeline, _step, _timestep, tensors: into.append(tensors["latents"].clone()) or {}

    svd(
        image,
        height=SIZE,
        width=SIZE,
        num_frames=num_frames,
        num_inference_steps=num_steps,
        min_guidance_scale=guidance_scale,
        max_guidance_scale=guidance_scale,
        fps=8,
        motion_bucket_id=100,
        noise_aug_strength=0.1,
        generator=seeded(),
        latents=initial.clone(),
        output_type="latent",
        callback_on_step_end=record(theirs),
    )
    pipeline = animation_of(svd)
    controls = random_pictures(num_frames, 3, SIZE, SIZE, seed=7)
    pipeline(
        image,
        controls,
        controls,
        controls,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        fps=8,
        motion_bucket=100,
        noise_augmentation=0.1,
        generator=seeded(),
        latents=initial.clone(),
        output_type="latent",
        callback_on_step_end=record(ours),
    )
    assert len(ours) == len(theirs) == num_steps
    for our_latents, their_latents in zip(ours, theirs, strict=True):
        # relative to each step's own noise level: float32 rounds at 700 when it starts
        scale = their_latents.abs().max()
        torch.testing.assert_close(our_latents / scale, their_latents / scale, rtol=0, atol=1e-5)


def test_the_constant_frame_rate_of_training_is_the_default_of_diffusers_svd_pipeline(svd):
    """Both condition on 7 frames per second, whose number is 6, if the caller gives none."""
    image, latents = random_pictures(1, 3, SIZE, SIZE, seed=5), torch.randn(1, 2, 4, 16, 16, generator=seeded(6))
    added = []
    for unet in (svd.unet, (pipeline := animation_of(svd)).unet):
        unet.add_embedding.register_forward_pre_hook(lambda _, inputs: added.append(inputs[0].clone()))
    shared = {"num_inference_steps": 1, "output_type": "latent"}
    guidance = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}
    sizes = {"height": SIZE, "width": SIZE}
    svd(image, num_frames=2, generator=seeded(), latents=latents, **sizes, **guidance, **shared)
    controls = random_pictures(2, 3, SIZE, SIZE, seed=7)
    pipeline.controlnet.register_to_config(trained_fps=7.0)
    for fps in ({}, {"fps": 8}):
        pipeline(
            image, controls, controls, controls, generator=seeded(), latents=latents, guidance_scale=1, **fps, **shared
        )
    theirs, ours, other = added
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(other, theirs)


def test_decoded_frames_are_those_of_diffusers_svd_pipeline(svd):
    latents = torch.randn(1, 5, 4, 16, 16, generator=seeded()) * 0.2
    pipeline = animation_of(svd)
    with torch.no_grad():
        theirs = svd.decode_latents(latents, num_frames=5, decode_chunk_size=2)
        ours = pipeline._decode(latents, 2, "pt")
    expected = (theirs / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=0, atol=1e-6)
