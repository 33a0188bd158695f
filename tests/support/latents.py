"""Recipes of the task `encode` that fit a training recipe, and trainings from stored latents."""

import json
from pathlib import Path
from typing import Any, TypeVar

from dreamdance.recipe.encode_recipe import EncodeRecipe
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe, TrainingRecipe

Training = TypeVar("Training", Stage1Recipe, Stage2Recipe)


def encode_recipe(training: TrainingRecipe, output: Path, **changes: Any) -> EncodeRecipe:
    """A recipe that stores the latents of a training, two clips in each part; `changes` are its own keys."""
    values: dict[str, Any] = {
        "task": "encode",
        "name": "tiny_encode",
        "shards": training.data.train.model_dump(),
        "output": str(output),
        "stage": training.task,
        "model": {
            "autoencoder": training.model.autoencoder.model_dump(),
            "image_encoder": training.model.image_encoder.model_dump(),
        },
        "width": training.data.width,
        "height": training.data.height,
        "clips_per_part": 2,
        "verify_samples": 2,
        **changes,
    }
    return EncodeRecipe.model_validate(values)


def with_latents(training: Training, folder: str | None, changes: dict[str, Any]) -> Training:
    """The training from the latents in a folder, with changed dotted keys."""
    values = training.model_dump(mode="json")
    for key, value in {"data.latents": folder and {"local": folder}, **changes}.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return type(training).model_validate_json(json.dumps(values))
