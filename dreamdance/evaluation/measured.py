"""What the ranks measured, clip by clip, on the disk: so shares meet, and a job that starts again goes on.

Ranks of a job share nothing but a folder here: one may have much more to do than another, and one may be lost.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dreamdance.crew import Crew
from dreamdance.data.picture_grid import Row
from dreamdance.data.shard_index import read_index
from dreamdance.evaluation.scores import Scores
from dreamdance.file_notes import of_content, of_times, write_note
from dreamdance.file_states import FileState, read_state
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.run_layout import ARRAYS_FILE, RESULT_FILE

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class EvaluatedClip:
    """What became of one clip.

    Attributes:
        scores: by row.
        row: its line of the overview.
        num_frames: that were compared.
        files: of the result, as they were read, by absolute path.
    """

    scores: dict[str, Scores]
    row: Row
    num_frames: int
    files: dict[Path, FileState] = field(default_factory=dict)


def read_files(result: Path) -> dict[Path, FileState]:
    """The states of the files of a result that are measured, by absolute path."""
    paths = [(result / name).absolute() for name in (RESULT_FILE, ARRAYS_FILE)]
    return {path: state for path in paths if (state := read_state(path)) is not None}


def note_work(recipe: EvaluateRecipe, evaluated: Iterable[EvaluatedClip], run_folder: Path) -> None:
    """Notes what the table was made from, so that the launcher need not start it again."""
    files = {path: of_content(state) for clip in evaluated for path, state in clip.files.items()}
    for shards in (recipe.truth, recipe.training_set):
        if shards is None or (state := read_state(Path(shards.local) / INDEX_FILE)) is None:
            continue
        files[Path(shards.local) / INDEX_FILE] = of_content(state)
        if shards.remote is None:  # else this folder is a cache, which may be emptied
            stored = (
                Path(shards.local) / shard.stored.name for shard in read_index(Path(shards.local) / INDEX_FILE).shards
            )
            files |= {path: of_times(path) for path in stored if path.is_file()}
    write_note(run_folder, files)


class MeasuredClips:
    """A folder with a file for each clip that was measured, by the same recipe from the same inputs."""

    def __init__(self, folder: Path, recipe: EvaluateRecipe) -> None:
        """Makes the folder.

        Args:
            folder: of the run; deleted by `close`.
            recipe: what is measured.
        """
        self.folder = folder
        self._recipe = recipe.model_dump_json(exclude={"cluster", "logging"})
        truths = [recipe.truth, *([recipe.training_set] if recipe.training_set else [])]
        indexes = [Path(truth.local) / INDEX_FILE for truth in truths]
        self._truth = [index.read_text(encoding="utf-8") if index.is_file() else "" for index in indexes]
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, result: Path) -> Path:
        """Where a result's measurement lies: other inputs have another name, so an old one is not taken for it."""
        content = [self._recipe, *self._truth, result.name, (result / RESULT_FILE).read_text(encoding="utf-8")]
        content += map(str, of_times(result / ARRAYS_FILE).values()) if (result / ARRAYS_FILE).is_file() else []
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.npz"

    def write(self, result: Path, clip: EvaluatedClip) -> None:
        """Keeps what was measured, whole or not at all."""
        target = self.path(result)
        incoming = target.with_name(f".{target.stem}.{os.getpid()}.npz")
        pictures = {f"picture_{number}": picture for number, picture in enumerate(clip.row.pictures)}
        files = {str(path): state.to_json() for path, state in clip.files.items()}
        content = {"scores": clip.scores, "num_frames": clip.num_frames, "label": clip.row.label, "files": files}
        text = json.dumps(content)
        with incoming.open("wb") as file:
            np.savez(
                file, text=np.asarray(text), **{name: value for name, value in pictures.items() if value is not None}
            )
        os.replace(incoming, target)

    def read(self, result: Path) -> EvaluatedClip:
        """What was measured."""
        with np.load(self.path(result), allow_pickle=False) as stored:
            text = json.loads(str(stored["text"]))
            pictures = [stored[f"picture_{number}"] for number in range(len(stored.files) - 1)]
        states = {Path(path): FileState.from_json(state) for path, state in text["files"].items()}
        files = {path: state for path, state in states.items() if state is not None}
        return EvaluatedClip(text["scores"], Row(text["label"], pictures), text["num_frames"], files)

    def wait_for(self, results: Sequence[Path], crew: Crew, report: Callable[[int], None]) -> None:
        """Until all are measured, by whichever rank.

        Args:
            results: their folders.
            crew: the ranks that measure.
            report: called with the number of those that are, whenever it has changed.

        Raises:
            LostWorkerError: a rank is lost.
        """
        paths = [self.path(result) for result in results]
        before = -1
        while (done := sum(path.is_file() for path in paths)) < len(paths):
            if done != before:
                report(done)
            before = done
            crew.pause(f"other ranks have yet to measure {len(paths) - done} clips")

    def close(self) -> None:
        """Deletes everything, now that the table is written."""
        shutil.rmtree(self.folder)
