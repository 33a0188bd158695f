"""The COMPLETE file: a list of a checkpoint's files, with sizes and hashes. A checkpoint counts only if it has one.

COMPLETE is written last, and renamed into place. This module does not know tensors, ranks or the content of files.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dreamdance.errors import CheckpointError
from dreamdance.runs.files import hash_file, retry_transient, sync, write_atomically
from dreamdance.runs.layout import COMPLETE_FILE, step_of

# The format's number. Increase it whenever older checkpoints lack something that is needed to resume.
FORMAT = 3
# The format with weights and optimizer state in DeepSpeed's own files.
DEEPSPEED_FORMAT = 2


class FormatError(CheckpointError):
    """A sound checkpoint has the format of another version of this software; to skip it would lose its steps."""

    def __init__(self, folder: Path, difference: str, *, can_be_converted: bool = False) -> None:
        command = f"python tools/convert_checkpoint.py {folder.parent.parent}"
        super().__init__(
            f"{folder} was saved by another version of this software: {difference}. "
            + (f"Convert this run's checkpoints by `{command}`, or continue" if can_be_converted else "Continue")
            + " with the version that saved it (provenance.json in the run folder names its commit), or start a new "
            "run with init_from"
        )


@dataclass(frozen=True)
class FileRecord:
    """One file of a complete folder; `path` is relative to the folder, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a COMPLETE file."""

    step: int
    world_size: int
    recipe_digest: str
    files: tuple[FileRecord, ...]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files)


class HashedFile:
    """Writes to a file and updates a hash at the same time.

    Attributes:
        bytes: number of bytes written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.bytes = 0
        self._file, self._hash = file, sha256()

    def write(self, data: Any, /) -> None:
        """Writes bytes or a flat view of memory."""
        self._hash.update(data)
        self._file.write(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_files(folder: Path, files: Mapping[str, Callable[[HashedFile], None]]) -> list[FileRecord]:
    """Writes files of a checkpoint, and reads each back from the disk to compare hashes; retries after errors.

    Args:
        folder: the checkpoint's folder, which exists.
        files: name -> a function that writes the content to the open file.

    Raises:
        OSError: after several attempts, a file could not be written, or its content on the disk was different.
    """
    return [
        retry_transient(
            partial(_write_file, folder, name, write),
            f"writing {folder / name}",
            # Any error: a full disk may have room again after a while.
            should_retry=lambda error: isinstance(error, OSError),
        )
        for name, write in files.items()
    ]


def _write_file(folder: Path, name: str, write: Callable[[HashedFile], None]) -> FileRecord:
    with (folder / name).open("wb") as file:
        hashed = HashedFile(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
    record = FileRecord(name, hashed.bytes, hashed.sha256)
    if problems := find_damage(folder, [record]):
        raise OSError(errno.EIO, f"the file on the disk is not what was written: {problems[0]}")
    return record


def complete(folder: Path, manifest: Manifest) -> None:
    """Makes `folder` count, in one atomic step; all its files must be on the disk."""
    sync(folder)
    values = {"format": FORMAT, **asdict(manifest)}
    write_atomically(folder / COMPLETE_FILE, json.dumps({**values, "sha256": _digest(values)}, indent=1))
    sync(folder.parent)


def read_manifest(folder: Path, *, expected: int = FORMAT) -> Manifest:
    """Reads `COMPLETE`.

    Args:
        folder: the checkpoint's folder.
        expected: the format to accept.

    Raises:
        FormatError: the file is in another format.
        CheckpointError: the file is missing (the save was interrupted), or it is damaged.
    """
    path = folder / COMPLETE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no {COMPLETE_FILE}: its save was interrupted")
    try:
        text = retry_transient(partial(path.read_text, encoding="utf-8"), f"reading {path}")
        manifest = _parse(folder, text, expected)
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder.name}/{COMPLETE_FILE} is damaged: {error}") from error
    for record in manifest.files:
        parts = PurePosixPath(record.path).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise CheckpointError(f"{folder.name}/{COMPLETE_FILE} names a file outside of its folder: {record.path}")
    return manifest


def _parse(folder: Path, text: str, expected: int) -> Manifest:
    values: dict[str, Any] = json.loads(text)
    digest = values.pop("sha256", None)
    if digest != (None if values["format"] == 1 else _digest(values)):  # the first format had none
        raise ValueError("it differs from what was saved (sha256)")
    if (found := values.pop("format")) != expected:
        difference = f"its format is {found}, not {FORMAT}"
        raise FormatError(folder, difference, can_be_converted=found == DEEPSPEED_FORMAT)
    files = tuple(FileRecord(str(record.pop("path")), **record) for record in values.pop("files"))
    manifest = Manifest(files=files, **values)
    if step_of(folder) not in (None, manifest.step):
        raise ValueError(f"it belongs to step {manifest.step}")
    return manifest


def _digest(values: Mapping[str, Any]) -> str:
    """Hash of all other values in a manifest, independent of the text's layout; the same in all formats from 2 on."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find_damage(folder: Path, records: Iterable[FileRecord], *, by_size_alone: bool = False) -> list[str]:
    """Describes each file that is missing, or has another size or hash; the list is empty if all files are sound.

    Args:
        folder: the checkpoint's folder.
        records: the files to check.
        by_size_alone: whether to compare sizes only; reading the files may take minutes.
    """
    problems = []
    for record in records:
        path = folder / record.path
        try:
            if not path.is_file():
                problems.append(f"{folder.name}/{record.path} is missing")
            elif (size := path.stat().st_size) != record.bytes:
                problems.append(f"{folder.name}/{record.path} has {size:,} bytes instead of {record.bytes:,}")
            elif not by_size_alone and retry_transient(partial(hash_file, path), f"reading {path}") != record.sha256:
                problems.append(f"{folder.name}/{record.path} differs from what was saved (sha256)")
        except OSError as error:
            problems.append(f"{folder.name}/{record.path} cannot be read: {error}")
    return problems
