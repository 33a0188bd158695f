"""Prevents two runs from writing into one folder at the same time. No torch here."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamdance.errors import UserError
from dreamdance.runs.locks import HeldLockError, locked_file

# The name that all commits use: starts of different commits must exclude one another.
FOLDER_LOCK_FILE = ".claimed"
# A start that another one has replaced ends within seconds (`launch.run_ownership`); until then it holds its locks.
WAIT_SECONDS = 10.0


class OutputError(UserError):
    """A folder for results cannot be written."""


@contextmanager
def lock_folder(folder: Path, *, key: str) -> Iterator[None]:
    """Creates a folder and locks it until the block ends. The lock ends with the process that holds it.

    If another process holds the lock, this one waits for `WAIT_SECONDS`.

    Args:
        folder: where results go.
        key: the recipe key that names the folder, for the error's text.

    Raises:
        OutputError: another run holds the lock, or the folder cannot be created or written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_file(folder / FOLDER_LOCK_FILE, wait_seconds=WAIT_SECONDS, remove=True))
        except HeldLockError as error:
            raise OutputError(
                f"another run is writing into {folder} now ({error}); wait for that run, cancel it, or give another "
                f"`{key}`"
            ) from error
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error}; give another `{key}`") from error
        yield
