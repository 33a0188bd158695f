"""Memory through which a process hands micro batches to another one. Knows nothing of who they are."""

import math
import mmap
import os
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch

_ALIGNMENT = 64  # bytes; of each tensor's start


@dataclass(frozen=True)
class _Part:
    """Where a tensor of a batch lies, in bytes from the beginning of all slots."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """A batch in shared memory: small, and nothing but plain values, which travel by themselves."""

    parts: dict[str, _Part]
    clip_ids: list[str]


class SharedSlots:
    """Memory with room for a number of batches of one size, shared with the process that it is given to at its start.

    It has no name, so that nothing of it is left when the processes are gone, however they went; and it is none of
    `/dev/shm`, which is small in many containers. Whoever reads from it needs no help of the one who wrote.
    """

    def __init__(self, count: int) -> None:
        """Takes no memory yet: the first batch that is written says how large a slot is."""
        self.count = count
        self._descriptor = os.memfd_create("dreamdance_batches")
        self._memory: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process; only while that is being started."""
        return {"count": self.count, "descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.count, self._descriptor, self._memory = state["count"], state["descriptor"].detach(), None

    def write(self, batch: ClipBatch, *, slot: int) -> PackedBatch:
        """Copies a batch into a slot, over what was there; it may not be larger than the first one."""
        tensors = batch.tensors
        aligned = [math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        if self._memory is None:
            os.ftruncate(self._descriptor, self.count * sum(aligned))
        memory = self._mapped()
        slot_bytes = len(memory) // self.count
        assert sum(aligned) <= slot_bytes, "micro batches differ in size"
        parts, offset = {}, slot * slot_bytes
        for (name, tensor), num_bytes in zip(tensors.items(), aligned, strict=True):
            # The order of the dimensions in memory stays: sums over them are rounded differently in another order.
            stride = torch.empty_like(tensor, device="meta").stride()
            parts[name] = _Part(offset, tensor.dtype, tuple(tensor.shape), stride)
            _view(memory, parts[name]).copy_(tensor)
            offset += num_bytes
        return PackedBatch(parts, batch.clip_ids)

    def read(self, packed: PackedBatch, *, pin: bool) -> ClipBatch:
        """A copy of a written batch, in page-locked memory if `pin`; its slot can be written again."""
        views = {name: _view(self._mapped(), part) for name, part in packed.parts.items()}
        copies = {name: view.pin_memory() if pin else view.clone() for name, view in views.items()}
        return ClipBatch.from_tensors(copies, packed.clip_ids)

    def close(self) -> None:
        """Gives the memory back once the other process has, too."""
        os.close(self._descriptor)
        self._memory = None

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._memory


def _view(memory: mmap.mmap, part: _Part) -> Tensor:
    """The tensor itself, not a copy."""
    flat = torch.frombuffer(memory, dtype=part.dtype, count=math.prod(part.shape), offset=part.offset)
    return flat.as_strided(part.shape, part.stride)
