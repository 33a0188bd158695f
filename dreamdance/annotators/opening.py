"""Opens an annotator by its name; its module is imported only then, because of its packages."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamdance.errors import MissingInputError


def open_annotator(name: str, *, weights: Path | str, device: str = "cpu", num_threads: int | None = None) -> Any:
    """Opens an annotator.

    Args:
        name: one of this project's annotators, or `package.module:factory` of the user's own.
        weights: folder of the networks' weights, with one folder for each network.
        device: `cpu` or `cuda`; blazepose and body always run on the CPU.
        num_threads: threads of each ONNX network on a CPU; None lets onnxruntime take all cores.

    Raises:
        MissingInputError: the name is unknown, a file of weights is missing or damaged, or a package is not installed.
    """
    folder = Path(weights)
    onnx: dict[str, Any] = {"device": device, "num_threads": num_threads}
    known: dict[str, Callable[[], Any]] = {
        "blazepose": lambda: _class("blazepose", "BlazePose")(folder),
        "body": lambda: _class("body", "Body")(),
        "dwpose": lambda: _class("dwpose", "DWPose")(folder / "dwpose", **onnx),
        "david": lambda: _class("david", "David")(folder / "david", **onnx),
        "depth_anything": lambda: _class("depth_anything", "DepthAnything")(folder / "depth_anything", device=device),
        "marigold": lambda: _class("marigold", "Marigold")(folder / "marigold", device=device),
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
    return getattr(importlib.import_module(f"dreamdance.annotators.{module}"), name)
