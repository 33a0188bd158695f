"""A copy of a rank's tensors in host memory, from which a thread writes files while training continues.

This module knows neither files nor the meaning of the tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """Copies flat fp32 tensors, each time into the same memory.

    The first use of memory takes tens of times as long as the copy itself. Therefore one block for all tensors of the
    rank is kept; it is pinned if they are on a GPU. A copy is valid until the next copy.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocates the memory for a copy of `tensors`, and writes to it once; does not read their values."""
        size = sum(tensor.numel() for tensor in tensors.values())
        if self._block.numel() < size:
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._block = torch.empty(size, pin_memory=on_gpu).zero_()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies of all `tensors` on the CPU, by the same names."""
        self.reserve(tensors)
        copies, offset = {}, 0
        for name, tensor in tensors.items():
            copies[name] = self._block.narrow(0, offset, tensor.numel())
            copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            offset += tensor.numel()
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # waits for the copies from the GPU
        return copies
