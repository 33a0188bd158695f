"""Opens the annotators that a recipe names, once per process."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
    opened = {name: _open(name, section) for name in sorted(set(names.values()))}
    for task, name in names.items():
        if not isinstance(opened[name], _PROTOCOLS[task]):
            raise MissingInputError(f"`videos.annotators.{task}` is {name}, which makes no {task}")
    cuts = open_cut_detector(section.cuts, weights=section.weights, device=section.device)
    chosen = {task: opened[name] for task, name in names.items()}
    return Networks(**chosen, cuts=cuts, names={**names, "cuts": section.cuts})


def _open(name: str, section: Annotators) -> Any:
    weights, device = Path(section.weights), section.device
    known: dict[str, Callable[[], Any]] = {
        "blazepose": lambda: _class("blazepose", "BlazePose")(weights),
        "body": lambda: _class("body", "Body")(),
        "dwpose": lambda: _class("dwpose", "DWPose")(weights / "dwpose", device=device),
        "david": lambda: _class("david", "David")(weights / "david", device=device),
        "depth_anything": lambda: _class("depth_anything", "DepthAnything")(weights / "depth_anything", device=device),
        "marigold": lambda: _class("marigold", "Marigold")(weights / "marigold", device=device),
    }
    if name in known:
        return known[name]()
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise MissingInputError(
            f"there is no annotator '{name}'; known are {', '.join(known)}, and your own as 'package.module:factory'"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MissingInputError(
            f"annotator '{name}' cannot be loaded: {error}; its name must have the form 'package.module:factory'"
        ) from error
    return factory()


def _class(module: str, name: str) -> Any:
    """The class of an annotator; its module is imported only where a recipe names it, because of its packages."""
    return getattr(importlib.import_module(f"dreamdance.annotators.{module}"), name)
