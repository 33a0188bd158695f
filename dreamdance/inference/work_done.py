"""Records the inputs and the results of a manifest, so that the launcher need not start a finished run again."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from dreamdance.inference.entry_inputs import read_files
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
    """Writes the note with all input and result files; every entry must have its result.

    Args:
        entries: all entries of the manifest.
        output: the folder of the results.
        stages: the exports that were used.
        run_folder: the folder that gets the note.
        before_entry: called with the id of each entry.

    Raises:
        UserError: an input file does not exist any more.
    """
    files: dict[Path, Expectation] = {path: of_content(state) for path, state in stages.files.items()}
    for entry in entries:
        before_entry(entry.id)
        folder = output / entry.id
        states = read_files(entry, known_states(folder))
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        if result["request"]["inputs"] != {name: state.sha256 for name, state in states.items()}:
            logger.warning("a file of '%s' was replaced after it was read; run the same command again", entry.id)
            forget_note(run_folder)
            return
        files |= {entry.files[name].absolute(): of_content(state) for name, state in states.items()}
        files |= {folder / name: {"size": size} for name, size in result["sizes"].items()}
        if (described := read_state(folder / RESULT_FILE)) is not None:
            files[folder / RESULT_FILE] = of_content(described)
    write_note(run_folder, files)
