"""Prevents two runs from writing into one folder at the same time. No torch here."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamdance.errors import UserError
from dreamdance.runs.locks import NO_LOCKS, HeldLockError, locked_file, shared_file

# The name that all commits use: starts of different commits must exclude one another.
FOLDER_LOCK_FILE = ".claimed"
# A start that another one has replaced ends within seconds (`launch.run_ownership`); until then it holds its locks.
WAIT_SECONDS = 10.0


class OutputError(UserError):
    """A folder for results cannot be written."""


@contextmanager
def lock_folder(folder: Path, *, key: str, sharing: str | None = None) -> Iterator[None]:
    """Creates a folder and locks it until the block ends. The lock ends with the process that holds it.

    If another process holds the lock, this one waits for `WAIT_SECONDS`.

    Args:
        folder: where results go.
        key: the recipe key that names the folder, for the error's text.
        sharing: names the jobs that hold the lock together; None if this job excludes all others.

    Raises:
        OutputError: another run holds the lock, or the folder cannot be created or written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / FOLDER_LOCK_FILE
            if sharing is None:
                held.enter_context(locked_file(lock, wait_seconds=WAIT_SECONDS, remove=True))
            else:
                held.enter_context(shared_file(lock, sharing, wait_seconds=WAIT_SECONDS))
        except HeldLockError as error:
            raise OutputError(
                f"another run is writing into {folder} now ({error}); wait for that run, cancel it, or give another "
                f"`{key}`"
            ) from error
        except OSError as error:
            if sharing is not None and error.errno in NO_LOCKS:
                raise OutputError(
                    f"the file system of {folder} has no locks ({error}), so that several jobs cannot share it; set "
                    f"cluster.array=1, or give another `{key}`"
                ) from error
            raise OutputError(f"{folder} cannot be written: {error}; give another `{key}`") from error
        yield
