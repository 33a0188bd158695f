"""A run's note of the files that it read and wrote; tells later whether one was replaced or removed.

No torch here: the launcher uses this on a login node.
"""

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from dreamdance.runs.file_states import FileStamp, FileState, read_state
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import FILES_FILE

NUM_THREADS = 16  # a network file system answers many requests at once in the time of one

# What must still hold for a file: its size; if the note has them, also its times, or its sha256 if the times differ.
Expectation = dict[str, int | str]


def of_content(state: FileState) -> Expectation:
    """For an input of a result: the content must be the same."""
    return state.to_json()


def of_times(path: Path) -> Expectation:
    """For a large file whose readers check its content themselves: size and times must be the same.

    Raises:
        OSError: the file does not exist.
    """
    return asdict(FileStamp.of(path))


def write_note(run_folder: Path, files: Mapping[Path, Expectation]) -> None:
    """Notes the files that must be unchanged for the run to count as done."""
    content = {str(path.absolute()): expected for path, expected in files.items()}
    write_atomically(run_folder / FILES_FILE, json.dumps(content) + "\n")


def forget_note(run_folder: Path) -> None:
    """Removes the note, so that the run counts as not done."""
    (run_folder / FILES_FILE).unlink(missing_ok=True)


def noted_states(run_folder: Path) -> dict[Path, FileState]:
    """The file states in the run's last note, by absolute path; empty without a note."""
    states = {path: FileState.from_json(expected) for path, expected in _read(run_folder).items()}
    return {Path(path): state for path, state in states.items() if state is not None}


def is_as_noted(run_folder: Path) -> bool:
    """Whether a note exists and every file matches it. A file is read only if its times differ, and only once."""
    note = _read(run_folder)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        shares = [list(note.items())[start::NUM_THREADS] for start in range(NUM_THREADS)]
        found = dict(chain.from_iterable(pool.map(_find_matching, shares)))
    if not note or len(found) < len(note):
        return False
    if found != note:  # the same content at other times: note these, so that the next call need not read the file
        with contextlib.suppress(OSError):  # the run may belong to another user
            write_note(run_folder, {Path(path): found[path] for path in note})
    return True


def _find_matching(files: list[tuple[str, Any]]) -> list[tuple[str, Expectation]]:
    """The files that match, with their present times; stops at the first that does not."""
    alike = []
    for path, expected in files:
        try:
            present = _present(Path(path), expected)
        except (OSError, TypeError, KeyError):  # the file is missing or out of reach, or the note is damaged
            break
        if present is None:
            break
        alike.append((path, present))
    return alike


def _present(path: Path, expected: Any) -> Expectation | None:
    look = of_times(path)
    if look["size"] != expected["size"]:
        return None
    if "mtime_ns" not in expected or look.items() <= expected.items():
        return dict(expected)
    known = FileState.from_json(expected)
    state = None if known is None else read_state(path, known)
    return of_content(state) if known is not None and state is not None and state.sha256 == known.sha256 else None


def _read(run_folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((run_folder / FILES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}
