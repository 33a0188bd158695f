"""Checks that all ranks, and all starts of a run, have the same code, recipe, versions and initial weights.

A rank with an older checkout, or with another copy of the base model on its disk, would train without any error.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

import dreamdance
import dreamdance_kernels
from dreamdance.errors import UserError
from dreamdance.recipe.parse import flatten
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runs.provenance import package_versions
from dreamdance.runtime.process_group import gather_from_ranks


@dataclass(frozen=True)
class WeightsDigests:
    """Hashes of names, types and values of an objective's parameters, before training."""

    frozen: str
    trainable: str


def require_same_start(recipe: TrainingRecipe) -> None:
    """Checks that every rank runs the same code and the same recipe. Collective.

    Raises:
        UserError: ranks differ; raised on every rank; the text names a rank that differs and the differences.
    """
    facts = {"code": code_digest(), "python": platform.python_version(), **package_versions()}
    values = flatten(recipe.model_dump(mode="json"))
    require_same({**facts, **{f"recipe: {key}": json.dumps(value) for key, value in values.items()}})


def require_same(facts: Mapping[str, str]) -> None:
    """Checks that every rank has the same values. Collective.

    Args:
        facts: name of a compared value -> this rank's value.

    Raises:
        UserError: ranks differ; raised on every rank; the text names a rank that differs and the differences.
    """
    digests = gather_from_ranks(sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    everyone = gather_from_ranks(dict(facts))  # only after a difference, because the values are long
    first, differing = everyone[0], everyone[other]
    names = sorted(name for name in first.keys() | differing.keys() if first.get(name) != differing.get(name))
    described = "; ".join(
        f"{name}: {first.get(name)} on rank 0, {differing.get(name)} on rank {other}" for name in names
    )
    count = sum(digest != digests[0] for digest in digests)
    raise UserError(
        f"{count} of {len(digests)} ranks would train something else than rank 0. {described}. "
        "Give all nodes the same checkout, environment, run folder and weights"
    )


def code_digest() -> str:
    """A hash of this project's own source files on this machine."""
    digest = sha256()
    for package in (dreamdance, dreamdance_kernels):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def weights_digests(objective: nn.Module) -> WeightsDigests:
    """Hashes this rank's trainable parameters and its frozen parameters."""
    frozen, trainable = sha256(), sha256()
    for name, parameter in objective.named_parameters():
        digest = trainable if parameter.requires_grad else frozen
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        values = parameter.detach().contiguous().flatten().cpu()
        digest.update(values.view(torch.uint8).numpy().data)
    return WeightsDigests(frozen.hexdigest(), trainable.hexdigest())
