"""The samples of each optimizer step: a pure function of (seed, step), the same on any number of ranks.

The library's own iteration also has a fixed order, but it ends an epoch silently or hangs on a damaged shard, and it
keeps its position in the shared memory of one node. Here the position is only the number of optimizer steps. So a run
resumes exactly, also in the middle of an epoch and with another world size, and no epoch can be too short.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import gcd
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dreamdance.errors import ShardError
from dreamdance.runtime.sample_random import sample_generator

NUM_CANONICAL_NODES = 12
SHUFFLE_BLOCK_SHARDS = 8


class SampleKey(NamedTuple):
    """A sample of an epoch. With the seed, it is the key of all random numbers about the sample."""

    epoch: int
    sample_id: int


class ClipOrder:
    """The order of training samples.

    In each epoch the shards are permuted, the samples are shuffled within blocks of consecutive shards, and the
    sequence is split into contiguous lanes; a batch takes equally many samples from each lane. The number of lanes is
    gcd(num_canonical_nodes, batch_size) and does not depend on the number of ranks. So a batch has the same samples on
    any number of ranks, and a rank, which takes a contiguous share of every batch, reads few shards at a time. The
    samples that do not fill a batch at the end of an epoch are left out; they differ from epoch to epoch.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        chosen: Sequence[bool] | None = None,
        num_canonical_nodes: int = NUM_CANONICAL_NODES,
        shuffle_block_shards: int = SHUFFLE_BLOCK_SHARDS,
    ) -> None:
        """Checks the sizes.

        Args:
            samples_per_shard: number of samples of each shard (`ShardIndex.samples_per_shard`).
            batch_size: samples per optimizer step, over all ranks.
            seed: the recipe's seed.
            chosen: for each sample whether it is used (`clip_choice`); by default all are.
            num_canonical_nodes: largest number of nodes that read different shards; fixed at the first start of a run.
            shuffle_block_shards: number of shards that are shuffled together, and that a rank has open at a time.

        Raises:
            ShardError: the set has fewer samples than one batch.
        """
        self.samples_per_shard = list(samples_per_shard)
        self.chosen = None if chosen is None or all(chosen) else torch.tensor(chosen)
        self.num_samples = sum(self.samples_per_shard) if self.chosen is None else int(self.chosen.sum())
        self.batch_size = batch_size
        self.seed = seed
        self.num_canonical_nodes = num_canonical_nodes
        self.shuffle_block_shards = shuffle_block_shards
        if self.num_samples < batch_size:
            raise ShardError(
                f"{self.num_samples} training clips are fewer than one batch of {batch_size}; "
                f"prepare more clips or lower `batch_size`{'' if self.chosen is None else ', or relax data.filters'}"
            )
        self.batches_per_epoch = self.num_samples // batch_size
        self.num_lanes = gcd(num_canonical_nodes, batch_size)
        self._epoch: int | None = None
        self._batches = torch.empty(0)

    def position(self, step: int) -> tuple[int, int]:
        """The epoch of an optimizer step (counted from 0), and the number of its batch in the epoch."""
        return divmod(step, self.batches_per_epoch)

    def batch(self, step: int) -> list[SampleKey]:
        """The samples of an optimizer step, over all ranks and micro batches."""
        epoch, batch = self.position(step)
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return [SampleKey(epoch, sample_id) for sample_id in self._batches[batch].tolist()]

    def _shuffle(self, epoch: int) -> Tensor:
        """The epoch's sample ids, `(batches_per_epoch, batch_size)` int64."""
        ids = torch.arange(sum(self.samples_per_shard)).split(self.samples_per_shard)
        if self.chosen is not None:
            ids = tuple(shard[self.chosen[shard]] for shard in ids)
        order = torch.randperm(len(ids), generator=sample_generator((self.seed, epoch, 0), "order of shards")).tolist()
        blocks = []
        for start in range(0, len(order), self.shuffle_block_shards):
            block = torch.cat([ids[shard] for shard in order[start : start + self.shuffle_block_shards]])
            generator = sample_generator((self.seed, epoch, start), "order within a block of shards")
            blocks.append(block[torch.randperm(len(block), generator=generator)])
        kept = torch.cat(blocks)[: self.batches_per_epoch * self.batch_size]
        return rearrange(
            kept,
            "(lanes batches share) -> batches (lanes share)",
            lanes=self.num_lanes,
            batches=self.batches_per_epoch,
        )

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after `step` optimizer steps, and everything that the order depends on (JSON-able)."""
        shards = ",".join(str(samples) for samples in self.samples_per_shard)
        if self.chosen is not None:
            shards += f" of which {self.chosen.nonzero().flatten().tolist()}"
        return {
            "step": step,
            "num_samples": self.num_samples,
            "shards_sha256": sha256(shards.encode()).hexdigest(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "num_canonical_nodes": self.num_canonical_nodes,
            "shuffle_block_shards": self.shuffle_block_shards,
        }

    def resume(self, state: Mapping[str, Any]) -> int:
        """Returns the step of a saved state.

        Raises:
            ShardError: the order differs from the order when the state was saved; the error names the differences.
        """
        own = self.state_dict(0)
        differing = [
            f"{name} was {state.get(name)!r}, is {own[name]!r}"
            for name in own
            if name != "step" and state.get(name) != own[name]
        ]
        if differing:
            raise ShardError(
                f"the order of samples cannot be resumed; the training set or a setting changed: {'; '.join(differing)}"
            )
        return int(state["step"])
