"""Autoencoders compute in float32 in bf16 trainings and pipelines; targets are samples, conditions are modes."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from einops import rearrange
from support.autoencoder_recipes import HEIGHT, WIDTH, recipe_with_autoencoder, save_autoencoder
from support.recipes import record_inputs, tiny_clip_batch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.models.autoencoding import decode_latents, encode_latents, latent_shape
from dreamdance.pipelines import AnimationPipeline, DreamDancePipeline, GeometryPipeline
from dreamdance.training.stages.training_stage import stage_of

STAGES = pytest.mark.parametrize("temporal", [False, True], ids=["stage 1", "stage 2"])


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return tiny_clip_batch(num_clips=1, num_frames=2, width=WIDTH, height=HEIGHT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both autoencoders."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for temporal in (False, True):
        save_autoencoder(folder / str(temporal), temporal=temporal)
    return folder


def make_objective(folder: Path, *, temporal: bool, form: str = "sample"):
    changes = {"objective.target_latents": form, "data.num_frames": 2}
    return stage_of(recipe_with_autoencoder(folder / str(temporal), temporal=temporal, changes=changes)).build()


def saved_autoencoder(folder: Path, *, temporal: bool) -> AutoencoderKL | AutoencoderKLTemporalDecoder:
    network_class = AutoencoderKLTemporalDecoder if temporal else AutoencoderKL
    return network_class.from_pretrained(folder / str(temporal)).double().eval()


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def targets(objective, images: Tensor, keys: list[list[int]], form: str = "sample") -> Tensor:
    """The objective's targets of pictures, as many for each key."""
    shape = (len(images) // len(keys), *latent_shape(objective.vae, images))
    return objective.encode_targets(images, objective.draw_target_noise(keys, shape, form))


@STAGES
def test_targets_of_a_bfloat16_training_are_those_of_float64(folder, batch, temporal):
    objective = make_objective(folder, temporal=temporal, form="mode").bfloat16()
    assert objective.unet.dtype == torch.bfloat16
    frames = rearrange(batch.rgb, "b f c h w -> (b f) c h w")
    exact_vae = saved_autoencoder(folder, temporal=temporal)
    found, exact = targets(objective, frames, batch.keys.tolist(), "mode"), encode_latents(exact_vae, frames)
    assert relative_error(found, exact) < 1e-4
    # the former computation: weights and arithmetic of bfloat16
    narrow = saved_autoencoder(folder, temporal=temporal).bfloat16()
    with torch.no_grad():
        rounded = narrow.encode((frames * 2 - 1).bfloat16()).latent_dist.mode() * narrow.config.scaling_factor
    assert relative_error(rounded, exact) > 1e-3


@STAGES
def test_pipelines_of_bfloat16_decode_as_in_float64(folder, tmp_path, temporal):
    pipeline_class = AnimationPipeline if temporal else GeometryPipeline
    made = make_objective(folder, temporal=temporal).make_pipeline()
    made.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    cast = pipeline_class.from_pretrained(tmp_path).to(torch.bfloat16)
    exact_vae = saved_autoencoder(folder, temporal=temporal)
    latents = torch.randn(3, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    exact = decode_latents(exact_vae, latents.double())
    for pipeline in (made.to(torch.bfloat16), loaded, cast):
        assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
        assert relative_error(decode_latents(pipeline.vae, latents), exact.double()) < 1e-4


def test_the_joint_pipeline_keeps_both_autoencoders(folder):
    stages = [make_objective(folder, temporal=temporal).make_pipeline() for temporal in (False, True)]
    joint = DreamDancePipeline.from_stages(*stages).to(torch.bfloat16)
    assert (joint.vae.dtype, joint.geometry_vae.dtype) == (torch.float32, torch.float32)
    assert (joint.unet.dtype, joint.geometry_unet.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_dtype_for_each_component_is_used_unchanged(folder, tmp_path):
    make_objective(folder, temporal=False).make_pipeline().save_pretrained(tmp_path)
    named = {"default": torch.float32, "vae": torch.bfloat16}
    pipeline = GeometryPipeline.from_pretrained(tmp_path, torch_dtype=named)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float32, torch.bfloat16)
    frames = decode_latents(pipeline.vae, torch.zeros(1, 4, 6, 4))
    assert (frames.dtype, pipeline.vae.dtype) == (torch.float32, torch.float32)


def test_an_objective_of_float64_has_an_autoencoder_of_float64(folder):
    assert make_objective(folder, temporal=False).double().vae.dtype == torch.float64


@STAGES
def test_targets_are_drawn_from_the_latent_distribution_of_each_sample(folder, batch, temporal):
    objective = make_objective(folder, temporal=temporal)
    picture = batch.rgb[0, :1, :, 16:32, 8:24]
    keys = [[0, 0, sample] for sample in range(1000)]
    drawn = targets(objective, picture.expand(1000, -1, -1, -1), keys)
    exact_vae = saved_autoencoder(folder, temporal=temporal)
    with torch.no_grad():
        distribution = exact_vae.encode(picture.double() * 2 - 1).latent_dist
    factor = exact_vae.config.scaling_factor
    # 16 numbers: five standard errors
    z = (drawn.mean(dim=0) - factor * distribution.mean[0]) / (factor * distribution.std[0] / math.sqrt(1000))
    assert z.abs().max() < 5
    assert (drawn.std(dim=0) / (factor * distribution.std[0]) - 1).abs().max() < 5 / math.sqrt(2000)


@STAGES
def test_a_draw_belongs_to_the_sample_and_not_to_its_batch(folder, batch, temporal):
    objective = make_objective(folder, temporal=temporal)
    frames = batch.rgb[0, :2].repeat(2, 1, 1, 1)
    together = targets(objective, frames, [[0, 0, 1], [0, 0, 2]])
    torch.testing.assert_close(targets(objective, frames[2:], [[0, 0, 2]]), together[2:])
    first, second, third, fourth = together
    assert not torch.allclose(first, third)  # the same picture in another sample
    assert not torch.allclose(first - second, third - fourth)  # each frame has a draw of its own
    assert not torch.allclose(targets(objective, frames[2:], [[0, 1, 2]]), together[2:])  # next epoch


def test_the_recipe_may_keep_the_mode(folder, batch):
    losses = {}
    for form in ("sample", "mode"):
        objective = make_objective(folder, temporal=False, form=form).eval()
        calls = record_inputs(objective.unet)
        losses[form] = objective(batch).loss.item()
        objective.encode_targets = lambda images, _, objective=objective: encode_latents(objective.vae, images)
        objective(batch)
        (drawn, *_), (mode, *_) = (arguments for arguments, _ in calls)
        assert torch.equal(drawn, mode) is (form == "mode")
    assert losses["sample"] != losses["mode"]


def test_conditions_are_the_mode(folder, batch):
    vae = copy.deepcopy(make_objective(folder, temporal=False).vae)
    mode = encode_latents(vae, batch.reference)
    stage_1 = make_objective(folder, temporal=False).eval()
    calls = record_inputs(stage_1.reference_unet)
    stage_1(batch)
    assert torch.equal(calls[0][0][0], mode)

    stage_2 = make_objective(folder, temporal=True).eval()
    calls = record_inputs(stage_2.controlnet)
    for _ in range(2):
        stage_2(batch)
    first, second = (arguments[0].chunk(2, dim=2)[1][:, 0] for arguments, _ in calls)
    noised = stage_2._encode_reference_pixels(batch.reference, stage_2.draw(batch))
    assert torch.equal(first, second)
    assert torch.equal(first, noised)


@STAGES
def test_a_clip_is_encoded_once_for_all_noise_levels_and_its_losses_keep_their_bits(folder, batch, temporal):
    objective = make_objective(folder, temporal=temporal).eval()
    quantiles = (0.1, 0.5, 0.9)
    with torch.no_grad():
        apart = [objective(batch, noise_quantile=quantile).sums() for quantile in quantiles]
        encoded, embedded = record_inputs(objective.vae.encoder), record_inputs(objective.image_encoder)
        together = [objective(prepared).sums() for prepared in objective.prepare_levels(batch, quantiles)]
    assert torch.equal(torch.stack(together), torch.stack(apart))
    assert len({sums[0].item() for sums in together}) == len(quantiles)
    num_domains = 1 if temporal else 3
    assert len(encoded) == batch.pose.shape[1] * num_domains + 1, "each frame and the reference, one by one on the CPU"
    assert len(embedded) == 1
