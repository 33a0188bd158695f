"""Keeps two runs from writing into one folder at once. No torch here."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamdance.errors import UserError
from dreamdance.runs.locks import HeldLockError, locked_file

FOLDER_LOCK_FILE = ".claimed"
# A start that another one has replaced ends within seconds (`launch.run_ownership`); until then it holds its locks.
WAIT_SECONDS = 10.0


class OutputError(UserError):
    """A folder for results cannot be written."""


@contextmanager
def lock_folder(folder: Path, *, key: str) -> Iterator[None]:
    """Makes a folder and holds it until the block is left; a claim dies with the process that holds it.

    Another process's claim is waited for, but not for long.

    Args:
        folder: where results go.
        key: of the recipe, which names the folder.

    Raises:
        OutputError: another run holds it, or it cannot be made or written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_file(folder / FOLDER_LOCK_FILE, wait_seconds=WAIT_SECONDS, remove=True))
        except HeldLockError as error:
            raise OutputError(
                f"another run is writing into {folder} at this moment ({error}); wait for it, cancel it, or give "
                f"another `{key}`"
            ) from error
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error}; give another `{key}`") from error
        yield
