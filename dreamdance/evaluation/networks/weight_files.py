"""Finds the weights of a network among the forms in which they are published, and reads them.

Pickles of packages are converted once to safetensors, beside them or, where nobody may write, in the user's cache.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dreamdance.annotators.weights import NetworkFile, find_network_file
from dreamdance.errors import MissingInputError
from dreamdance.evaluation.networks.pickled_arrays import read_pickled_arrays
from dreamdance.runs.files import replace_atomically

State = dict[str, Tensor]
# Changes when the names or layouts of converted weights do.
_CONVERSION = "1"
_DIGITS = 16  # of the hash, in the name of a converted file


@dataclass(frozen=True)
class Form:
    """One form of a network's weights: some files, and how to read them.

    Attributes:
        files: the files, all of which are needed.
        read: paths of the files -> state dict of our module.
        hash_starts: file -> first digits of its hash, where its authors publish no more.
    """

    files: tuple[NetworkFile, ...]
    read: Callable[[Sequence[Path]], State]
    hash_starts: Mapping[str, str]


def load_first(folder: Path | str, forms: Sequence[Form], network: nn.Module) -> tuple[NetworkFile, ...]:
    """Loads the first form of which any file is there into a network.

    Args:
        folder: the folder of weights.
        forms: in order of preference; the error names the files of the last one, which is fetched by a command.
        network: gets the weights, and is set to evaluation without gradients.

    Returns:
        The files, with their hashes, and whether these were known before.

    Raises:
        MissingInputError: no form is complete, a file has another hash, or its content does not fit.
    """
    there = [form for form in forms if any((Path(folder) / file.file).is_file() for file in form.files)]
    form = (there or list(forms[-1:]))[0]
    found = [find_network_file(folder, file) for file in form.files]
    for path, file in found:
        start = form.hash_starts.get(file.file, "")
        if not str(file.sha256).startswith(start):
            raise MissingInputError(
                f"{path}: SHA-256 {file.sha256}, but the hash of {file.network} begins with {start}"
            )
    paths = [path for path, _ in found]
    try:
        _load_strictly(network, form.read(paths))
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise MissingInputError(f"{paths[0]} has not the weights of {form.files[0].network}: {error}") from error
    return tuple(replace(file, is_pinned=file.is_pinned or file.file in form.hash_starts) for _, file in found)


def read_torch(path: Path) -> State:
    """Reads a state dict of torch, without unpickling anything but tensors; `state_dict` and `module.` are removed."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name.removeprefix("module."): value for name, value in state.items()}


def read_converted(path: Path, convert: Callable[[Mapping[str, Tensor]], State], sha256: str) -> State:
    """Reads a pickle of arrays as our state dict; from the second time on, its conversion to safetensors.

    Args:
        path: the pickle.
        convert: arrays of the pickle, with names as `read_pickled_arrays` gives them -> our state dict.
        sha256: hash of the pickle. A conversion of another file is not read.
    """
    mark = {"source_sha256": sha256, "conversion": _CONVERSION}
    places = [folder / f"{path.stem}.{sha256[:_DIGITS]}.safetensors" for folder in (path.parent, _cache_folder())]
    for place in places:
        try:
            with safe_open(place, framework="pt") as stored:
                if stored.metadata() == mark:
                    return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dictionary
        except (OSError, SafetensorError):
            continue
    arrays = {
        name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in read_pickled_arrays(path).items()
    }
    state = {name: value.contiguous() for name, value in convert(arrays).items()}
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with replace_atomically(place) as temporary:
                temporary.write_bytes(save(state, metadata=mark))  # `save_file` makes it unreadable for colleagues
            break
        except OSError:  # without a place, the pickle is converted each time
            continue
    return state


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamdance" / "networks"


def _load_strictly(network: nn.Module, state: State) -> None:
    """Loads all weights by name and shape. Counters of batches, which old files lack, are not used."""
    counted = {name for name in (*state, *network.state_dict()) if name.endswith("num_batches_tracked")}
    missing, unexpected = network.load_state_dict(state, strict=False)
    wrong = sorted({*missing, *unexpected} - counted)
    if wrong:
        raise ValueError(f"{len(wrong)} names differ, such as {', '.join(wrong[:3])}")
    network.eval().requires_grad_(False)
