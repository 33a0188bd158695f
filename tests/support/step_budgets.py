"""The tool `tools/step_budgets.py` as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    file = Path(__file__).parents[2] / "tools" / "step_budgets.py"
    spec = importlib.util.spec_from_file_location("step_budgets", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


budgets = _load()
