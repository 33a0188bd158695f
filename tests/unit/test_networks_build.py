"""Networks are built from folders or from the seed, and trained weights are taken from other runs without gaps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file, save_file
from support.recipes import perturb, tiny_stage1_recipe, tiny_stage2_recipe, tiny_svd_config, tiny_unet_config
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import CheckpointError, MissingInputError, RecipeError
from dreamdance.training.networks.build import exportable
from dreamdance.training.networks.initial_weights import load_networks
from dreamdance.training.stages.training_stage import stage_of

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}

# widths that fit the published autoencoder, which the recipe's rules expect in a folder
DEEP_ENOUGH = {"model.pose_channels": [8, 8, 8, 16]}


def equal_weights(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def save_base_networks(folder: Path, *, temporal: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A tiny random base model in the folder layout of the published ones."""
    config = tiny_svd_config() if temporal else tiny_unet_config()
    config |= {"in_channels": 8 if temporal else 4, "out_channels": 4}
    unet = (UNetSpatioTemporalConditionModel if temporal else UNet2DConditionModel)(**config)
    vae_config = dict(VAE_CONFIG)
    if temporal:
        del vae_config["norm_num_groups"]
        vae_config["block_out_channels"] = [32, 32]
    else:
        vae_config["up_block_types"] = ["UpDecoderBlock2D"] * 2
    vae = (AutoencoderKLTemporalDecoder if temporal else AutoencoderKL)(**vae_config)
    clip_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=24,
    )
    clip = CLIPVisionModelWithProjection(clip_config)
    for name, network in (("unet", unet), ("vae", vae), ("image_encoder", clip)):
        network.save_pretrained(folder / name)
    return unet, vae, clip


def from_folder(folder: Path) -> dict[str, Any]:
    return {
        "model.unet": {"path": str(folder), "subfolder": "unet"},
        "model.autoencoder": {"path": str(folder), "subfolder": "vae"},
        "model.image_encoder": {"path": str(folder / "image_encoder")},
        "data.width": 64,
        "data.height": 64,
    }


def test_random_networks_follow_from_the_recipes_seed_alone():
    first = stage_of(tiny_stage1_recipe("temporal")).build()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = stage_of(tiny_stage1_recipe("temporal")).build()
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_weights(first, again)
    assert not equal_weights(first, stage_of(tiny_stage1_recipe("temporal", {"seed": 1})).build())


def test_reference_and_denoising_unet_begin_as_the_same_base():
    objective = stage_of(tiny_stage1_recipe("domains")).build()
    reference, unet = objective.reference_unet.state_dict(), objective.unet.state_dict()
    assert reference.keys() < unet.keys()
    assert all(torch.equal(reference[name], unet[name]) for name in reference)


def test_stage_1_reads_its_base_from_a_folder(tmp_path):
    unet, vae, clip = save_base_networks(tmp_path, temporal=False)
    objective = stage_of(tiny_stage1_recipe("domains", {**from_folder(tmp_path), **DEEP_ENOUGH})).build()
    loaded = objective.unet.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in unet.state_dict().items())
    assert equal_weights(objective.vae, vae)
    assert equal_weights(objective.image_encoder, clip)
    # two levels of the autoencoder halve once
    assert objective.pose_encoder.config.downscale_factor == 2


def test_stage_2_reads_its_base_from_a_folder(tmp_path):
    unet, vae, clip = save_base_networks(tmp_path, temporal=True)
    objective = stage_of(tiny_stage2_recipe({**from_folder(tmp_path), "objective.geometry_height": 16})).build()
    assert equal_weights(objective.unet, unet)
    assert equal_weights(objective.vae, vae)
    assert equal_weights(objective.image_encoder, clip)
    assert type(objective.vae) is AutoencoderKLTemporalDecoder


@pytest.mark.parametrize(
    ("missing", "key"), [("unet", "model.unet"), ("vae", "model.autoencoder"), ("image_encoder", "model.image_encoder")]
)
def test_a_missing_folder_is_named_with_the_recipes_key(tmp_path, missing, key):
    save_base_networks(tmp_path, temporal=False)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(MissingInputError, match=rf"{key}\.path.*{missing}.*recipes/demo"):
        stage_of(tiny_stage1_recipe("domains", {**from_folder(tmp_path), **DEEP_ENOUGH})).build()


def test_pickled_weights_are_not_read(tmp_path):
    unet, _, _ = save_base_networks(tmp_path, temporal=False)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(MissingInputError, match=r"model\.unet\.path.*no safetensors"):
        stage_of(tiny_stage1_recipe("domains", {**from_folder(tmp_path), **DEEP_ENOUGH})).build()


def test_unknown_constructor_arguments_are_refused_by_key():
    changes = {"model.unet.config": tiny_unet_config() | {"widths": [1, 2]}}
    with pytest.raises(RecipeError, match=r"model\.unet\.config.*widths"):
        stage_of(tiny_stage1_recipe("domains", changes)).build()


@pytest.mark.parametrize("key", ["in_channels", "out_channels", "cross_attention_dim"])
def test_networks_that_do_not_fit_together_are_refused_by_key(key):
    changes = {f"model.unet.config.{key}": 20}
    with pytest.raises(RecipeError, match=rf"model\.unet\.config\.{key} is 20"):
        stage_of(tiny_stage1_recipe("domains", changes)).build()
    with pytest.raises(RecipeError, match=rf"model\.unet\.config\.{key} is 20"):
        stage_of(tiny_stage2_recipe(changes)).build()


def test_on_the_meta_device_absent_weights_have_their_published_size(tmp_path):
    absent = {
        "model.unet": {"path": str(tmp_path / "absent"), "subfolder": "unet"},
        "model.autoencoder": {"path": str(tmp_path / "absent"), "subfolder": "vae"},
        "model.image_encoder": {"path": str(tmp_path / "absent")},
        "data.width": 256,
        "data.height": 384,
    }
    stage1 = stage_of(tiny_stage1_recipe("temporal", {**absent, "model.pose_channels": [16, 32, 96, 256]})).build(
        device="meta"
    )
    added = [stage1.unet.geometry_parameters(), stage1.unet.temporal_parameters(), stage1.unet.domain_parameters()]
    assert count(stage1.unet) - sum(p.numel() for parameters in added for p in parameters.values()) == 859_520_964
    # published: 83.7 M for the autoencoder, 303.97 M for ViT-L's vision tower with its projection of 0.79 M
    assert count(stage1.vae) == 83_653_863
    assert count(stage1.image_encoder) == 303_966_208
    sizes = {
        "objective.geometry_width": 128,
        "objective.geometry_height": 192,
        "model.controller_channels": [16, 32, 96, 256],
    }
    stage2 = stage_of(tiny_stage2_recipe({**absent, **sizes})).build(device="meta")
    assert count(stage2.unet) == 1_524_623_082
    # published: 632.08 M for ViT-H's vision tower with its projection
    assert count(stage2.image_encoder) == 632_076_800
    assert all(parameter.is_meta for objective in (stage1, stage2) for parameter in objective.parameters())


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def export(objective: nn.Module, folder: Path) -> Path:
    objective.make_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("before", "after"), [("domains", "geometry"), ("geometry", "temporal"), ("domains", "domains")]
)
def test_an_export_continues_in_the_next_step_with_new_branches_at_their_zero_start(tmp_path, before, after):
    trained = perturb(stage_of(tiny_stage1_recipe(before)).build())
    folder = export(trained, tmp_path / "export")
    objective = stage_of(tiny_stage1_recipe(after, {"seed": 5})).build()
    fresh = stage_of(tiny_stage1_recipe(after, {"seed": 5})).build()
    load_networks(objective, folder)
    for name, network in exportable(objective).items():
        old = exportable(trained)[name].state_dict()
        new = network.state_dict()
        assert all(torch.equal(new[key], old[key]) for key in old), name
        untouched = exportable(fresh)[name].state_dict()
        assert all(torch.equal(new[key], untouched[key]) for key in new.keys() - old.keys())
    added = {"domains": 0, "geometry": 4 * 5, "temporal": 4 * 5}[after]
    assert len(objective.unet.state_dict()) - len(trained.unet.state_dict()) == added


def test_stage_2_continues_from_its_own_export(tmp_path):
    trained = perturb(stage_of(tiny_stage2_recipe()).build())
    objective = stage_of(tiny_stage2_recipe({"seed": 5})).build()
    load_networks(objective, export(trained, tmp_path / "export"))
    assert set(exportable(objective)) == {"unet", "controlnet", "controller"}
    assert all(equal_weights(network, exportable(trained)[name]) for name, network in exportable(objective).items())


def test_leaving_out_a_trained_branch_is_refused(tmp_path):
    folder = export(stage_of(tiny_stage1_recipe("temporal")).build(), tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"unet.*has unknown .*temporal.*and 15 more"):
        load_networks(stage_of(tiny_stage1_recipe("geometry")).build(), folder)


def test_half_a_branch_is_refused(tmp_path):
    folder = export(stage_of(tiny_stage1_recipe("geometry")).build(), tmp_path / "export")
    edit(
        folder / "unet", lambda weights: weights.pop("mid_block.attentions.0.transformer_blocks.0.geometry.to_out.bias")
    )
    with pytest.raises(CheckpointError, match=r"lacks mid_block.*geometry\.to_out\.bias"):
        load_networks(stage_of(tiny_stage1_recipe("geometry")).build(), folder)


def test_a_missing_base_weight_and_another_shape_are_refused_together(tmp_path):
    folder = export(stage_of(tiny_stage1_recipe("domains")).build(), tmp_path / "export")

    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["conv_in.bias"]
        weights["conv_out.bias"] = torch.zeros(5)

    edit(folder / "unet", damage)
    with pytest.raises(CheckpointError, match=r"lacks conv_in\.bias; it has another shape of conv_out\.bias"):
        load_networks(stage_of(tiny_stage1_recipe("geometry")).build(), folder)


def test_an_export_without_a_network_is_refused(tmp_path):
    folder = export(stage_of(tiny_stage1_recipe("domains")).build(), tmp_path / "export")
    (folder / "pose_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingInputError, match=r"init_from.*pose_encoder"):
        load_networks(stage_of(tiny_stage1_recipe("domains")).build(), folder)


def edit(folder: Path, change: Any) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
