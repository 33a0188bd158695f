"""A copy of a rank's tensors in host memory: taken while training waits, written while training goes on.

Knows nothing of files or of what the tensors mean.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostMemory:
    """Copies flat fp32 tensors, each time into the same memory.

    The first use of memory costs tens of times what the copy itself does, so it is kept: one block for all that the
    rank saves, pinned where it comes from a GPU. A copy is valid until the next is taken.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes and touches the memory that a copy of `tensors` will need; values are not read."""
        size = sum(tensor.numel() for tensor in tensors.values())
        if self._block.numel() < size:
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._block = torch.empty(size, pin_memory=on_gpu).zero_()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns `tensors` with each, wherever it lies, replaced by a copy on the CPU."""
        self.reserve(tensors)
        copies, offset = {}, 0
        for name, tensor in tensors.items():
            copies[name] = self._block.narrow(0, offset, tensor.numel())
            copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            offset += tensor.numel()
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # the copies out of a GPU have only been asked for
        return copies
