"""Notes what a manifest's results were made from and what they are, so that the launcher need not start it again."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamdance.inference.inputs import read_files
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.inference.results import known_states
from dreamdance.inference.stages import Stages
from dreamdance.runs.file_notes import Expectation, forget_note, of_content, write_note
from dreamdance.runs.file_states import read_state
from dreamdance.runs.layout import RESULT_FILE

logger = logging.getLogger(__name__)


def note_work(
    entries: Sequence[ManifestEntry],
    output: Path,
    stages: Stages,
    run_folder: Path,
    before_entry: Callable[[str], None],
) -> None:
    """Notes all files, when every entry has its result.

    Args:
        entries: of all ranks.
        output: the folder of the results.
        stages: the exports that were used.
        run_folder: takes the note.
        before_entry: called with each entry's id.

    Raises:
        UserError: a file that was there for its rank is gone.
    """
    files: dict[Path, Expectation] = {path: of_content(state) for path, state in stages.files.items()}
    for entry in entries:
        before_entry(entry.id)
        folder = output / entry.id
        states = read_files(entry, known_states(folder))
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if result["request"]["inputs"] != {name: state.sha256 for name, state in states.items()}:
            logger.warning("a file of '%s' was replaced after it was read; the same command does it again", entry.id)
            forget_note(run_folder)
            return
        files |= {entry.files[name].absolute(): of_content(state) for name, state in states.items()}
        files |= {folder / name: {"size": size} for name, size in result["sizes"].items()}
        if (described := read_state(folder / RESULT_FILE)) is not None:
            files[folder / RESULT_FILE] = of_content(described)
    write_note(run_folder, files)
