"""Measurements of single clips as files: ranks combine their work through them, and a restarted job continues.

The ranks share nothing but this folder: one may have much more to do than another, and one may be lost.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dreamdance.data.shards.index import read_index
from dreamdance.evaluation.clips import ResultError
from dreamdance.evaluation.compared_frames import ComparedFrames
from dreamdance.evaluation.network_metrics import Cost, Features
from dreamdance.evaluation.scores import Scores
from dreamdance.evaluation.table import listed
from dreamdance.media.grids import GridRow
from dreamdance.recipe.same_run import result_json
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.runs.file_notes import of_content, of_times, write_note
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import replace_atomically
from dreamdance.runs.layout import ARRAYS_FILE, RESULT_FILE

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class EvaluatedClip:
    """The measurement of one clip.

    Attributes:
        scores: name of the table's row -> scores.
        row: the clip's line in the overview picture.
        compared: which frames were compared, and which was the reference.
        files: absolute path -> state of each file of the result when it was read.
        features: row of the table -> metric -> features of the clip's windows, for distances over all clips.
        costs: metric -> what its network cost.
    """

    scores: dict[str, Scores]
    row: GridRow
    compared: ComparedFrames
    files: dict[Path, FileState] = field(default_factory=dict)
    features: Features = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        return len(self.compared.numbers)


def read_result_states(result: Path, known: Mapping[Path, FileState] = MappingProxyType({})) -> dict[Path, FileState]:
    """Absolute path -> state, of the measured files of a result; files in a known state are not read again."""
    paths = [(result / name).absolute() for name in (RESULT_FILE, ARRAYS_FILE)]
    return {path: state for path in paths if (state := read_state(path, known.get(path))) is not None}


def note_table(
    recipe: EvaluateRecipe, evaluated: Iterable[EvaluatedClip], run_folder: Path, *, watched: Sequence[Path] = ()
) -> None:
    """Records the files that the table was made from, so that the launcher does not start the same work again.

    Args:
        recipe: of this evaluation.
        evaluated: the measured clips.
        run_folder: gets the note.
        watched: folders of weights: where one has changed, a network may be there that was absent.
    """
    files = {path: of_content(state) for clip in evaluated for path, state in clip.files.items()}
    files |= {path: of_times(path) for path in watched}
    for shards in (recipe.truth, recipe.training_set):
        if shards is None or (state := read_state(Path(shards.local) / INDEX_FILE)) is None:
            continue
        files[Path(shards.local) / INDEX_FILE] = of_content(state)
        if shards.remote is None:  # otherwise this folder is a cache, which may be emptied
            stored = (
                Path(shards.local) / shard.stored.name for shard in read_index(Path(shards.local) / INDEX_FILE).shards
            )
            files |= {path: of_times(path) for path in stored if path.is_file()}
    write_note(run_folder, files)


class MeasuredClips:
    """A folder with one file for each measured result.

    The file's name depends on the recipe, the truth and the result's folder alone, so that all ranks look for the same
    file. The file contains the hashes of the result's files.
    """

    def __init__(self, folder: Path, recipe: EvaluateRecipe, *, networks: Sequence[str] = ()) -> None:
        """Reads the indexes of the truth and of the training set.

        Args:
            folder: a folder inside the run folder; `write` creates it, `close` deletes it.
            recipe: the recipe of this evaluation.
            networks: hashes of the weights of its networks.
        """
        self.folder, self._networks = folder, list(networks)
        self._recipe = result_json(recipe)
        truths = [recipe.truth, *([recipe.training_set] if recipe.training_set else [])]
        indexes = [Path(truth.local) / INDEX_FILE for truth in truths]
        self._truth = [index.read_text(encoding="utf-8") if index.is_file() else "" for index in indexes]

    def path(self, result: Path) -> Path:
        """The file of a result's measurement."""
        of_version = [part.name for part in fields(EvaluatedClip)]  # a file of another version is not read
        content = [self._recipe, *self._truth, *self._networks, *of_version, str(result)]
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.npz"

    def holds(self, result: Path) -> bool:
        """Whether a result was measured with the content that its files have now; their time stamps do not matter."""
        if not self.path(result).is_file():
            return False
        with np.load(self.path(result), allow_pickle=False) as stored:
            before = _files(json.loads(str(stored["text"])))
        now = read_result_states(result, before)
        return {path: state.sha256 for path, state in now.items()} == {
            path: state.sha256 for path, state in before.items()
        }

    def write(self, result: Path, clip: EvaluatedClip) -> None:
        """Writes a measurement, complete or not at all."""
        target = self.path(result)
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures = {f"picture_{number}": picture for number, picture in enumerate(clip.row.pictures)}
        files = {str(path): state.to_json() for path, state in clip.files.items()}
        content = {"scores": clip.scores, "compared": astuple(clip.compared), "label": clip.row.label, "files": files}
        features = [(row, key, values) for row, found in clip.features.items() for key, values in found.items()]
        content["features"] = [(row, key) for row, key, _ in features]
        content["costs"] = {key: [cost.seconds, cost.frames] for key, cost in clip.costs.items()}
        text = json.dumps(content)
        with replace_atomically(target) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                text=np.asarray(text),
                **{name: value for name, value in pictures.items() if value is not None},
                **{f"features_{number}": values for number, (_, _, values) in enumerate(features)},
            )

    def read(self, result: Path) -> EvaluatedClip:
        """Reads the measurement of a result."""
        with np.load(self.path(result), allow_pickle=False) as stored:
            text = json.loads(str(stored["text"]))
            num_pictures = len(stored.files) - 1 - len(text["features"])
            pictures = [stored[f"picture_{number}"] for number in range(num_pictures)]
            features: Features = {}
            for number, (row, key) in enumerate(text["features"]):
                features.setdefault(row, {})[key] = stored[f"features_{number}"]
        costs = {key: Cost(*values) for key, values in text["costs"].items()}
        row_of_grid = GridRow(text["label"], pictures)
        numbers, *others = text["compared"]
        compared = ComparedFrames(tuple(numbers), *others)
        return EvaluatedClip(text["scores"], row_of_grid, compared, _files(text), features, costs)

    def check(self, results: Sequence[Path], before_result: Callable[[str], None]) -> None:
        """Checks that no result has changed since it was measured; to be called when all are measured.

        Args:
            results: the folders of all results.
            before_result: called before each result, with its name.

        Raises:
            ResultError: results have changed.
        """
        others = []
        for result in results:
            before_result(result.name)
            if not self.holds(result):
                others.append(result.name)
        if others:
            raise ResultError(
                f"{len(others)} of the {len(results)} results changed while they were measured ({listed(others)}); "
                "run evaluate again when no other program writes to them"
            )

    def close(self) -> None:
        """Deletes the folder; to be called when the table is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _files(text: dict[str, Any]) -> dict[Path, FileState]:
    states = {Path(path): FileState.from_json(state) for path, state in text["files"].items()}
    return {path: state for path, state in states.items() if state is not None}
