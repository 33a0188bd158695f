"""`tools/published_weights.py` writes files that the classes of diffusers and transformers read whole."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNet2DConditionModel
from diffusers import UNetSpatioTemporalConditionModel as VideoUNet
from safetensors import safe_open
from support.tool_modules import load_tool
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import RecipeError
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET, STABLE_VIDEO_DIFFUSION_UNET
from dreamdance.recipe.schema import AutoencoderSource
from dreamdance.training.networks.sources import open_autoencoder

ROOT = Path(__file__).parents[2]
SVD = "stable-video-diffusion-img2vid-xt-1-1"
# Attention's names in files of 2022, as a public conversion script of that time lists them: new name -> old name.
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("published_weights")


@pytest.mark.parametrize(
    ("folder", "elements"),
    [("stable-diffusion-v1-5/unet", 859_520_964), (f"{SVD}/unet", 1_524_623_082)],
)
def test_the_unets_have_the_published_numbers_of_parameters(tool: ModuleType, folder: str, elements: int) -> None:
    assert sum(math.prod(shape) for shape in tool.published_shapes(folder).values()) == elements


@pytest.mark.parametrize(
    ("folder", "network_class"),
    [
        ("stable-diffusion-v1-5/unet", UNet2DConditionModel),
        ("stable-diffusion-v1-5/vae", AutoencoderKL),
        (f"{SVD}/unet", VideoUNet),
        (f"{SVD}/vae", AutoencoderKLTemporalDecoder),
    ],
)
def test_lists_and_configs_describe_the_same_networks(tool: ModuleType, folder: str, network_class: type) -> None:
    config = json.loads((ROOT / "tools/published" / folder / "config.json").read_text())
    with torch.device("meta"):
        network = network_class.from_config(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if folder == "stable-diffusion-v1-5/vae":
        expected = {_old_name(name): shape for name, shape in expected.items()}
    assert tool.published_shapes(folder) == expected


def test_the_configs_are_those_that_the_library_plans_with() -> None:
    for folder, planned in (
        ("stable-diffusion-v1-5/unet", STABLE_DIFFUSION_1_5_UNET),
        (f"{SVD}/unet", STABLE_VIDEO_DIFFUSION_UNET),
    ):
        config = json.loads((ROOT / "tools/published" / folder / "config.json").read_text())
        assert {name: value for name, value in config.items() if not name.startswith("_")} == planned


def test_both_image_encoders_lists_hold_every_tensor_of_the_vision_tower(tool: ModuleType) -> None:
    for folder, key in (("clip-vit-large-patch14", "vision_config"), (f"{SVD}/image_encoder", None)):
        config = json.loads((ROOT / "tools/published" / folder / "config.json").read_text())
        with torch.device("meta"):
            network = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config[key] if key else config))
        listed = tool.published_shapes(folder)
        assert {name: listed.get(name) for name in network.state_dict()} == {
            name: tuple(value.shape) for name, value in network.state_dict().items()
        }


@pytest.fixture
def small_autoencoder(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Puts a small autoencoder in the place of the published networks; returns its tensors, with today's names."""
    config = json.loads((ROOT / "tools/published/stable-diffusion-v1-5/vae/config.json").read_text())
    config |= {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * 2}
    with torch.device("meta"):
        state = AutoencoderKL.from_config(config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for folder, names in (("old", map(_old_name, shapes)), ("new", shapes)):
        (tmp_path / "published" / folder).mkdir(parents=True)
        (tmp_path / "published" / folder / "config.json").write_text(json.dumps(config))
        lines = [f"{name} {'x'.join(map(str, shape))}\n" for name, shape in zip(names, shapes.values(), strict=True)]
        (tmp_path / "published" / folder / "tensors.txt").write_text("".join(lines))
    monkeypatch.setattr(tool, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(tool, "SHARD_BYTES", 200_000)
    return shapes


def test_a_killed_call_continues_and_old_names_load(
    tool: ModuleType, tmp_path: Path, small_autoencoder: dict[str, tuple[int, ...]]
) -> None:
    form = tool.Form("old", "diffusion_pytorch_model", torch.float16, variant="fp16")
    assert "written" in tool.write(form, tmp_path)
    assert "complete before" in tool.write(form, tmp_path)
    file = tmp_path / "old/diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "written" in tool.write(form, tmp_path)

    loaded = open_autoencoder(AutoencoderSource(path=str(tmp_path / "old")), temporal=False, device="cpu")
    with safe_open(file, framework="pt") as opened:
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, opened.get_tensor(_old_name(name)).float()), name
    assert loaded.state_dict().keys() == small_autoencoder.keys()
    picture = torch.rand(1, 3, 16, 16)
    assert loaded.decode(loaded.encode(picture).latent_dist.mode()).sample.isfinite().all()


def test_a_sharded_form_loads_with_the_same_values(
    tool: ModuleType, tmp_path: Path, small_autoencoder: dict[str, tuple[int, ...]]
) -> None:
    form = tool.Form("new", "diffusion_pytorch_model", torch.float32, sharded=True, target="sharded")
    tool.write(form, tmp_path)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = open_autoencoder(AutoencoderSource(path=str(tmp_path / "sharded")), temporal=False, device="cpu")
    for name, shape in small_autoencoder.items():
        assert torch.equal(loaded.state_dict()[name], tool.random_tensor(name, shape, torch.float32)), name


@pytest.mark.usefixtures("small_autoencoder")
def test_weights_that_diffusers_would_leave_random_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    """diffusers translates the old names of attention in a single file, but not in shards."""
    tool.write(tool.Form("old", "diffusion_pytorch_model", torch.float32, sharded=True), tmp_path)
    with pytest.raises(RecipeError, match=r"model.autoencoder.path: .* 16 tensors are not there, such as .*to_k.bias"):
        open_autoencoder(AutoencoderSource(path=str(tmp_path / "old")), temporal=False, device="cpu")


def _old_name(name: str) -> str:
    if ".attentions." in name:
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name
