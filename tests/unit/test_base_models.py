"""Base models: a plain UNet that learns pictures alone, and exports that diffusers' own classes read."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from einops import rearrange
from support.recipes import (
    perturb,
    record_inputs,
    tiny_clip_batch,
    tiny_stage1_recipe,
    tiny_stage2_recipe,
    tiny_svd_config,
)
from support.tool_modules import load_tool

from dreamdance.errors import RecipeError
from dreamdance.models.autoencoding import decode_latents, encode_latents
from dreamdance.models.image_embedding import embed_images
from dreamdance.models.svd_unet import PREDICTION_TYPE
from dreamdance.recipe.model_sections import NetworkSource
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.training.export import write_pipeline
from dreamdance.training.objectives.output import Objective
from dreamdance.training.stages.training_stage import stage_of

tool = load_tool("export_base")
FLOAT32 = {"rtol": 0.0, "atol": 1e-5}


def build(recipe: Stage1Recipe | Stage2Recipe) -> Objective:
    objective = perturb(stage_of(recipe).build())
    stage_of(recipe).set_trainable(objective)
    return objective


def exported(objective: Objective, folder, dtype: str = "fp32"):
    write_pipeline(folder / "export", objective, {}, {})
    assert tool.main([str(folder / "export"), str(folder / "base"), "--dtype", dtype]) == 0
    return folder / "base"


def test_the_image_step_is_a_plain_unet_on_pictures_and_their_embedding(tmp_path):
    recipe, batch = tiny_stage1_recipe("image"), tiny_clip_batch(num_clips=3, num_frames=1)
    objective = build(recipe).eval()
    calls = record_inputs(objective.unet)
    output = objective(batch)
    (noisy, timesteps, embeddings), _ = calls[0]
    plain = UNet2DConditionModel.from_pretrained(exported(objective, tmp_path))
    with torch.no_grad():
        prediction = plain(noisy, timesteps, embeddings).sample
    latents = encode_latents(objective.vae, rearrange(batch.rgb, "b 1 c h w -> b c h w"))
    assert float((noisy - latents).abs().mean()) > 0.1, "noise was added"
    torch.testing.assert_close(output.loss, (prediction - latents).square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(embeddings, embed_images(objective.image_encoder, batch.reference), **FLOAT32)
    assert output.domain_counts.tolist() == [3, 0, 0], "rgb alone"


def test_a_frozen_video_model_keeps_what_it_was_trained_to_predict(tmp_path):
    """The note of a base model decides; one without a note, such as SVD, predicts velocities."""

    def recipe(**changes) -> Stage2Recipe:
        own = tiny_stage2_recipe()
        objective = own.objective.model_copy(update={"prediction_type": changes.pop("prediction_type")})
        model = own.model.model_copy(update={"unfreeze": "none", **changes})
        return own.model_copy(update={"objective": objective, "model": model})

    trained = stage_of(recipe(prediction_type="sample", unfreeze="all")).build()
    base = exported(trained, tmp_path)
    config = tiny_svd_config()
    source = NetworkSource(config={**config, "out_channels": config["out_channels"] + 1})
    blend = exported(stage_of(recipe(prediction_type="blend", unet=source, unfreeze="all")).build(), tmp_path / "more")
    unmarked = shutil.copytree(base, tmp_path / "unmarked")
    config = json.loads((unmarked / "config.json").read_text())
    assert config.pop(PREDICTION_TYPE) == "sample"
    (unmarked / "config.json").write_text(json.dumps(config))
    for folder, right, wrong in (
        (base, "sample", "v_prediction"),
        (unmarked, "v_prediction", "sample"),
        (blend, "blend", "sample"),
    ):
        source = NetworkSource(path=str(folder))
        assert stage_of(recipe(prediction_type=right, unet=source)).build().unet.config[PREDICTION_TYPE] == right
        for device in ("cpu", "meta"):
            with pytest.raises(RecipeError, match=rf"objective.prediction_type is {wrong}.*predicts? {right}"):
                stage_of(recipe(prediction_type=wrong, unet=source)).build(device=device)
        assert stage_of(recipe(prediction_type=right, unet=source)).build(device="meta")
        if folder == blend:
            continue  # no other prediction has as many channels
        unfrozen = stage_of(recipe(prediction_type=wrong, unet=source, unfreeze="all")).build()
        assert unfrozen.controlnet.config.prediction_type == wrong


def test_a_dry_run_without_the_base_model_names_its_folder(tmp_path):
    recipe = tiny_stage2_recipe()
    source = NetworkSource(path=str(tmp_path / "nowhere"))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"unet": source})})
    with pytest.raises(RecipeError, match=f"in_channels is 8.* no network in '{source.path}', so the published one's"):
        stage_of(recipe).build(device="meta")


def test_the_image_step_trains_what_a_plain_unet_has():
    objective = stage_of(tiny_stage1_recipe("image")).build()
    names = stage_of(tiny_stage1_recipe("image")).set_trainable(objective)
    of_one_token = ("attn2.to_q", "attn2.to_k", "norm2")
    plain = UNet2DConditionModel.from_config(objective.unet.config)
    blocks = {name for name, _ in plain.named_parameters() if not any(f".{part}." in name for part in of_one_token)}
    resnets = {name for name, _ in plain.named_parameters() if ".resnets." in name and ".norm2." in name}
    assert names == sorted(f"unet.{name}" for name in blocks | resnets)


def test_samples_of_the_image_step_are_ddim_on_the_plain_unet(tmp_path):
    recipe = tiny_stage1_recipe("image", {"sampling.num_inference_steps": 3})
    batch, objective = tiny_clip_batch(num_clips=2, num_frames=1, held_out=True), build(recipe)
    samples = stage_of(recipe).sample(objective, batch)
    plain = UNet2DConditionModel.from_pretrained(exported(objective, tmp_path))
    scheduler = objective.make_pipeline().scheduler
    scheduler.set_timesteps(3)
    embeddings = embed_images(objective.image_encoder, batch.reference)
    latents = torch.cat(
        [torch.randn(1, 12, 12, 8, generator=sample_generator(k, "sampling")) for k in batch.keys.tolist()]
    )
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            latents = scheduler.step(plain(latents, timestep, embeddings).sample, timestep, latents).prev_sample
    expected = rearrange(decode_latents(objective.vae, latents), "b c h w -> b 1 c h w")
    torch.testing.assert_close(samples.predictions["rgb"], expected, rtol=0, atol=1e-4)
    assert samples.predictions.keys() == {"rgb"}
    assert samples.grid.shape[2] == 3


def test_a_video_unet_is_written_in_half_precision_as_diffusers_reads_it(tmp_path):
    objective = build(tiny_stage2_recipe())
    folder = exported(objective, tmp_path, "fp16")
    assert [file.name for file in folder.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    plain = UNetSpatioTemporalConditionModel.from_pretrained(folder, variant="fp16").state_dict()
    expected = objective.unet.state_dict()
    assert plain.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].half().float()) for name, value in plain.items())


@pytest.mark.parametrize("train", ["geometry", "temporal"])
def test_a_unet_with_added_attention_is_refused(train, tmp_path, capsys):
    write_pipeline(tmp_path / "export", build(tiny_stage1_recipe(train)), {}, {})
    assert tool.main([str(tmp_path / "export"), str(tmp_path / "base")]) == 1
    assert "its UNet was trained with model.geometry_attention, which a plain UNet" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_a_folder_that_is_no_export_is_named(tmp_path, capsys):
    assert tool.main([str(tmp_path), str(tmp_path / "base")]) == 1
    assert f"{tmp_path}/unet/config.json is not there" in capsys.readouterr().err
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "GeometryUNetModel"}))
    assert tool.main([str(tmp_path), str(tmp_path / "base")]) == 1
