"""Counts the memory of tensors while they live: every storage that operators allocate, until Python frees it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate and that Python frees.

    Attributes:
        current: bytes allocated now.
        peak: largest value of `current` so far.
    """

    def __init__(self, *, beside: Iterable[Tensor] = ()) -> None:
        """Begins at zero.

        Args:
            beside: tensors that are not counted, such as weights. A view of one, such as a transposed weight, is the
                result of an operation too, but shares its storage.
        """
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in beside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question to a fake tensor, such as its device
            return result
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.current -= size
