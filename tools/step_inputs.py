"""Weights and clips for `tools/measure_step.py`: the same for every contestant, whatever form it takes them in."""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

# The draws of an objective that the plain trainer reads.
_DRAWS = {
    "stage1": ("noise", "timesteps", "kept"),
    "stage2": ("noise", "sigmas", "augmentation", "augmentation noise", "kept latents", "kept embedding"),
}


def fill(model: Any) -> None:
    """Gives each weight values that depend on its name and keep activations at the size of 1; positions are counted."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("class_embedding.", "domain_embedder.mlp.")  # as plain diffusers calls it
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if parameter.dim() < 2:
                parameter.copy_(0.1 * values + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(values / math.sqrt(parameter[0].numel()))
        for name, values in model.named_buffers():
            if name.endswith("position_ids"):
                values.copy_(torch.arange(values.shape[-1]).expand(values.shape))


def make_maps(recipe: Any) -> dict[str, Any]:
    """Random pictures `b f 3 H W` in [0, 1] by name, and `reference`: `b 3 H W`; on the CPU."""
    import torch

    data, clips = recipe.data, recipe.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (clips, data.num_frames, 3, data.height, data.width)
    maps = {name: torch.rand(shape, generator=generator) for name in ("rgb", "pose", "normal", "depth")}
    return {**maps, "reference": maps["rgb"][:, 0].flip(-1)}


def make_batch(recipe: Any, draws: Mapping[str, Any]) -> Any:
    """The batch in the form of this commit's loader: one drawn domain, maps of stage 2 at stage 1's size."""
    import torch

    from dreamdance.data.loading.batch import ClipBatch
    from dreamdance.data.loading.domain_draw import TARGET
    from dreamdance.media.transforms import resize_map
    from dreamdance.modalities import DOMAINS, MODALITIES
    from dreamdance.training.stages.training_stage import stage_of

    maps, stage = make_maps(recipe), stage_of(recipe)
    reference = maps.pop("reference")
    if stage.domain_weights is not None and draws:
        drawn = [maps[DOMAINS[int(number)]][clip] for clip, number in enumerate(draws["domains"].flatten())]
        maps = {"pose": maps["pose"], TARGET: torch.stack(drawn)}
    for name, (width, height) in stage.map_sizes.items():
        maps[name] = resize_map(maps[name], height, width, kind=MODALITIES[name].kind)
    clips = len(reference)
    keys = torch.tensor([[0, 0, number] for number in range(clips)])
    return ClipBatch(maps, reference, torch.full((clips,), 8.0), keys, [str(number) for number in range(clips)])


def store_latents(batch: Any, names: Collection[str], objective: Any) -> Any:
    """The batch as `task: encode` stores it: latents of the names that a stage takes, in place of pictures."""
    import torch

    from dreamdance.data.loading.domain_draw import TARGET
    from dreamdance.data.shards.latents import EMBEDDING, PREFIX, REFERENCE
    from dreamdance.models.autoencoding import encode_moments
    from dreamdance.models.image_embedding import embed_prepared

    maps, encoded = dict(batch.maps), [name for name in batch.maps if name in {*names, TARGET}]
    for name in encoded:
        pictures = maps.pop(name)
        moments = torch.stack(encode_moments(objective.vae, pictures.flatten(0, 1)), dim=1).cpu()
        maps[PREFIX + name] = moments.unflatten(0, pictures.shape[:2])
    embeddings = embed_prepared(objective.image_encoder, objective.resize_reference(batch))
    maps[PREFIX + EMBEDDING] = embeddings[:, 0].cpu()
    if REFERENCE not in names:
        return replace(batch, maps=maps)
    maps[PREFIX + REFERENCE] = encode_moments(objective.vae, batch.reference)[0].cpu()
    return replace(batch, maps=maps, reference=torch.empty(0))


def make_plain_inputs(recipe: Any, objective: Any) -> dict[str, Any]:
    """The same clips and draws as a plain data set gives them: nothing is left to resize, blur, choose or draw."""
    from einops import rearrange

    from dreamdance.diffusion.condition_dropout import blank_controls
    from dreamdance.media.transforms import pass_through
    from dreamdance.modalities import DOMAINS, MODALITIES
    from dreamdance.models.image_embedding import prepare_for_clip

    batch = make_batch(recipe, {})
    draws, maps = objective.draw(batch), make_maps(recipe)
    image_size, settings = objective.image_encoder.config.image_size, recipe.objective
    inputs = {name: draws[name] for name in _DRAWS[recipe.task]}
    inputs["reference"] = batch.reference * 2 - 1
    resizing: Any = "svd" if recipe.task == "stage2" else "clip"
    inputs["clip_pictures"] = prepare_for_clip(batch.reference, image_size, resizing=resizing)
    if recipe.task == "stage1":
        targets = make_batch(recipe, draws).maps
        pictures = (
            rearrange(targets["target"], "b f c h w -> (b f) c h w")
            if "target" in targets
            else rearrange([targets[name] for name in DOMAINS], "m b f c h w -> (b f m) c h w")
        )
        num_frames = recipe.data.num_frames
        inputs["domains"] = draws["domains"][:, None].expand(-1, num_frames, -1)
        inputs["pose"] = rearrange(maps["pose"], "b f c h w -> (b f) c h w")
    else:
        pictures = rearrange(maps["rgb"], "b f c h w -> (b f) c h w")
        size = (settings.geometry_height, settings.geometry_width)
        controls = {"pose": maps["pose"]}
        controls |= {name: pass_through(maps[name], *size, kind=MODALITIES[name].kind) for name in ("normal", "depth")}
        controls = blank_controls(controls, {name: draws[f"kept {name}"] for name in controls})
        inputs |= {name: rearrange(frames, "b f c h w -> (b f) c h w") for name, frames in controls.items()}
        inputs["fps"] = batch.fps
    return {**inputs, "images": pictures * 2 - 1}
