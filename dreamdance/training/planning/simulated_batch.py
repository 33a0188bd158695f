"""A micro batch of a recipe's shapes, in the form in which the loader delivers it, without content."""

from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.loading.domain_draw import TARGET
from dreamdance.data.shards.latents import EMBEDDING, PREFIX, REFERENCE
from dreamdance.modalities import ALWAYS_READ, DOMAINS, MODALITIES
from dreamdance.models.autoencoding import downscale_factor
from dreamdance.models.image_embedding import embedding_width
from dreamdance.training.objectives.output import Objective
from dreamdance.training.stages.training_stage import TrainingStage


def simulated_batch(stage: TrainingStage[Any], objective: Objective) -> ClipBatch:
    """A micro batch of stored pictures of the recipe's size, or of latents if the recipe names some.

    Args:
        stage: names the maps and the latents, and gives their sizes.
        objective: its autoencoder and its image encoder give the shapes of latents and embeddings.
    """
    data, clips = stage.recipe.data, stage.recipe.micro_batch_size
    replaced = set(stage.latent_names) if data.latents is not None else set()
    names = _with_target(stage, {*ALWAYS_READ, *stage.maps} - replaced)
    maps = {name: _pictures(name, clips, data.num_frames, data.height, data.width) for name in names}
    factor = downscale_factor(objective.vae)
    latent = (objective.vae.config.latent_channels, data.height // factor, data.width // factor)
    for name in _with_target(stage, replaced):
        if name == EMBEDDING:
            shape: tuple[int, ...] = (embedding_width(objective.image_encoder),)
        else:
            shape = latent if name == REFERENCE else (data.num_frames, 2, *latent)
        maps[PREFIX + name] = torch.empty(clips, *shape)
    return ClipBatch(
        maps=maps,
        reference=torch.empty(0) if REFERENCE in replaced else _pictures("rgb", clips, data.height, data.width),
        fps=torch.empty(clips),
        keys=_FixedKeys(clips),  # type: ignore[arg-type]  # only `tolist` and `to` are called
        clip_ids=["simulated"] * clips,
    )


def _with_target(stage: TrainingStage[Any], names: set[str]) -> list[str]:
    """The names; one drawn domain stands for all three if the loader draws it."""
    if stage.domain_weights is None or names.isdisjoint(DOMAINS):
        return sorted(names)
    return [*sorted(names - set(DOMAINS)), TARGET]


def _pictures(name: str, *shape: int) -> Tensor:
    """Pictures `... c H W` as they are stored; a drawn domain as pictures."""
    modality = MODALITIES.get(name, MODALITIES["rgb"])
    dtype = torch.uint16 if modality.bits == 16 else torch.uint8
    return torch.empty(*shape[:-2], modality.channels, *shape[-2:], dtype=dtype)


class _FixedKeys:
    """Sample keys with real values: fake tensors have none."""

    def __init__(self, num_clips: int) -> None:
        self.num_clips = num_clips

    def tolist(self) -> list[list[int]]:
        return [[0, 0, sample] for sample in range(self.num_clips)]

    def to(self, *_: Any, **__: Any) -> "_FixedKeys":
        return self
