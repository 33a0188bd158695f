"""The commands of tools/ as modules: they belong to no package, so tests load them from their files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(name: str, *, folder: Path = TOOLS) -> ModuleType:
    """Loads `folder`/<name>.py once more, and not as the command that it is.

    The module takes the place of an earlier one of this name in `sys.modules`, where its dataclasses look it up.
    """
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
