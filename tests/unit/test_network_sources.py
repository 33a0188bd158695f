"""Sources of networks: one source or an error that names the recipe's key, safetensors only, shapes on meta."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.recipes import tiny_unet_config
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import MissingInputError, RecipeError
from dreamdance.models import PatchAutoencoder
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET
from dreamdance.models.image_embedding import ImageEmbeddingStandIn
from dreamdance.recipe.schema import AutoencoderSource, ImageEncoderSource, NetworkSource
from dreamdance.training.networks.sources import open_autoencoder, open_image_encoder, open_unet, read_weights


def open_tiny(source: NetworkSource, *, device: str = "cpu") -> UNet2DConditionModel:
    return open_unet(source, UNet2DConditionModel, published=STABLE_DIFFUSION_1_5_UNET, device=device)


def test_an_empty_source_is_refused_with_both_accepted_forms() -> None:
    with pytest.raises(RecipeError, match=r"model.unet names no network; give model.unet.path .* or model.unet.config"):
        open_tiny(NetworkSource())
    with pytest.raises(RecipeError, match=r"model.autoencoder names no network; .* model.autoencoder.patch_size"):
        open_autoencoder(AutoencoderSource(), temporal=False, device="cpu")
    with pytest.raises(RecipeError, match=r"model.image_encoder names no network; .*stand_in_width"):
        open_image_encoder(ImageEncoderSource(), huge=False, device="cpu")


def test_small_networks_come_from_a_few_numbers() -> None:
    assert open_tiny(NetworkSource(config=tiny_unet_config())).config.in_channels == tiny_unet_config()["in_channels"]
    autoencoder = open_autoencoder(AutoencoderSource(patch_size=4), temporal=True, device="cpu")
    encoder = open_image_encoder(ImageEncoderSource(stand_in_width=12), huge=True, device="cpu")
    assert isinstance(autoencoder, PatchAutoencoder)
    assert isinstance(encoder, ImageEmbeddingStandIn)
    assert not autoencoder.training
    assert not encoder.training


def test_a_saved_network_loads_with_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = UNet2DConditionModel(**tiny_unet_config())
    saved.save_pretrained(tmp_path / "model" / "unet")
    loaded = open_tiny(NetworkSource(path=str(tmp_path / "model"), subfolder="unet"))
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("left", ["nothing", "config", "weights", "pickle"])
def test_an_incomplete_folder_is_refused_with_what_it_lacks_and_what_to_do(tmp_path: Path, left: str) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    if left != "nothing":
        UNet2DConditionModel(**tiny_unet_config()).save_pretrained(folder, safe_serialization=left != "pickle")
    if left == "config":
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    if left == "weights":
        (folder / "config.json").unlink()
    lacks = "there is no config.json" if left in ("nothing", "weights") else "there are no safetensors"
    with pytest.raises(MissingInputError, match=rf"model.unet.path: no network in '{folder}': {lacks}") as refused:
        open_tiny(NetworkSource(path=str(folder)))
    assert "set model.unet.path and model.unet.subfolder" in str(refused.value)
    assert "recipes/demo, which needs no weights" in str(refused.value)


def test_on_meta_the_shape_of_the_folder_overrides_the_published_one(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **tiny_unet_config()}))
    with torch.device("meta"):
        own = open_tiny(NetworkSource(path=str(folder)), device="meta")
        published = open_tiny(NetworkSource(path=str(tmp_path / "absent")), device="meta")
    assert own.config.block_out_channels == tiny_unet_config()["block_out_channels"]
    assert sum(parameter.numel() for parameter in published.parameters()) == pytest.approx(859.5e6, rel=1e-3)
    assert {parameter.device.type for parameter in published.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("huge", "width", "millions"), [(False, 768, 304.0), (True, 1024, 632.1)]
)  # ViT-L/14 and ViT-H/14, vision towers with their projections
def test_absent_image_encoders_have_the_published_ones_size(
    tmp_path: Path, huge: bool, width: int, millions: float
) -> None:
    with torch.device("meta"):
        encoder = open_image_encoder(ImageEncoderSource(path=str(tmp_path)), huge=huge, device="meta")
    assert encoder.config.projection_dim == width
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_absent_autoencoders_are_of_the_stages_own_kind(tmp_path: Path) -> None:
    with torch.device("meta"):
        image, video = (
            open_autoencoder(AutoencoderSource(path=str(tmp_path)), temporal=temporal, device="meta")
            for temporal in (False, True)
        )
    assert type(image) is AutoencoderKL
    assert type(video) is AutoencoderKLTemporalDecoder
    for autoencoder, millions in ((image, 83.65), (video, 97.7)):
        assert autoencoder.config.scaling_factor == 0.18215
        count = sum(parameter.numel() for parameter in autoencoder.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=5e-3)


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "._model-00001-of-00002.safetensors").write_bytes(b"what macOS leaves on other file systems")
    weights = read_weights(tmp_path, key="init_from")
    assert {name: len(value) for name, value in weights.items()} == {"a": 2, "b": 3}
    with pytest.raises(MissingInputError, match=r"^init_from: no safetensors in '.*absent'$"):
        read_weights(tmp_path / "absent", key="init_from")


def test_arguments_that_a_network_refuses_are_the_recipes_problem() -> None:
    with pytest.raises(RecipeError, match=r"model.unet.config is refused by UNet2DConditionModel: .*down_block_types"):
        open_tiny(NetworkSource(config={**tiny_unet_config(), "down_block_types": ["DownBlock2D"]}))


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = {"image_size": 28, "patch_size": 14}


def save_whole_clip(folder: Path) -> CLIPModel:
    """A CLIP of both towers whose projection is 24 wide, saved by transformers."""
    torch.manual_seed(0)
    vision = {**TOWER, **PICTURES, "projection_dim": 24}
    clip = CLIPModel(CLIPConfig(text_config={**TOWER, "vocab_size": 100}, vision_config=vision, projection_dim=24))
    clip.save_pretrained(folder)
    return clip


def change_config(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def open_clip(folder: Path, *, device: str = "cpu") -> CLIPVisionModelWithProjection:
    return open_image_encoder(ImageEncoderSource(path=str(folder)), huge=False, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_projections_width_may_be_given_only_at_the_top_of_a_whole_clips_config(
    tmp_path: Path, device: str
) -> None:
    clip = save_whole_clip(tmp_path)
    change_config(tmp_path, lambda values: values["vision_config"].pop("projection_dim"))
    encoder = open_clip(tmp_path, device=device)
    assert encoder.config.projection_dim == 24
    assert encoder.visual_projection.weight.shape == (24, 16)
    if device == "cpu":
        pictures = torch.rand(2, 3, 28, 28)
        with torch.no_grad():
            expected = clip.eval().visual_projection(clip.vision_model(pictures).pooler_output)
            torch.testing.assert_close(encoder(pictures).image_embeds, expected, rtol=1e-5, atol=1e-6)


def test_a_config_without_the_projections_width_is_refused_by_the_recipes_key(tmp_path: Path) -> None:
    save_whole_clip(tmp_path)
    change_config(
        tmp_path, lambda values: (values.pop("projection_dim"), values["vision_config"].pop("projection_dim"))
    )
    with pytest.raises(
        RecipeError, match=r"model\.image_encoder\.path: .*config\.json does not contain 'projection_dim'"
    ):
        open_clip(tmp_path)


def test_weights_of_another_width_than_the_configs_are_refused_by_the_recipes_key(tmp_path: Path) -> None:
    save_whole_clip(tmp_path)
    change_config(tmp_path, lambda values: values["vision_config"].update(projection_dim=32))
    with pytest.raises(RecipeError, match=r"model\.image_encoder\.path: the weights in .* do not fit its config"):
        open_clip(tmp_path)


def test_a_tower_that_lacks_its_projection_is_refused_and_not_left_random(tmp_path: Path) -> None:
    CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, **PICTURES, projection_dim=24)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RecipeError, match=r"model\.image_encoder\.path: .*1 tensors are not there, such as visual_proj"
    ):
        open_clip(tmp_path)


@pytest.mark.parametrize("shard_size", ["10GB", "200KB"])
def test_weights_of_one_variant_alone_are_read_into_float32(tmp_path: Path, shard_size: str) -> None:
    """Users fetch `*.fp16.safetensors` alone, which takes half of the disk."""
    torch.manual_seed(0)
    saved = UNet2DConditionModel(**tiny_unet_config()).half()
    saved.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard_size)
    loaded = open_tiny(NetworkSource(path=str(tmp_path)))
    weights = loaded.state_dict()
    assert loaded.dtype is torch.float32
    assert all(torch.equal(value.float(), weights[name]) for name, value in saved.state_dict().items())


def test_an_image_encoder_of_one_variant_alone_is_read_into_float32(tmp_path: Path) -> None:
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    saved = CLIPVisionModelWithProjection(config).half()
    saved.save_pretrained(tmp_path, variant="fp16")
    loaded = open_image_encoder(ImageEncoderSource(path=str(tmp_path)), huge=True, device="cpu")
    assert loaded.visual_projection.weight.dtype is torch.float32
    assert torch.equal(loaded.visual_projection.weight, saved.visual_projection.weight.float())


def test_weights_without_a_variant_win_over_those_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = UNet2DConditionModel(**tiny_unet_config())
    saved.save_pretrained(tmp_path)
    UNet2DConditionModel(**tiny_unet_config()).save_pretrained(tmp_path, variant="fp16")
    weights = open_tiny(NetworkSource(path=str(tmp_path))).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in saved.state_dict().items())


def test_several_variants_are_refused_by_name(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        UNet2DConditionModel(**tiny_unet_config()).save_pretrained(tmp_path, variant=variant)
    with pytest.raises(RecipeError, match=r"model.unet.path: .* holds the variants bf16, fp16 .* leave one of them"):
        open_tiny(NetworkSource(path=str(tmp_path)))
