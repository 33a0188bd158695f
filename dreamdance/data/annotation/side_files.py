"""Side files: the results of the stages of a video, each kept under a key of everything that determines it.

A file is complete or absent. Its name contains the hash of its key: the content of the video, the settings of the
stage, the weights of its networks and the keys of the stages before it. So a changed setting makes new files beside the
old ones, and only for the stages that depend on it. This module does not know what the stages do.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.video_names import printable
from dreamdance.runs.files import replace_atomically

logger = logging.getLogger(__name__)

_HASH_DIGITS = 20
# zlib's fastest level; numpy's `savez_compressed` has the level 6 alone.
_COMPRESSION_LEVEL = 1
# What reading a damaged zip file raises; RuntimeError if a flipped bit names a password or an unknown method.
_DAMAGE = (ValueError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
# A result: arrays by name; numbers and texts are stored as arrays too. No object arrays: nothing is unpickled.
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class StageKey:
    """Everything that determines the result of a stage.

    Attributes:
        stage: the stage's name, with which the file's name begins.
        settings: the settings that the stage reads, JSON-able.
        inputs: the keys of the stages, or the hashes of the files, whose content it reads.
    """

    stage: str
    settings: Mapping[str, Any]
    inputs: Sequence[str]

    @property
    def digest(self) -> str:
        """The hash of the key."""
        text = json.dumps([self.stage, dict(self.settings), list(self.inputs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class SideFiles:
    """The side files of one video."""

    def __init__(self, folder: Path) -> None:
        """Creates nothing yet.

        Args:
            folder: the folder of this video's side files.
        """
        self._folder = folder

    def path(self, key: StageKey) -> Path:
        """Where the result of a stage is kept."""
        return self._folder / f"{key.stage}-{key.digest[:_HASH_DIGITS]}.npz"

    def find(self, key: StageKey) -> Arrays | None:
        """The kept result; None if there is none. A damaged file counts as none, with a warning."""
        path = self.path(key)
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            logger.warning("%s is damaged and is made again: %s", printable(path), error)
            return None
        if arrays.pop("key", np.array(())).tolist() != _signature(key, arrays):
            logger.warning("%s belongs to another key, or is incomplete, and is made again", printable(path))
            return None
        return arrays

    def keep(self, key: StageKey, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes a result. Processes that make the same one at the same time write the same content.

        Raises:
            ValueError: an array contains objects.
        """
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise ValueError(f"the result of the stage '{key.stage}' contains objects: {', '.join(objects)}")
        self._folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.path(key)) as temporary, temporary.open("wb") as file:
            _write_arrays(file, {"key": np.array(_signature(key, arrays)), **arrays})

    def make(self, key: StageKey, stage: Callable[[], Iterator[Arrays | None]]) -> Iterator[Arrays | None]:
        """Yields the kept result, or makes and keeps it.

        Args:
            key: everything that determines the result.
            stage: yields None while it works, as a heartbeat, and its result last.

        Yields:
            None while the stage works, then the result.
        """
        result = self.find(key)
        if result is None:
            for found in stage():
                if found is None:
                    yield None
                result = found
            if result is None:
                raise ValueError(f"the stage '{key.stage}' gave no result")
            self.keep(key, result)
        yield result


def last_result(results: Iterator[Arrays | None]) -> Generator[None, None, Arrays]:
    """Passes the heartbeats of `SideFiles.make` on, and returns the result that follows them."""
    for result in results:
        if result is not None:
            return result
        yield None
    raise ValueError("a stage ended without a result")


def _signature(key: StageKey, arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """The hash of the key and the names of the arrays: damage of a zip file's directory can hide arrays."""
    return [key.digest, *sorted(arrays)]


def _write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes a compressed npz file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION_LEVEL) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
