"""Notes which shard files were compared with the index by hash, so that no start reads them all again.

A note is a small file per shard, `.verified/NAME.json` beside the index; where that folder cannot be written, in the
user's cache, which machines may share whose folders are their own: there a note's name has a hash of its content. It
holds the file's size and times then, and its hash: of a file that was changed or replaced since, or of another index,
it says nothing. Written whole or not at all, so that any number of processes on any number of nodes may write at once;
the lock is for those who would hash the same file. Whoever can write a note can write the shard, so notes are believed.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from dreamdance.data.shards.files import strongest_hash
from dreamdance.data.shards.index import ShardFile
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import write_atomically
from dreamdance.runs.locks import HeldLockError, locked_file

logger = logging.getLogger(__name__)

NOTES_FOLDER = ".verified"
MAX_NOTE_BYTES = 1024
HASHING_SECONDS = 30.0
"""How long another process that hashes the same shard is waited for. It may hang; a batch is awaited longer."""


class ShardNotes:
    """The notes about one folder of shards; read and written in the same places by every process."""

    def __init__(self, folder: Path) -> None:
        """Looks at nothing yet.

        Args:
            folder: where the shards lie.
        """
        self.folder = folder
        self._unwritable: set[Path] = set()

    def has(self, file: ShardFile, state: FileStamp) -> bool:
        """Whether the file was found to be the index's while it was in this state."""
        wanted = _text(file, state)
        return any(_read(self._note(folder, file, state)) == wanted for folder in self._places())

    @contextlib.contextmanager
    def hashing(self, file: ShardFile, state: FileStamp) -> Iterator[None]:
        """Keeps other processes from hashing the same file in the block; ask `has` in it, another may have been faster.

        Without that where another process keeps it for long, or where no lock can be made: then a file may be hashed
        more often than it needs to be, no more.
        """
        with contextlib.ExitStack() as held:
            for folder in self._places():
                lock = self._note(folder, file, state).with_suffix(".lock")
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked_file(lock, wait_seconds=HASHING_SECONDS, remove=True))
                    break
                except HeldLockError as error:
                    logger.info("%s, for over %.0f s; the shard is hashed here as well", error, HASHING_SECONDS)
                    break
                except OSError:
                    continue
            yield

    def write(self, file: ShardFile, state: FileStamp) -> None:
        """Notes that the file was found to be the index's; says so once where it can be noted nowhere."""
        for folder in self._places():
            if folder in self._unwritable:
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._note(folder, file, state), _text(file, state))
                return
            except OSError as error:
                self._unwritable.add(folder)
                logger.info("verified shards are not noted in %s: %s", folder, error)
                if folder == cache_folder(self.folder):
                    logger.warning(
                        "neither beside the shards of %s nor in %s can be noted which of them were verified: each "
                        "process will hash again what it opens; see XDG_CACHE_HOME",
                        self.folder,
                        folder,
                    )

    def _note(self, folder: Path, file: ShardFile, state: FileStamp) -> Path:
        if folder.parent == self.folder:
            return folder / f"{file.name}.json"
        return folder / f"{file.name}.{sha256(_text(file, state).encode()).hexdigest()[:16]}.json"

    def _places(self) -> Iterator[Path]:
        beside = self.folder / NOTES_FOLDER
        if not beside.is_symlink():  # it would let a foreign folder have us write elsewhere
            yield beside
        if (cache := cache_folder(self.folder)) is not None:
            yield cache


def cache_folder(folder: Path) -> Path | None:
    """Where notes about a folder lie that cannot be written; None where the user has no home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "dreamdance" / "verified_shards" / sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _text(file: ShardFile, state: FileStamp) -> str:
    algorithm = strongest_hash(file)
    return json.dumps(
        {
            "bytes": state.size,
            "mtime_ns": state.mtime_ns,
            "ctime_ns": state.ctime_ns,
            algorithm: file.hashes[algorithm],
        }
    )


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_NOTE_BYTES).decode()
    except (OSError, ValueError):
        return None
