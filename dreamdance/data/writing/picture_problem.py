"""The note beside a packed clip that says why its pictures could not become a video."""

import contextlib
from pathlib import Path


def problem_file(folder: Path | str, name: str) -> Path:
    """Where the note of a clip is."""
    return Path(folder) / f".{name}.problem"


def picture_problem(folder: Path | str, name: str) -> str | None:
    """Why the pictures of a clip could not become a video; None if they could, or if the clip is a video."""
    with contextlib.suppress(FileNotFoundError):
        return problem_file(folder, name).read_text(encoding="utf-8")
    return None
