"""The base models in recipes/base: small, plain diffusers of the recipes' shapes, trained on training dancers alone."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from safetensors import safe_open

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS, render_clip
from dreamdance.data.planning import plan_dancers
from dreamdance.diffusion.noise import blend_reference, edm_preconditioning, make_ddpm_scheduler
from dreamdance.models import ImageEmbeddingStandIn, PatchAutoencoder
from dreamdance.models.svd_unet import PREDICTION_TYPE
from dreamdance.recipe.parse import load_recipe

BASES = Path("recipes/base")
MAX_BYTES = 8_000_000
NETWORKS = {"image": UNet2DConditionModel, "video": UNetSpatioTemporalConditionModel}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_base_is_small_plain_fp16_diffusers_of_its_recipes_shape(name):
    (weights,) = (BASES / name).glob("*.safetensors")
    assert weights.stat().st_size <= MAX_BYTES
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    stored = json.loads((BASES / name / "config.json").read_text(encoding="utf-8"))
    assert not stored.get("_name_or_path"), "no folder of the machine that made it"
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)
    recipe = load_recipe(BASES / f"{name}.yaml")
    fresh = NETWORKS[name](**recipe.model.unet.config)
    base, loaded = NETWORKS[name].from_pretrained(BASES / name, variant="fp16", output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    own = {key: value for key, value in fresh.config.items() if not key.startswith("_")}
    assert own == {key: base.config[key] for key in own}


def test_the_card_names_the_hashes_of_both_files():
    (line,) = re.findall(
        r"^\| SHA-256 of the file \|.*$", (BASES / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    files = [file for name in NETWORKS for file in (BASES / name).glob("*.safetensors")]
    assert re.findall(r"`(\w+)`", line) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_the_bases_saw_training_dancers_and_the_demo_asks_for_others():
    base, demo = (load_recipe(path) for path in (BASES / "prepare.yaml", Path("recipes/demo/prepare.yaml")))
    seen = {seed for part in plan_dancers(base.dancers, 16)["train"] for seed in part.make.seeds}
    asked = {seed for part in plan_dancers(demo.dancers, 16)["validation"] for seed in part.make.seeds}
    assert all(seed in TRAINING_SEEDS for seed in seen)
    assert all(seed in HELD_OUT_SEEDS for seed in asked)
    assert (len(seen), len(asked)) == (1000, 12)
    assert (base.dancers.width, base.dancers.height) == (demo.dancers.width, demo.dancers.height)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Eight frames of a held-out dancer, `8 3 96 64` in [0, 1]."""
    clip = render_clip(HELD_OUT_SEEDS[0], num_frames=8, width=64, height=96)
    return rearrange(torch.from_numpy(clip.rgb.astype(np.float32) / 255), "f h w c -> f c h w")


@torch.no_grad()
def latents_and_embedding(frames: torch.Tensor, image_encoder: ImageEmbeddingStandIn):
    vae = PatchAutoencoder(4)
    latents = vae.encode(frames * 2 - 1).latent_dist.mode()
    return latents, vae.config.scaling_factor, image_encoder(frames[:1]).image_embeds[:, None]


@torch.no_grad()
def test_the_image_base_denoises_people_that_it_never_saw(frames):
    latents, factor, embedding = latents_and_embedding(frames, ImageEmbeddingStandIn(64))
    latents = latents * factor
    base = UNet2DConditionModel.from_pretrained(BASES / "image", variant="fp16", torch_dtype=torch.float32)
    scheduler = make_ddpm_scheduler(prediction_type="sample", zero_terminal_snr=True)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for timestep, share in ((400, 0.25), (700, 0.5), (999, 0.8)):
        times = torch.full((len(latents),), timestep)
        noisy = scheduler.add_noise(latents, noise, times)
        found = base(noisy, times, embedding.expand(len(latents), -1, -1)).sample
        error, spread = (found - latents).square().mean(), (latents - latents.mean()).square().mean()
        assert error < share * spread, timestep


@torch.no_grad()
def test_the_video_base_denoises_clips_that_it_never_saw(frames):
    latents, factor, embedding = latents_and_embedding(frames, ImageEmbeddingStandIn(64))
    reference = repeat(latents[:1], "1 ... -> f ...", f=len(latents))
    latents = latents * factor
    base = UNetSpatioTemporalConditionModel.from_pretrained(BASES / "video", variant="fp16", torch_dtype=torch.float32)
    assert base.config[PREDICTION_TYPE] == "blend"
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    time_ids = torch.tensor([[7.0, 127.0, 0.005]])
    repeated = (reference * factor - latents).square().mean()
    for sigma in (0.1, 0.5, 2.0):
        _, _, c_in, timestep = edm_preconditioning(torch.tensor([sigma]))
        noisy = latents + sigma * noise
        sample = torch.cat([c_in * noisy, reference], dim=1)[None]
        found = base(sample, timestep, embedding, time_ids).sample[0]
        error = (blend_reference(found, factor * reference) - latents).square().mean()
        assert error < 0.5 * repeated, sigma
