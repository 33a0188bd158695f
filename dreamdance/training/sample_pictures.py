"""Samples held-out clips with an objective's networks and the real pipeline, and draws the results beside the truth."""

from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.media.grids import GridRow, draw_grid
from dreamdance.media.transforms import encode_normals, pass_through, tensor_to_pictures
from dreamdance.modalities import MODALITIES
from dreamdance.models.autoencoding import decode_latents, latent_shape
from dreamdance.models.image_embedding import embed_images
from dreamdance.pipelines.sampling import StepCallback, draw_initial_noise
from dreamdance.recipe.objective_sections import AnimationSampling, GeometrySampling
from dreamdance.recipe.schema import Stage2Recipe
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance.training.sample_scores import sample_scores

# By name, `b f c H W` in [0,1]: normal (encoded), depth and rgb in stage 1, rgb in stage 2.
Predictions: TypeAlias = dict[str, Tensor]

# Frames of a clip that are shown, evenly spaced.
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Samples:
    """Output of a pipeline for some clips.

    Attributes:
        grid: `H W 3` uint8, labelled, with the truth under each prediction.
        predictions: by name, `b f c H W` in [0,1]: normal (encoded), depth and rgb in stage 1, rgb in stage 2.
        scores: see `sample_scores`.
    """

    grid: NDArray[np.uint8]
    predictions: dict[str, Tensor]
    scores: dict[str, float]


def show(batch: ClipBatch, given: dict[str, Tensor], predictions: dict[str, Tensor]) -> Samples:
    """Draws the inputs and predictions of a pipeline (both `b f c H W`, by name) beside the truth, and measures."""
    return Samples(_draw(batch, given, predictions), predictions, sample_scores(batch, predictions))


def sample_geometry(
    objective: GeometryObjective, batch: ClipBatch, sampling: GeometrySampling, on_step: StepCallback | None = None
) -> dict[str, Tensor]:
    """Stage 1 on a batch: encoded normals, depths and low-resolution rgb, each `b f c H W` in [0,1]."""
    pipeline = objective.make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    normals, depths, images = pipeline(
        batch.reference,
        batch.pose,
        guidance_scales=sampling.guidance_scales.in_order,
        **sampling.model_dump(exclude={"guidance_scales"}),
        generator=_generators(batch),
        callback_on_step_end=on_step,
        output_type="pt",
        return_dict=False,
    )
    maps = {"normal": encode_normals(cast(Tensor, normals)), "depth": depths, "rgb": images}
    return cast(dict[str, Tensor], maps)


def sample_images(
    objective: GeometryObjective, batch: ClipBatch, sampling: GeometrySampling, on_step: StepCallback | None = None
) -> dict[str, Tensor]:
    """The base network of stage 1 alone: `rgb`, `b f 3 H W` in [0,1], from nothing but the references' embeddings.

    Without guidance; the frames of a clip are independent pictures.
    """
    pipeline, num_frames = objective.make_pipeline(), batch.pose.shape[1]
    scheduler, unet = pipeline.scheduler, objective.unet
    scheduler.set_timesteps(sampling.num_inference_steps, device=unet.device)
    embeddings = embed_images(objective.image_encoder, batch.reference, resizing="clip")
    embeddings = repeat(embeddings, "b t c -> (b f) t c", f=num_frames).to(unet.device, unet.dtype)
    shape = (len(batch.reference), num_frames, *latent_shape(objective.vae, batch.pose))
    latents = rearrange(draw_initial_noise(shape, _generators(batch)), "b f c h w -> (b f) c h w").to(unet.device)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            prediction = unet(latents.to(unet.dtype), timestep, embeddings).float()
            latents = scheduler.step(prediction, timestep, latents).prev_sample
            if on_step is not None:
                on_step(pipeline, step, timestep, {})
        pictures = decode_latents(objective.vae, latents, chunk_size=len(latents), num_frames=num_frames)
    return {"rgb": rearrange(pictures, "(b f) c h w -> b f c h w", f=num_frames)}


def blur_maps(batch: ClipBatch, recipe: Stage2Recipe) -> dict[str, Tensor]:
    """The true maps that `model.controls` names; maps that stage 1 predicts are blurred to its resolution."""
    size = (recipe.objective.geometry_height, recipe.objective.geometry_width)
    return {
        name: pass_through(frames, *size, kind=MODALITIES[name].kind) if MODALITIES[name].domain else frames
        for name, frames in batch.maps.items()
        if name in recipe.model.controls
    }


def sample_animation(
    objective: AnimationObjective,
    batch: ClipBatch,
    maps: dict[str, Tensor],
    sampling: AnimationSampling,
    on_step: StepCallback | None = None,
    *,
    of_reference: dict[str, Tensor] | None = None,
) -> Tensor:
    """Stage 2 on a batch and its control `maps`: frames `b f 3 H W` in [0,1].

    Args:
        objective: holds the networks.
        batch: the clips.
        maps: control maps `b f 3 H W`.
        sampling: the recipe's section.
        on_step: called after each denoising step.
        of_reference: the reference's own maps `b 3 H W`, exactly with `objective.reference_first`.
    """
    pipeline = objective.make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    clips = []
    for index, generator in enumerate(_generators(batch)):
        # one clip at a time, because each has its own frame rate
        chosen = slice(index, index + 1)
        (frames,) = pipeline(
            batch.reference[chosen],
            maps={name: frames[chosen] for name, frames in maps.items()},
            reference_maps=of_reference and {name: pictures[chosen] for name, pictures in of_reference.items()},
            fps=pipeline.trained_fps or float(batch.fps[index]),
            **sampling.model_dump(),
            generator=generator,
            callback_on_step_end=on_step,
            output_type="pt",
            return_dict=False,
        )
        clips.append(cast(Tensor, frames))
    return torch.cat(clips)


def _generators(batch: ClipBatch) -> list[torch.Generator]:
    """One for each clip, so that a clip's sample does not depend on what else is in the batch."""
    return [sample_generator(key, "sampling") for key in batch.keys.tolist()]


def _draw(batch: ClipBatch, given: dict[str, Tensor], predictions: dict[str, Tensor]) -> NDArray[np.uint8]:
    """Single frames: a line per clip. Videos: a block per clip, time to the right, truth under each prediction.

    Args:
        batch: the truth.
        given: inputs of the pipeline beside the reference, by name, `b f 3 H W`.
        predictions: outputs of the pipeline, by name.
    """
    shown = dict(given)
    for name, frames in predictions.items():
        shown[f"predicted {name}"] = frames
        if name in batch.maps:
            shown[f"true {name}"] = batch.maps[name]

    num_clips, num_frames = batch.rgb.shape[:2]
    if num_frames == 1:
        lines = []
        for clip, name in enumerate(batch.clip_ids):
            pictures = [batch.reference[clip], *(frames[clip, 0] for frames in shown.values())]
            lines.append(GridRow(name, [_picture(picture) for picture in pictures]))
        return draw_grid(lines, titles=["reference", *shown])

    times = torch.linspace(0, num_frames - 1, min(num_frames, MAX_COLUMNS)).round().long().tolist()
    rows = []
    for clip in range(num_clips):
        for index, (name, frames) in enumerate(shown.items()):
            first = index == 0
            label = f"{name}\n{batch.clip_ids[clip]}" if first else name
            reference = _picture(batch.reference[clip]) if first else None
            moments = [_picture(frames[clip, time]) for time in times]
            rows.append(GridRow(label, [reference, *moments], rule_above=first and clip > 0))
    return draw_grid(rows, titles=["reference", *(f"frame {time}" for time in times)])


def _picture(picture: Tensor) -> NDArray[np.uint8]:
    """`c H W` in [0,1], c = 1 or 3, to `H W 3` uint8."""
    return tensor_to_pictures(picture.expand(3, -1, -1))
