"""Which process of how many this is, as the launcher's environment says. Opens no process group, loads no torch."""

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreamdance.errors import LostDeviceError

if TYPE_CHECKING:
    import torch

START = "DREAMDANCE_START"


@dataclass(frozen=True)
class Ranks:
    """This process among all, and among those of its node.

    Attributes:
        start: tells this start of this job from any other, so that ranks find only their own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    start: str = ""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Reads RANK, WORLD_SIZE and their like, as the job has set them; one process where they are unset."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            start=os.environ.get(START, ""),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> "torch.device":
        """The local rank's GPU, or the CPU where there is none."""
        import torch  # whoever wants a device has it loaded; the launcher has not

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def take_gpu(self) -> None:
        """Makes the local rank's GPU this process's own: whatever asks for "the current device" gets it, not GPU 0.

        Refuses to compute on the CPU in silence what was meant for a GPU.

        Raises:
            LostDeviceError: this rank has none.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.local_rank >= count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
            advice = "look at the node's driver, or use CPUs by cluster.gpus_per_node=0"
            if count:
                advice = "every task must see all GPUs of its node: take --gpus-per-task, --gpu-bind and their like out"
            raise LostDeviceError(
                f"rank {self.rank} on {socket.gethostname()} wants GPU {self.local_rank} and torch finds {count} "
                f"(CUDA_VISIBLE_DEVICES '{visible}'): {advice}"
            )
        torch.cuda.set_device(self.local_rank)
