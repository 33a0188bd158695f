"""A copy of a rank's state in host memory: taken while training waits, written while training goes on.

Knows nothing of files or of what the state means.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """Copies nested containers of tensors, each time into the same memory.

    Memory that is touched for the first time costs tens of times what the copy itself does, so it is kept: one copy of
    what the rank saves, pinned where it comes from a GPU. A copy is valid until the next is taken.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, state: Any) -> Any:
        """Returns `state` with every tensor, wherever it lies, replaced by a contiguous copy on the CPU."""
        devices: set[torch.device] = set()
        copied = self._copy(state, "", devices)
        for device in devices:  # the copies out of a GPU have only been asked for
            torch.cuda.synchronize(device)
        return copied

    def reserve(self, state: Any) -> None:
        """Takes and touches the memory that a copy of `state` will need; values are not read."""
        for place, tensor in _tensors(state, ""):
            self._target(place, tensor).zero_()

    def _copy(self, value: Any, place: str, devices: set[torch.device]) -> Any:
        if isinstance(value, Tensor):
            target = self._target(place, value)
            target.copy_(value.detach(), non_blocking=value.is_cuda)
            if value.is_cuda:
                devices.add(value.device)
            return target
        if isinstance(value, dict):
            pairs = [(key, self._copy(part, f"{place}/{key}", devices)) for key, part in value.items()]
            return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
        if type(value) in (list, tuple):
            return type(value)(self._copy(part, f"{place}/{index}", devices) for index, part in enumerate(value))
        return copy.deepcopy(value)

    def _target(self, place: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[place] = kept
        return kept


def _tensors(value: Any, place: str) -> list[tuple[str, Tensor]]:
    """All tensors of nested containers with their places, named as `HostMemory` names them."""
    if isinstance(value, Tensor):
        return [(place, value)]
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in _tensors(part, f"{place}/{key}")]
    if type(value) in (list, tuple):
        return [found for index, part in enumerate(value) for found in _tensors(part, f"{place}/{index}")]
    return []
