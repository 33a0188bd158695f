"""Shared memory for passing micro batches between two processes."""

import math
import mmap
import os
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch

_ALIGNMENT = 64  # bytes; each tensor begins at a multiple of it


@dataclass(frozen=True)
class _TensorPlace:
    """The place of a tensor of a batch; the offset is in bytes from the beginning of all slots."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """The description of a batch in shared memory: a few plain values that are sent through a pipe."""

    places: dict[str, _TensorPlace]
    clip_ids: list[str]


class SharedSlots:
    """Memory for a number of batches of one size; a process shares it by receiving this object at its start.

    The memory has no name, so nothing remains when the processes end, even if they are killed. It does not use
    `/dev/shm`, which is small in many containers. Reading needs no cooperation of the process that wrote.
    """

    def __init__(self, count: int) -> None:
        """Allocates no memory yet: the first batch that is written determines the size of a slot."""
        self.count = count
        self._descriptor = os.memfd_create("dreamdance_batches")
        self._memory: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process; works only while that process is being started."""
        return {"count": self.count, "descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.count, self._descriptor, self._memory = state["count"], state["descriptor"].detach(), None

    def write(self, batch: ClipBatch, *, slot: int) -> PackedBatch:
        """Copies a batch into a slot and overwrites its content; all batches have pictures of the same shapes.

        A slot has room for all pictures as float32 in 3 channels, as some batches have them (`collate_clips`); what is
        not written takes no memory.
        """
        tensors = batch.tensors
        aligned = [_align(tensor.nbytes) for tensor in tensors.values()]
        if self._memory is None:
            os.ftruncate(self._descriptor, self.count * sum(map(_most_bytes, tensors.values())))
        memory = self._mapped()
        slot_bytes = len(memory) // self.count
        assert sum(aligned) <= slot_bytes, "micro batches differ in size"
        places, offset = {}, slot * slot_bytes
        for (name, tensor), num_bytes in zip(tensors.items(), aligned, strict=True):
            # Keeps the order of the dimensions in memory: another order would change the rounding of sums.
            stride = torch.empty_like(tensor, device="meta").stride()
            places[name] = _TensorPlace(offset, tensor.dtype, tuple(tensor.shape), stride)
            _view(memory, places[name]).copy_(tensor)
            offset += num_bytes
        return PackedBatch(places, batch.clip_ids)

    def read(self, packed: PackedBatch, *, pin: bool) -> ClipBatch:
        """Copies a written batch, into page-locked memory if `pin`; its slot can be written again afterwards."""
        views = {name: _view(self._mapped(), place) for name, place in packed.places.items()}
        copies = {name: view.pin_memory() if pin else view.clone() for name, view in views.items()}
        return ClipBatch.from_tensors(copies, packed.clip_ids)

    def close(self) -> None:
        """Releases the memory; it is freed when the other process has released it too."""
        os.close(self._descriptor)
        self._memory = None

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._memory


def _most_bytes(tensor: Tensor) -> int:
    """The largest size of this tensor in any batch."""
    values = tensor.numel()
    if tensor.ndim > 3:  # pictures, or latents, which have 4 channels
        values = values // tensor.shape[-3] * max(tensor.shape[-3], 3)
    return _align(values * max(tensor.itemsize, 4))


def _align(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _view(memory: mmap.mmap, place: _TensorPlace) -> Tensor:
    """The tensor at a place, not a copy."""
    flat = torch.frombuffer(memory, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset)
    return flat.as_strided(place.shape, place.stride)
