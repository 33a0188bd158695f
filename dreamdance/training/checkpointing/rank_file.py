"""One rank's file of a checkpoint: its elements of every parameter that trains, in the safetensors format.

The tensor `KIND/NAME` holds consecutive elements of the flattened parameter NAME; the file's metadata contain the index
of the first one. Therefore one function reads a checkpoint on any number of ranks: each rank reads the elements that it
owns now from the files that hold them. Such a file cannot run code, and cannot fill more memory than its size.
"""

import json
import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamdance.errors import CheckpointError

# Key of our own values, as JSON, in the safetensors metadata.
_METADATA_KEY = "dreamdance"


class Output(Protocol):
    """Something with `write`, to which a file's content is written."""

    def write(self, data: Any, /) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter, in memory.

    Attributes:
        start: index of the first element in the flattened parameter.
        values: kind ("master", "exp_avg", "exp_avg_sq", "average") -> fp32 elements; all kinds have the same size.
        step_count: number of steps that AdamW has applied to them.
    """

    start: int
    values: Mapping[str, Tensor]
    step_count: float = 0.0


@dataclass(frozen=True)
class RankFile:
    """The content of one rank's file.

    Attributes:
        tensors: `KIND/NAME` -> flat fp32 tensor.
        pieces: parameter -> (index of the first element, AdamW's count of steps).
        average_updates: number of updates of the moving average.
        generators: the result of `generator_states`.
    """

    tensors: Mapping[str, Tensor]
    pieces: Mapping[str, tuple[int, float]]
    average_updates: int
    generators: Mapping[str, Any]

    @classmethod
    def of(cls, pieces: Mapping[str, Piece], *, average_updates: int, generators: Mapping[str, Any]) -> "RankFile":
        """Makes the content of a file from pieces; the tensors share the memory of contiguous pieces."""
        tensors = {f"{kind}/{name}": value.detach().flatten()
                   for name, piece in pieces.items() for kind, value in piece.values.items()}  # fmt: skip
        places = {name: (piece.start, piece.step_count) for name, piece in pieces.items()}
        return cls(tensors, places, average_updates, generators)

    def write(self, file: Output) -> None:
        """Writes the safetensors format tensor by tensor; the library would first build the whole file in memory."""
        own = {"pieces": self.pieces, "average_updates": self.average_updates, "generators": self.generators}
        header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(own)}}
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in self.tensors.values():
            file.write(tensor.cpu().numpy().data.cast("B"))


def rank_path(folder: Path, rank: int) -> Path:
    """Path of one rank's file in a checkpoint."""
    return folder / f"rank_{rank:05d}.safetensors"


def read_rank_file(folder: Path, rank: int) -> RankFile:
    """Reads one rank's file without its tensors.

    Raises:
        CheckpointError: the file is not in this format.
    """
    with _opened(rank_path(folder, rank)) as (_, content):
        return content


def read_pieces(folder: Path, world_size: int, pieces: Mapping[str, Piece]) -> dict[str, float]:
    """Reads the elements of `pieces` from the files of a complete checkpoint.

    The files are mapped into memory; only the needed elements are read.

    Args:
        folder: the checkpoint.
        world_size: number of ranks that saved it.
        pieces: parameter -> elements to read; their values are overwritten.

    Returns:
        parameter -> AdamW's count of steps.

    Raises:
        CheckpointError: a file is not in this format, or no file holds some of the elements.
    """
    readers, step_counts = {name: _PieceReader(name, piece) for name, piece in pieces.items()}, {}
    for rank in range(world_size):
        path = rank_path(folder, rank)
        with _opened(path) as (tensors, content):
            for name in content.pieces.keys() & readers.keys():
                start, step_counts[name] = content.pieces[name]
                readers[name].take(tensors, path, start)
    for reader in readers.values():
        reader.finish(folder)
    return step_counts


class _PieceReader:
    """Reads the elements of one piece from the files of all ranks, in the order of ranks."""

    def __init__(self, name: str, piece: Piece) -> None:
        self.name, self.piece, self.found = name, piece, 0
        # A parameter in another memory format (channels_last) is read into a flat tensor, and copied in `finish`.
        self._flat = {kind: value.contiguous().view(-1) for kind, value in piece.values.items()}
        self._size = max(len(value) for value in self._flat.values())

    def take(self, tensors: Any, path: Path, start: int) -> None:
        """Copies the needed elements from an open file; the file's elements start at `start` in the parameter."""
        length = 0
        for kind, target in self._flat.items():
            source = tensors.get_slice(f"{kind}/{self.name}")
            shape, dtype = source.get_shape(), source.get_dtype()
            if dtype != "F32" or len(shape) != 1:
                raise CheckpointError(f"{path}: {kind}/{self.name} is {dtype} {shape}, not flat F32")
            first, last = max(start, self.piece.start), min(start + shape[0], self.piece.start + self._size)
            if first >= last:
                return
            if first != self.piece.start + self.found:
                raise CheckpointError(
                    f"{path}: {kind}/{self.name} starts at element {first:,}, not at {self.piece.start + self.found:,}"
                )
            length = last - first
            target.narrow(0, self.found, length).copy_(source[first - start : last - start])
        self.found += length

    def finish(self, folder: Path) -> None:
        """Checks that all elements were found."""
        if self.found != self._size:
            raise CheckpointError(
                f"{folder} holds {self.found:,} of {self._size:,} elements of {self.name} from {self.piece.start:,} on"
            )
        for kind, value in self.piece.values.items():
            if not value.is_contiguous():
                value.copy_(self._flat[kind].view_as(value))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, RankFile]]:
    """Opens a rank's file; yields the safetensors file, and its content without the tensors."""
    with ExitStack() as held:
        try:
            file = held.enter_context(safe_open(path, framework="pt", device="cpu"))
            own = json.loads(file.metadata()[_METADATA_KEY])
            pieces = {str(name): (int(start), float(count)) for name, (start, count) in own["pieces"].items()}
            content = RankFile({}, pieces, int(own["average_updates"]), own["generators"])
            yield file, content
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is not a rank's file of a checkpoint, although its hash agrees with the manifest: {error}. "
                "No code in it was run. If you do not know the origin of this checkpoint, delete it"
            ) from error


def generator_states() -> dict[str, Any]:
    """The states of the global random number generators, as JSON values."""
    name, *numbers = np.random.get_state(legacy=True)
    keys, position, has_gauss, gauss = numbers
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
        "numpy": [str(name), np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Sets the global random number generators to the result of `generator_states`."""
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words), next_gauss))
