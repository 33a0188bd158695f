"""Boxes (left, top, right, bottom) and how much they overlap."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def overlaps(box: NDArray[np.floating[Any]], boxes: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Intersection over union of a box (left, top, right, bottom) with boxes `(n, 4)`: `(n,)` in [0,1]."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.clip(sides, 0.0, None).prod(axis=1)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None).prod(axis=1)
    union = areas + float(np.clip(box[2:] - box[:2], 0.0, None).prod()) - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0), dtype=np.float64)
