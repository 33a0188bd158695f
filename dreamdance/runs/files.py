"""Small files that are there whole or not at all, and what lies in files of any size. No torch here."""

import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

PARTIAL_FILES = "*.partial-*"
"""What writers that were killed leave behind: nobody reads it."""
_HASH_BLOCK_BYTES = 1 << 20


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that a reader, or a crash, sees all of it or nothing (of it, the old file).

    Of several writers at once, on one machine or on many, the last to finish has it.
    """
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong is worth more than what is left
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, not only the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(folder: Path) -> None:
    """Gives all files below a folder the rights that a new one has there.

    safetensors makes its files readable to their owner alone, whatever the umask says: colleagues could not use them.
    """
    probe = folder / f".new.partial-{uuid.uuid4().hex}"
    with probe.open("x") as file:  # asks the umask without changing it, and a folder's own defaults
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def hash_file(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file, as hexadecimal digits.

    Args:
        path: of the file.
        on_block: called after each block, for whoever watches that it goes on.

    Raises:
        OSError: it is missing or cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            on_block()
        return digest.hexdigest()
