"""Fits a body's surface to the outline of its mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Surface:
    """What each pixel shows: depths `(f, H, W)`, infinite where nothing is; normals `(f, H, W, 3)`."""

    depths: NDArray[np.float32]
    normals: NDArray[np.float32]


def follow_mask(surface: Surface, mask: NDArray[np.bool_], *, focal: float, hips: _Array) -> Surface:
    depths, normals = surface.depths.copy(), surface.normals.copy()
    depths[~mask] = np.inf
    far = depths[np.isfinite(depths)].max() if np.isfinite(depths).any() else hips.max()
    normals[~np.isfinite(depths)] = (0, 0, 1)
    depths[~np.isfinite(depths)] = far
    return Surface(depths, normals)
