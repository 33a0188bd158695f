"""What each rank saves of its own beside DeepSpeed's files: its share of the average, and the global generators."""

import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamdance.training.engine import Fragment


@dataclass(frozen=True)
class RankState:
    """One rank's file: tensors and plain containers only, so that it loads without unpickling code.

    Attributes:
        ema: `ShardedEma.state_dict`.
        fragments: which part of which parameter lies where in the average, and in the optimizer's partitions.
        generators: `generator_states`.
    """

    ema: dict[str, Any]
    fragments: list[Fragment]
    generators: dict[str, Any]


def rank_file(folder: Path, rank: int) -> Path:
    """Where one rank's file lies in a checkpoint."""
    return folder / f"rank_{rank:05d}.pt"


def rank_content(state: RankState) -> dict[str, Any]:
    """What one rank's file holds; it refers to the tensors of `state`."""
    fragments = [list(astuple(fragment)) for fragment in state.fragments]
    return {"ema": state.ema, "fragments": fragments, "generators": state.generators}


def read_rank_state(folder: Path, rank: int) -> RankState:
    """Reads one rank's file of a complete checkpoint.

    Its tensors lie in the file, and only what is copied out of them is read: where a checkpoint is divided again, every
    rank opens the files of all ranks and needs a small piece of each.
    """
    content = torch.load(rank_file(folder, rank), weights_only=True, map_location="cpu", mmap=True)
    fragments = [Fragment(*values) for values in content["fragments"]]
    return RankState(ema=content["ema"], fragments=fragments, generators=content["generators"])


def generator_states() -> dict[str, Any]:
    """The states of the global generators, as tensors and plain numbers that load without unpickling code."""
    name, *numbers = np.random.get_state(legacy=True)
    keys, position, has_gauss, gauss = numbers
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Puts the global generators back to `generator_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words), next_gauss))
