"""Opens the networks that a recipe names: from a local folder in the diffusers layout, or with random weights.

Only safetensors are read; nothing is downloaded; an error names the missing file and the recipe's key. On the meta
device a network whose folder is absent gets the shape of the published network.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, ModelMixin
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import MissingInputError, RecipeError
from dreamdance.models import PatchAutoencoder
from dreamdance.models.image_embedding import ImageEmbeddingStandIn
from dreamdance.recipe.schema import AutoencoderSource, ImageEncoderSource, NetworkSource

_STABLE_DIFFUSION_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_STABLE_VIDEO_DIFFUSION_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_CLIP_VIT_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_VIT_HUGE: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


def open_unet(
    source: NetworkSource, network_class: type[ModelMixin], *, published: dict[str, Any], device: str
) -> ModelMixin:
    """The base network of `model.unet`.

    Args:
        source: a folder, or constructor arguments of a random network.
        network_class: diffusers' class.
        published: constructor arguments of the published network, used on the meta device if the folder is absent.
        device: `"cpu"`, `"cuda"` or `"meta"`.

    Raises:
        MissingInputError: the folder or its weights are not there.
        RecipeError: neither a folder nor arguments are given, or the class refuses the arguments.
    """
    key = "model.unet"
    if source.config is None and source.path is None:
        raise RecipeError(f"{key} names no network; give {key}.path (a folder) or {key}.config (a random network)")
    if source.path is None:
        return _build(network_class, source.config or {}, key=f"{key}.config")
    folder = _folder(source.path, source.subfolder)
    if device == "meta":
        return _build_without_weights(network_class, folder, published, key=f"{key}.path")
    _require_weights(folder, key)
    return _load_diffusers(network_class, folder, key)


def absent_folder(source: NetworkSource) -> Path | None:
    """The folder that a recipe names for a network, if there is none in it; only a dry run goes on then."""
    if source.path is None:
        return None
    folder = _folder(source.path, source.subfolder).absolute()
    return None if (folder / "config.json").is_file() else folder


def open_autoencoder(source: AutoencoderSource, *, temporal: bool, device: str) -> nn.Module:
    """The frozen autoencoder of `model.autoencoder`; `temporal` means that it decodes videos, as SVD's does.

    Raises:
        MissingInputError: the folder or its weights are not there.
        RecipeError: neither a folder nor a patch size is given.
    """
    key = "model.autoencoder"
    if source.path is None and source.patch_size is None:
        raise RecipeError(f"{key} names no network; give {key}.path (a folder) or {key}.patch_size (lossless patches)")
    if source.path is None:
        return PatchAutoencoder(patch_size=source.patch_size).eval()
    network_class = AutoencoderKLTemporalDecoder if temporal else AutoencoderKL
    folder = _folder(source.path, source.subfolder)
    if device == "meta":
        published = _STABLE_VIDEO_DIFFUSION_VAE if temporal else _STABLE_DIFFUSION_VAE
        return _build_without_weights(network_class, folder, published, key=f"{key}.path")
    _require_weights(folder, key)
    return _load_diffusers(network_class, folder, key).eval()


def open_image_encoder(source: ImageEncoderSource, *, huge: bool, device: str) -> nn.Module:
    """The frozen image encoder of `model.image_encoder`.

    Args:
        source: a folder, or the width of the stand-in.
        huge: whether the published encoder is ViT-H (stage 2), not ViT-L (stage 1).
        device: `"cpu"`, `"cuda"` or `"meta"`.

    Raises:
        MissingInputError: the folder or its weights are not there.
        RecipeError: neither a folder nor a width is given.
    """
    key = "model.image_encoder"
    if source.path is None and source.stand_in_width is None:
        raise RecipeError(f"{key} names no network; give {key}.path (a folder) or {key}.stand_in_width")
    if source.path is None:
        return ImageEmbeddingStandIn(source.stand_in_width).eval()
    folder = _folder(source.path, source.subfolder)
    if device == "meta":
        published = CLIPVisionConfig(**(_CLIP_VIT_HUGE if huge else _CLIP_VIT_LARGE))
        config = _read_clip_config(folder, key) if (folder / "config.json").is_file() else published
        return CLIPVisionModelWithProjection(config).eval()
    _require_weights(folder, key)
    return _load_clip(folder, key).eval()


def _load_diffusers(network_class: type[ModelMixin], folder: Path, key: str) -> ModelMixin:
    """Loads a diffusers network; diffusers would leave weights that the files lack random, and warn."""
    network, loaded = network_class.from_pretrained(
        folder,
        variant=_variant(folder, "diffusion_pytorch_model", key),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        unknown = sorted(loaded["unexpected_keys"])
        raise RecipeError(
            f"{key}.path: '{folder}' does not hold all weights of its config.json: {len(missing)} tensors are not "
            f"there, such as {missing[0]}"
            + (f"; {len(unknown)} others are unknown, such as {unknown[0]}" if unknown else "")
        )
    return network


def _variant(folder: Path, stem: str, key: str) -> str | None:
    """The variant of the weights to read, as in `diffusion_pytorch_model.fp16.safetensors`; None for those without one.

    The weights without a variant win, because they are the most exact. Weights of every variant are read into float32.

    Raises:
        RecipeError: several variants are there, and nothing tells which is meant.
    """
    names = [file.name for file in folder.glob("[!.]*.safetensors")]
    plain = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors")
    if any(plain.fullmatch(name) for name in names):
        return None
    of_variant = re.compile(rf"{stem}\.([^.]+?)(-\d+-of-\d+)?\.safetensors")
    variants = sorted({match[1] for name in names if (match := of_variant.fullmatch(name))})
    if len(variants) > 1:
        raise RecipeError(
            f"{key}.path: '{folder}' holds the variants {', '.join(variants)} of the weights and none without one; "
            f"leave one of them there, or rename the one to read to {stem}.safetensors"
        )
    return variants[0] if variants else None


def _load_clip(folder: Path, key: str) -> CLIPVisionModelWithProjection:
    """Loads CLIP's vision tower from its own folder or from the folder of a whole CLIP."""
    config = _read_clip_config(folder, key)
    try:
        encoder, loaded = CLIPVisionModelWithProjection.from_pretrained(
            folder,
            config=config,
            variant=_variant(folder, "model", key),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:  # sizes differ from the config, or the file is damaged
        raise RecipeError(f"{key}.path: the weights in '{folder}' do not fit its config.json: {error}") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them random
        raise RecipeError(
            f"{key}.path: '{folder}' holds no CLIP vision tower with its projection: {len(missing)} tensors are not "
            f"there, such as {missing[0]}"
        )
    return encoder.float()  # transformers 5 keeps the type of the files


def _read_clip_config(folder: Path, key: str) -> CLIPVisionConfig:
    """The vision tower's configuration; for a whole CLIP, takes its `vision_config` and shared projection width."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vision = values.get("vision_config", values)
    if "projection_dim" not in {**values, **vision}:
        raise RecipeError(
            f"{key}.path: {file} does not contain 'projection_dim', the width of CLIP's image embedding: take it from "
            "the published config.json of that network (768 for ViT-L/14, 1024 for ViT-H/14)"
        )
    return CLIPVisionConfig.from_dict({"projection_dim": values.get("projection_dim"), **vision})


def read_weights(folder: Path, *, key: str) -> dict[str, torch.Tensor]:
    """All tensors of one network's folder, from one safetensors file or several.

    Raises:
        MissingInputError: the folder has no safetensors; the text names the recipe's `key`.
    """
    files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise MissingInputError(f"{key}: no safetensors in '{folder}'")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return weights


def _folder(path: str, subfolder: str | None) -> Path:
    return Path(path) / (subfolder or "")


def _require_weights(folder: Path, key: str) -> None:
    problem = None
    if not (folder / "config.json").is_file():
        problem = "there is no config.json"
    elif not any(folder.glob("[!.]*.safetensors")):
        problem = "there are no safetensors (other formats are not read: they can run code)"
    if problem:
        raise MissingInputError(
            f"{key}.path: no network in '{folder.absolute()}': {problem}; put the published weights there in the "
            f"diffusers folder layout, or set {key}.path and {key}.subfolder to where they are, or try a recipe of "
            "recipes/demo, which needs no weights"
        )


def _build_without_weights(
    network_class: type[ModelMixin], folder: Path, published: dict[str, Any], *, key: str
) -> ModelMixin:
    """The network that the folder's config describes, or the published one; it has what the config notes beside."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else published
    network = _build(network_class, {name: value for name, value in config.items() if name[0] != "_"}, key=key)
    network.register_to_config(**{name: value for name, value in config.items() if name[0] == "_"})
    return network


def _build(network_class: type[ModelMixin], config: dict[str, Any], *, key: str) -> ModelMixin:
    try:
        return network_class(**config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{key} is refused by {network_class.__name__}: {error}") from error
