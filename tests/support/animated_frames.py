"""The frames that `animate` stored."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def frames(output: Path) -> dict[str, NDArray[Any]]:
    """By entry, `(f, H, W, 3)`; hidden folders are ignored."""
    found = {}
    for path in sorted(output.glob("[!.]*/arrays.npz")):
        with np.load(path, allow_pickle=False) as stored:
            found[path.parent.name] = stored["frames"]
    return found
