"""Which process of how many this is, from the environment. Opens no process group, loads no torch."""

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreamdance.errors import LostDeviceError

if TYPE_CHECKING:
    import torch

START = "DREAMDANCE_START"
# In the name of a start, between the name of its job and its number.
RESTART = " restart "


@dataclass(frozen=True)
class Ranks:
    """This process among all, and among those of its node.

    Attributes:
        start: names this start of this job, so that ranks meet only ranks of the same start.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    start: str = ""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Reads RANK, WORLD_SIZE and LOCAL_RANK; where they are unset, this is the only process."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            start=os.environ.get(START, ""),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def job(self) -> str:
        """Names the job, of which only one start can be at work at a time."""
        return self.start.partition(RESTART)[0]

    @property
    def device(self) -> "torch.device":
        """The local rank's GPU, or the CPU where there is none."""
        import torch  # a caller that wants a device has loaded torch already; the launcher has not

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def take_gpu(self) -> None:
        """Makes the local rank's GPU the current device of this process, in place of GPU 0.

        Raises:
            LostDeviceError: torch finds no GPU for this rank; the rank must not silently compute on the CPU.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.local_rank >= count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
            advice = "check the node's driver, or use CPUs with cluster.gpus_per_node=0"
            if count:
                advice = "every task must see all GPUs of its node: remove options such as --gpus-per-task, --gpu-bind"
            raise LostDeviceError(
                f"rank {self.rank} on {socket.gethostname()} needs GPU {self.local_rank}, but torch finds {count} "
                f"(CUDA_VISIBLE_DEVICES '{visible}'): {advice}"
            )
        torch.cuda.set_device(self.local_rank)
