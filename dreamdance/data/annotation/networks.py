"""Opens the annotators that a recipe names, once per process."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from dreamdance.annotators.opening import open_annotator
from dreamdance.annotators.protocols import DepthAnnotator, MaskAnnotator, NormalAnnotator, PoseAnnotator
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
    """The annotators of a recipe."""

    pose: PoseAnnotator
    mask: MaskAnnotator
    depth: DepthAnnotator
    normal: NormalAnnotator
    cuts: CutDetector
    names: dict[str, str]

    def identity(self, task: str) -> dict[str, Any]:
        """Name and weights of the annotator of a map (or of `cuts`), for keys of side files and for metadata."""
        annotator: PoseAnnotator | MaskAnnotator | DepthAnnotator | NormalAnnotator | CutDetector = getattr(self, task)
        files = {file.file: {"sha256": file.sha256, "licence": file.licence} for file in annotator.networks}
        return {"name": self.names[task], "files": files}


@cache
def open_networks(section: Annotators) -> Networks:
    """Opens all annotators; those of one name are one object.

    Raises:
        MissingInputError: a name is unknown, a file of weights is missing or damaged, or a package is not installed.
    """
    names = {task: str(getattr(section, task)) for task in _PROTOCOLS}
    opened = {
        name: open_annotator(name, weights=section.weights, device=section.device)
        for name in sorted(set(names.values()))
    }
    for task, name in names.items():
        if not isinstance(opened[name], _PROTOCOLS[task]):
            raise MissingInputError(f"`videos.annotators.{task}` is {name}, which makes no {task}")
    cuts = open_cut_detector(section.cuts, weights=section.weights, device=section.device)
    chosen = {task: opened[name] for task, name in names.items()}
    return Networks(**chosen, cuts=cuts, names={**names, "cuts": section.cuts})
