"""The moving average of the weights, sharded: each rank averages only its own fp32 master partition.

Cost: 4 bytes x trainable parameters / ranks on each rank, and one multiply-add per step (no communication). With
`zero_stage: 0` every rank holds all masters, so the average is as large there: 4 bytes x trainable parameters. With
`ema_decay: 0` the average is the masters themselves and costs nothing.
This module does not know DeepSpeed. It does not average bf16 weights: their rounding would remove an update of 1e-4.
"""

import torch
from torch import Tensor


class ShardedEma:
    """`average <- d * average + (1 - d) * master`, with d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    diffusers lets d rise in the same way: a constant d would keep the initialisation for 1 / (1 - decay) steps.
    """

    def __init__(self, masters: list[Tensor], *, decay: float) -> None:
        """Starts from the weights themselves.

        Args:
            masters: this rank's fp32 master partitions; read, never written.
            decay: in [0, 1); 0 makes the average equal to the weights: then it is the masters themselves.
        """
        self.decay = decay
        self.num_updates = 0
        self.shards = masters if self.is_masters else [master.detach().clone() for master in masters]

    @property
    def is_masters(self) -> bool:
        """Whether the average is the masters themselves, without memory of its own."""
        return self.decay == 0

    @property
    def current_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, masters: list[Tensor]) -> None:
        """Adds the masters of one more optimizer step to the average."""
        if self.is_masters:
            self.shards = masters
        else:
            torch._foreach_lerp_(self.shards, [master.detach() for master in masters], 1.0 - self.current_decay)
        self.num_updates += 1
