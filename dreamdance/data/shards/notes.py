"""Notes record which shard files matched the hash of the index, so that a new start does not hash them again.

A note is a small file per shard, `.verified/NAME.json` beside the index. If that folder cannot be written, the note is
in the user's cache folder; machines with different local folders may share that folder, so the note's name there
contains a hash of its content. A note contains the hash, size and times of the file. It does not apply to a file that
was changed or replaced since, nor to another index. Notes are replaced atomically, so any number of processes may
write them at once; a lock keeps two processes from hashing the same file. A process that can write a note can also
write the shard, so notes are trusted.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from dreamdance.data.shards.index import ShardFile
from dreamdance.data.shards.shard_files import strongest_hash
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import write_atomically
from dreamdance.runs.locks import HeldLockError, locked_file

logger = logging.getLogger(__name__)

NOTES_FOLDER = ".verified"
MAX_NOTE_BYTES = 1024
# Time to wait for another process that hashes the same shard; that process may hang. The timeout for a batch is longer.
HASHING_SECONDS = 30.0


class ShardNotes:
    """The notes about one folder of shards; every process reads and writes them in the same folders."""

    def __init__(self, folder: Path) -> None:
        """Stores the folder; reads no note yet.

        Args:
            folder: the folder of the shards.
        """
        self.folder = folder
        self._unwritable: set[Path] = set()

    def has(self, file: ShardFile, state: FileStamp) -> bool:
        """Whether a note records that the file, in this state, matched the index."""
        wanted = _text(file, state)
        return any(_read(self._note(folder, file, state)) == wanted for folder in self._note_folders())

    @contextlib.contextmanager
    def hashing(self, file: ShardFile, state: FileStamp) -> Iterator[None]:
        """Keeps other processes from hashing the same file during the block.

        Call `has` again inside the block: another process may have written the note in the meantime. If another
        process holds the lock for too long, or no lock can be created, the block runs without the lock; the only
        consequence is that a file may be hashed more than once.
        """
        with contextlib.ExitStack() as held:
            for folder in self._note_folders():
                lock = self._note(folder, file, state).with_suffix(".lock")
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked_file(lock, wait_seconds=HASHING_SECONDS, remove=True))
                    break
                except HeldLockError as error:
                    logger.info("%s, for over %.0f s; this process hashes the shard too", error, HASHING_SECONDS)
                    break
                except OSError:
                    continue
            yield

    def write(self, file: ShardFile, state: FileStamp) -> None:
        """Notes that the file matched the index; warns once if no folder for notes can be written."""
        for folder in self._note_folders():
            if folder in self._unwritable:
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._note(folder, file, state), _text(file, state))
                return
            except OSError as error:
                self._unwritable.add(folder)
                logger.info("cannot write notes about verified shards into %s: %s", folder, error)
                if folder == cache_folder(self.folder):
                    logger.warning(
                        "cannot write notes about verified shards, neither in %s nor in %s: each process hashes again "
                        "every shard that it opens. Set XDG_CACHE_HOME to a folder that can be written",
                        self.folder,
                        folder,
                    )

    def _note(self, folder: Path, file: ShardFile, state: FileStamp) -> Path:
        if folder.parent == self.folder:
            return folder / f"{file.name}.json"
        return folder / f"{file.name}.{sha256(_text(file, state).encode()).hexdigest()[:16]}.json"

    def _note_folders(self) -> Iterator[Path]:
        beside = self.folder / NOTES_FOLDER
        if not beside.is_symlink():  # a link in someone else's folder could make us write elsewhere
            yield beside
        if (cache := cache_folder(self.folder)) is not None:
            yield cache


def cache_folder(folder: Path) -> Path | None:
    """The cache folder for notes about a folder that cannot be written; None if the user has no home folder."""
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
