"""The COMPLETE file: a folder counts only once this list of its files, with sizes and hashes, is renamed into place.

Pure file work: knows nothing of tensors, ranks or what the files hold.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from dreamdance.errors import CheckpointError, is_transient
from dreamdance.runs.files import hash_file, sync_folder, write_atomically
from dreamdance.runs.layout import COMPLETE_FILE, step_of

Result = TypeVar("Result")

# A full disk or a file server that restarts may be well again after so long.
RETRY_AFTER_SECONDS = (1.0, 5.0)
FORMAT = 2
"""To be raised whenever a run that resumes asks for something that older checkpoints do not hold, or hold otherwise."""


class FormatError(CheckpointError):
    """A checkpoint that is sound, but of another version of this software: passing over it would lose its steps."""

    def __init__(self, folder: Path, difference: str) -> None:
        super().__init__(
            f"{folder} was saved by another version of this software: {difference}. Go on with the version that saved "
            "it (provenance.json in the run folder names its commit), or start a new run with init_from"
        )


@dataclass(frozen=True)
class FileRecord:
    """One file of a complete folder; `path` is relative to the folder, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    step: int
    world_size: int
    recipe_digest: str
    files: tuple[FileRecord, ...]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files)


class HashedFile:
    """What is written goes to a file and into a hash at once; as much of a file as `torch.save` wants.

    Attributes:
        bytes: written so far.
        error: why the last write failed; `torch.save` hides it behind one of its own.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.bytes = 0
        self.error: OSError | None = None
        self._file, self._hash = file, sha256()

    def write(self, data: Any) -> int:
        """Writes bytes, or a flat view of memory."""
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_file(path: Path, folder: Path, write: Callable[[HashedFile], None]) -> FileRecord:
    """Writes a file of `folder`, hashing on the way, and makes sure that the same lies on the disk.

    Args:
        path: in `folder`, or in a folder there.
        folder: of the checkpoint, which is there.
        write: is given the open file.

    Raises:
        OSError: it cannot be written, or what is read back is not what was written.
    """
    path.parent.mkdir(exist_ok=True)  # without its parents: a run folder that was removed does not come back
    with path.open("wb") as file:
        hashed = HashedFile(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
    record = FileRecord(path.relative_to(folder).as_posix(), hashed.bytes, hashed.sha256)
    if problems := damage(folder, [record]):
        raise OSError(errno.EIO, f"what was written did not come to disk: {problems[0]}")
    return record


def complete(folder: Path, manifest: Manifest) -> None:
    """Makes `folder` count, in one atomic step, after every file in it has come to disk."""
    for parent in {folder, *((folder / record.path).parent for record in manifest.files)}:
        sync_folder(parent)
    values = {"format": FORMAT, **asdict(manifest)}
    write_atomically(folder / COMPLETE_FILE, json.dumps({**values, "sha256": _digest(values)}, indent=1))
    sync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """Reads `COMPLETE`.

    Raises:
        FormatError: it is of another version of this software.
        CheckpointError: there is none (the save was cut short), or it is damaged.
    """
    path = folder / COMPLETE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no {COMPLETE_FILE}: its save was cut short")
    try:
        manifest = _parse(folder, _insist(partial(path.read_text, encoding="utf-8")))
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder.name}/{COMPLETE_FILE} is damaged: {error}") from error
    for record in manifest.files:
        parts = PurePosixPath(record.path).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise CheckpointError(f"{folder.name}/{COMPLETE_FILE} names a file outside of its folder: {record.path}")
    return manifest


def _parse(folder: Path, text: str) -> Manifest:
    values: dict[str, Any] = json.loads(text)
    digest = values.pop("sha256", None)
    if digest != (None if values["format"] == 1 else _digest(values)):  # the first format had none
        raise ValueError("it differs from what was saved (sha256)")
    if (found := values.pop("format")) != FORMAT:
        raise FormatError(folder, f"its format is {found}, not {FORMAT}")
    files = tuple(FileRecord(str(record.pop("path")), **record) for record in values.pop("files"))
    manifest = Manifest(files=files, **values)
    if step_of(folder) not in (None, manifest.step):
        raise ValueError(f"it is of step {manifest.step}")
    return manifest


def _digest(values: Mapping[str, Any]) -> str:
    """A hash of everything else in a manifest, however it is laid out; the same in all formats from 2 on."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, records: Iterable[FileRecord], *, by_size_alone: bool = False) -> list[str]:
    """Says which files are missing, of the wrong size, or different by their hash; empty where all is well.

    Args:
        folder: the checkpoint's.
        records: what should lie there.
        by_size_alone: does not read the files, which may take minutes.
    """
    problems = []
    for record in records:
        path = folder / record.path
        try:
            if not path.is_file():
                problems.append(f"{folder.name}/{record.path} is missing")
            elif (size := path.stat().st_size) != record.bytes:
                problems.append(f"{folder.name}/{record.path} has {size:,} bytes instead of {record.bytes:,}")
            elif not by_size_alone and _insist(partial(hash_file, path)) != record.sha256:
                problems.append(f"{folder.name}/{record.path} differs from what was saved (sha256)")
        except OSError as error:
            problems.append(f"{folder.name}/{record.path} cannot be read: {error}")
    return problems


def _insist(read: Callable[[], Result]) -> Result:
    """Reads again where storage stumbles: taking an older checkpoint instead would cost steps."""
    for pause in RETRY_AFTER_SECONDS:
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
            time.sleep(pause)
    return read()
