"""Opens the annotators that a recipe names, once per process."""

import hashlib
import multiprocessing
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dreamdance.annotators.axes import AxesCheck
from dreamdance.annotators.opening import open_annotator
from dreamdance.annotators.protocols import DepthAnnotator, MaskAnnotator, NormalAnnotator, PoseAnnotator
from dreamdance.annotators.weights import NetworkFile
from dreamdance.data.curation.shots import CutDetector, open_cut_detector
from dreamdance.errors import MissingInputError
from dreamdance.recipe.annotator_section import Annotators

# What an annotator must be to serve for a map.
_PROTOCOLS: dict[str, type] = {
    "pose": PoseAnnotator,
    "mask": MaskAnnotator,
    "depth": DepthAnnotator,
    "normal": NormalAnnotator,
}


@dataclass(frozen=True)
class Networks:
    """The annotators of a recipe, and the comparison of normals with depth, which goes over the first clips alone."""

    pose: PoseAnnotator
    mask: MaskAnnotator
    depth: DepthAnnotator
    normal: NormalAnnotator
    cuts: CutDetector
    names: dict[str, str]
    axes_checks: dict[tuple[str, str], AxesCheck] = field(default_factory=dict)

    def identity(self, task: str) -> dict[str, Any]:
        """Name and hashes of the annotator of a map (or of `cuts`), for keys: all that decides what it finds."""
        found = {"name": self.names[task], "files": {file.file: file.sha256 for file in self._files(task)}}
        module = self.names[task].partition(":")[0]
        if module in sys.modules and ":" in self.names[task]:
            source = Path(str(sys.modules[module].__file__)).read_bytes()
            found["source"] = hashlib.sha256(source).hexdigest()
        return found

    def licences(self, task: str) -> dict[str, str]:
        """The licence of each file of weights, for metadata."""
        return {file.file: file.licence for file in self._files(task)}

    def uses(self, task: str, given: str) -> bool:
        """Whether the annotator of a map reads `poses` or `mask`."""
        used = getattr(getattr(self, task), "uses", {}).get(task, ("poses", "mask"))
        return given in used or (given == "poses" and "landmarks" in used)

    def _files(self, task: str) -> tuple[NetworkFile, ...]:
        annotator: PoseAnnotator | MaskAnnotator | DepthAnnotator | NormalAnnotator | CutDetector = getattr(self, task)
        return annotator.networks


@cache
def open_networks(section: Annotators) -> Networks:
    """Opens all annotators; those of one name are one object.

    Raises:
        MissingInputError: a name is unknown, a file of weights is missing or damaged, a package is not installed, or
            annotators do not go together.
    """
    names = {task: str(getattr(section, task)) for task in _PROTOCOLS}
    opened: dict[str, Any] = {}
    for task, name in names.items():
        if name not in opened:
            try:
                opened[name] = open_annotator(
                    name, weights=section.weights, device=section.device, num_threads=_num_threads()
                )
            except MissingInputError as error:
                raise MissingInputError(f"`videos.annotators.{task}`: {error}") from error
        if not isinstance(opened[name], _PROTOCOLS[task]):
            raise MissingInputError(f"`videos.annotators.{task}` is {name}, which makes no {task}")
        needed = getattr(opened[name], "uses", {}).get(task, ())
        if "landmarks" in needed and not getattr(opened[names["pose"]], "finds_landmarks", True):
            raise MissingInputError(
                f"`videos.annotators.{task}` is {name}, which needs points in space, but `videos.annotators.pose` is "
                f"{names['pose']}, which finds none; set pose to blazepose, or {task} to another annotator"
            )
    cuts = open_cut_detector(section.cuts, weights=section.weights, device=section.device)
    chosen = {task: opened[name] for task, name in names.items()}
    return Networks(**chosen, cuts=cuts, names={**names, "cuts": section.cuts})


def _num_threads() -> int | None:
    """One thread per network in each of `num_workers` processes; all cores if this process does the work itself."""
    return None if multiprocessing.parent_process() is None else 1
