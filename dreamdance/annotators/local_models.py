"""Folders of networks in the formats of transformers and diffusers: their files, devices and types of arithmetic.

Nothing is downloaded, and weights are safetensors.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dreamdance.annotators.weights import NetworkFile, find_network_file
from dreamdance.errors import MissingInputError, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_torch(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the type of these names.

    Raises:
        UserError: there is no such device or type.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' of an annotator: accepted are {', '.join(DTYPES)}")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts that it was built with CUDA
        raise UserError(
            f"device '{device}' of an annotator cannot be used: {str(error).splitlines()[0]}; accepted are 'cpu', "
            "'cuda' and 'cuda:<number>'"
        ) from error
    return chosen, DTYPES[dtype]


def find_weights(
    folder: Path | str,
    files: Sequence[str],
    *,
    network: str,
    licence: str,
    source: str,
    kind: tuple[str, str, str],
) -> tuple[NetworkFile, ...]:
    """Finds the files of a network and checks what they say about its kind.

    Args:
        folder: the network's folder.
        files: paths within it.
        network, licence, source: as in `NetworkFile`.
        kind: a JSON file of the folder, a key, and the value that it must have.

    Raises:
        MissingInputError: a file is missing.
        UserError: the network is of another kind.
    """
    found = tuple(find_network_file(folder, NetworkFile(network, file, licence, source))[1] for file in files)
    name, key, expected = kind
    path = Path(folder) / name
    try:
        value = json.loads(path.read_text()).get(key)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from error
    if value != expected:
        raise UserError(f"{path}: {key} is {value!r}, but {network} has {expected!r}")
    return found


def import_class(package: str, name: str) -> Any:
    """A class of transformers or diffusers, whose import takes seconds.

    Raises:
        MissingInputError: the installed version lacks it.
    """
    module = importlib.import_module(package)
    try:
        return getattr(module, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        version = getattr(module, "__version__", "?")
        raise MissingInputError(f"{package} {version} has no {name}: {error}") from error
