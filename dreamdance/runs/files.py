"""Writes files and folders that are complete or absent, repeats operations that failed for a moment, hashes content.

This module does not know what the files contain. No torch here.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dreamdance.errors import is_transient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Matches every temporary name of `replace_atomically`: files that a killed process left; nobody reads them.
PARTIAL_FILES = "*.partial*"

# Attempts of `retry_transient`, and the pause after the first failure; each further pause is twice as long, up to the
# longest. Four attempts wait 7 s in all, ten wait 55 s.
NUM_ATTEMPTS = 4
NUM_PATIENT_ATTEMPTS = 10
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 8.0

_HASH_BLOCK_BYTES = 1 << 20


@contextmanager
def replace_atomically(path: Path, *, is_only_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the file or folder that the block creates there then replaces `path`.

    A reader, or a process that starts after a crash, finds the new content complete or the old content unchanged.
    (Only a folder that replaces another folder leaves a moment in which neither is there.) The content is on the disk
    before it gets its name. A block that raises, or leaves nothing at the temporary path, changes nothing.

    The temporary path lies beside `path`, is hidden, and keeps the suffix: `clip.mp4` becomes `.clip.partial.mp4`.

    Args:
        path: what to replace; its parent folder must exist.
        is_only_writer: whether a lock, or the caller's rank, excludes other writers of `path`. Then the temporary name
            is fixed, and what a killed process left there is removed first. Otherwise each writer has a name of its
            own, and the last writer to finish determines the content.

    Raises:
        OSError: the content cannot be written, or cannot be renamed.
    """
    mark = ".partial" if is_only_writer else f".partial-{uuid.uuid4().hex[:12]}"
    temporary = path.with_name(f".{path.stem}{mark}{path.suffix}")
    if is_only_writer:
        remove(temporary)
    try:
        yield temporary
        if os.path.lexists(temporary):
            _sync_all(temporary)
            if temporary.is_dir():
                _make_room(path, path.with_name(f".{path.stem}{mark}-old{path.suffix}"))
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error explains more than a failed clean-up
            remove(temporary)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file, complete or not at all. If several write, the last one to finish determines it."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def retry_transient(
    action: Callable[[], Result],
    what: str,
    *,
    num_attempts: int = NUM_ATTEMPTS,
    should_retry: Callable[[Exception], bool] = is_transient,
) -> Result:
    """Returns what `action` returns; repeats it after a pause where it raises a transient error.

    Args:
        action: may be called several times.
        what: names the action in the log, e.g. `"reading /data/index.json"`.
        num_attempts: how often `action` is called at most.
        should_retry: which errors another attempt may cure.

    Raises:
        Exception: the error of the last attempt, or the first that `should_retry` rejects.
    """
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except Exception as error:
            num_attempts -= 1
            if num_attempts > 0 and should_retry(error):
                logger.warning("%s failed, trying again in %.0f s: %s", what, pause, error)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            raise


def sync(path: Path) -> None:
    """Brings the content of one file, or the names in one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def follow_umask(folder: Path) -> None:
    """Gives all files below a folder the permissions that a new file has there.

    safetensors makes its files readable to their owner alone, whatever the umask is: colleagues could not use them.
    """
    probe = folder / f".new.partial-{uuid.uuid4().hex}"
    with probe.open("x") as file:  # shows the umask without changing it, and a folder's own defaults
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def hash_file(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """Returns the sha256 of a file as hexadecimal digits.

    Args:
        path: the file.
        on_block: called after each block, so that a watchdog sees progress.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            on_block()
        return digest.hexdigest()


def _make_room(path: Path, aside: Path) -> None:
    """Frees a folder's name: renames the old folder, then removes it, so that nobody finds half of it by that name."""
    remove(aside)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
    remove(aside)


def _sync_all(path: Path) -> None:
    """Brings a file, or a folder with all that is in it, to the disk."""
    for below in path.rglob("*"):  # rglob yields nothing for a file
        if not below.is_symlink():
            sync(below)
    sync(path)
