"""What the ranks measured, clip by clip, on the disk: so shares meet, and a job that starts again goes on.

Ranks of a job share nothing but a folder here: one may have much more to do than another, and one may be lost.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dreamdance.crew import Crew
from dreamdance.data.picture_grid import Row
from dreamdance.evaluation.scores import Scores
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.run_layout import RESULT_FILE

INDEX_FILE = "index.json"


@dataclass(frozen=True)
class EvaluatedClip:
    """What became of one clip: scores by row, and its line of the overview."""

    scores: dict[str, Scores]
    row: Row
    num_frames: int


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
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.npz"

    def write(self, result: Path, clip: EvaluatedClip) -> None:
        """Keeps what was measured, whole or not at all."""
        target = self.path(result)
        incoming = target.with_name(f".{target.stem}.{os.getpid()}.npz")
        pictures = {f"picture_{number}": picture for number, picture in enumerate(clip.row.pictures)}
        text = json.dumps({"scores": clip.scores, "num_frames": clip.num_frames, "label": clip.row.label})
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
        return EvaluatedClip(text["scores"], Row(text["label"], pictures), text["num_frames"])

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
