"""A run's note of the files that it read and wrote, so that it is noticed when one is replaced or removed.

No torch here: a login node asks, too.
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

NUM_THREADS = 16
"""A network file system answers many questions at once in the time of one."""

Expectation = dict[str, int | str]
"""What must still be so of a file: its size; where they are given, its times too, or at other times its sha256."""


def of_content(state: FileState) -> Expectation:
    """For what a result was made from: the same content."""
    return state.to_json()


def of_times(path: Path) -> Expectation:
    """For large files whose users check their content: not written to.

    Raises:
        OSError: there is no such file.
    """
    return asdict(FileStamp.of(path))


def write_note(run_folder: Path, files: Mapping[Path, Expectation]) -> None:
    """Notes what must still be so for the run's work to be done."""
    content = {str(path.absolute()): expected for path, expected in files.items()}
    write_atomically(run_folder / FILES_FILE, json.dumps(content) + "\n")


def forget_note(run_folder: Path) -> None:
    """Has the run count as not done."""
    (run_folder / FILES_FILE).unlink(missing_ok=True)


def noted_states(run_folder: Path) -> dict[Path, FileState]:
    """The contents that the run's last note knows, by absolute path; none where there is no note."""
    states = {path: FileState.from_json(expected) for path, expected in _read(run_folder).items()}
    return {Path(path): state for path, state in states.items() if state is not None}


def is_as_noted(run_folder: Path) -> bool:
    """Whether there is a note, and every file is as it says; only files of other times are read, and that once."""
    note = _read(run_folder)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        shares = [list(note.items())[start::NUM_THREADS] for start in range(NUM_THREADS)]
        found = dict(chain.from_iterable(pool.map(_look_again, shares)))
    if not note or len(found) < len(note):
        return False
    if found != note:  # the same content at other times: the next look need not read it again
        with contextlib.suppress(OSError):  # of a run of somebody else
            write_note(run_folder, {Path(path): found[path] for path in note})
    return True


def _look_again(files: list[tuple[str, Any]]) -> list[tuple[str, Expectation]]:
    """Those that are as expected, with their present times; ends at the first that is not."""
    alike = []
    for path, expected in files:
        try:
            present = _present(Path(path), expected)
        except (OSError, TypeError, KeyError):  # not there, out of reach, or a damaged note
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
