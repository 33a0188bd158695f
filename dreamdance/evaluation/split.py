"""A split file: the ids of the clips that a table is about, one in each line, so that two people compare the same."""

from pathlib import Path

from dreamdance.errors import MissingInputError


def read_split(path: Path) -> set[str]:
    """The ids in a split file; empty lines, and those that begin with `#`, are left out.

    Raises:
        MissingInputError: there is no such file, or it names no clip.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInputError(f"{path} cannot be read ({error}); it has one id in each line (key: split)") from error
    ids = {line for line in lines if line and not line.startswith("#")}
    if not ids:
        raise MissingInputError(f"{path} names no clip; it has one id in each line (key: split)")
    return ids
