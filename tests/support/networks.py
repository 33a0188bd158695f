"""The folder of fetched weights, for tests that run real networks."""

import importlib.util
import os
from pathlib import Path

import pytest

from dreamdance.annotators.blazepose import FILES

REQUIRED = "DREAMDANCE_NETWORKS_REQUIRED"
FOLDER = Path(os.environ.get("DREAMDANCE_NETWORKS", Path(__file__).parents[2] / "weights" / "networks"))


def require_weights(*files: str) -> Path:
    """Returns the folder; skips the test if a file is missing there; if the networks are required, the test fails."""
    missing = [name for name in files if not (FOLDER / name).is_file()]
    if missing:
        reason = f"no {', '.join(missing)} in {FOLDER} (tools/networks.sh fetches them)"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return FOLDER


def require_blazepose() -> Path:
    """The same for the weights and the runtime of blazepose."""
    folder = require_weights(*(file.file for file in FILES))
    if importlib.util.find_spec("ai_edge_litert") is None:
        reason = "no ai-edge-litert here (tools/networks.sh installs it)"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
