"""Sums of one optimizer step: over its micro batches, then over all ranks in a single exchange."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.runtime.process_group import sum_over_ranks
from dreamdance.training.metrics import Losses
from dreamdance.training.objectives.output import ObjectiveOutput
from dreamdance.training.stragglers import RankSeconds


class RankReport(NamedTuple):
    """A rank's report of a step, beside its losses. In the sum over ranks a flag counts the ranks that set it.

    Attributes:
        should_stop: whether the rank was asked to stop.
        is_writing: whether the rank is still writing a checkpoint.
        is_skipped: whether the rank did not apply the update, or has a sample whose loss is not finite.
        data_seconds: by rank, how long the rank waited for its data; zero for all other ranks.
        forward_seconds: by rank, how long the rank was in the forward pass; zero for all other ranks.
    """

    should_stop: float
    is_writing: float
    is_skipped: float
    data_seconds: Sequence[float]
    forward_seconds: Sequence[float]

    def pack(self) -> list[float]:
        """All numbers in one list."""
        return [self.should_stop, self.is_writing, self.is_skipped, *self.data_seconds, *self.forward_seconds]

    @classmethod
    def unpack(cls, values: Sequence[float]) -> "RankReport":
        """The inverse of `pack`; the length of `values` gives the number of ranks."""
        should_stop, is_writing, is_skipped, *seconds = values
        world_size = len(seconds) // 2
        return cls(should_stop, is_writing, is_skipped, seconds[:world_size], seconds[world_size:])


class StepTotals:
    """The sums of one step.

    Attributes:
        is_spike: whether the step's update was dropped because of its loss; the same on all ranks.
        losses: after `reduce`, the losses of all ranks.
        is_skipped: after `reduce`, whether the update was dropped for any reason, on all ranks.
        should_stop: after `reduce`, whether any rank was asked to stop.
        is_writing: after `reduce`, whether any rank is still writing a checkpoint.
        rank_seconds: after `reduce`, the times of all ranks.
    """

    losses: Losses
    rank_seconds: RankSeconds

    def __init__(self) -> None:
        self.is_spike = self.is_skipped = self.should_stop = self.is_writing = False
        self._sums: list[Tensor] = []
        self._added: list[tuple[ClipBatch, Tensor]] = []

    def add(self, batch: ClipBatch, output: ObjectiveOutput) -> None:
        """Adds a micro batch. It reads no number from a GPU, so the next forward pass need not wait for this one."""
        losses = output.sample_losses.detach()
        # what names the samples, without their pictures, whose memory on the GPU the next micro batch needs
        named = replace(batch, maps={}, reference=torch.empty(0), regions=torch.empty(0))
        self._added.append((named, losses))
        self._sums.append(output.sums())

    @property
    def nonfinite_samples(self) -> list[str]:
        """Descriptions of this rank's samples whose loss is not finite."""
        return [name for batch, losses in self._added for name in name_nonfinite(batch, losses.tolist())]

    def worst_sample(self) -> tuple[float, str]:
        """This rank's largest loss, and a description of its sample."""
        named = [
            pair for batch, losses in self._added for pair in zip(losses.tolist(), name_samples(batch), strict=True)
        ]
        loss, name = max(named)
        return loss, f"{name}: {loss:.4g}"

    def loss_with(self, output: ObjectiveOutput) -> float:
        """The mean loss of the added micro batches and of `output`, over all ranks. Collective."""
        losses = output.sample_losses.detach().to(torch.float64)
        sums = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        total, count = map(float, sum_over_ranks(sum((part[:2] for part in self._sums), sums)).tolist())
        return total / count

    def reduce(
        self,
        *,
        applied: bool,
        should_stop: bool = False,
        is_writing: bool = False,
        data_seconds: float = 0.0,
        forward_seconds: float = 0.0,
    ) -> None:
        """Sums over all ranks. Collective.

        Args:
            applied: whether this rank applied the update.
            should_stop: whether this rank was asked to stop.
            is_writing: whether this rank is writing a checkpoint.
            data_seconds: how long this rank waited for its data.
            forward_seconds: how long this rank was in the forward pass.
        """
        rank, others_after = dist.get_rank(), dist.get_world_size() - dist.get_rank() - 1
        mine = RankReport(
            should_stop=float(should_stop),
            is_writing=float(is_writing),
            is_skipped=float(bool(self.nonfinite_samples) or not applied),
            data_seconds=[0.0] * rank + [data_seconds] + [0.0] * others_after,
            forward_seconds=[0.0] * rank + [forward_seconds] + [0.0] * others_after,
        )
        sums = torch.stack(self._sums).sum(dim=0)
        # One copy to the device and one back: the step waits for each copy.
        values = sum_over_ranks(torch.cat([sums, sums.new_tensor(mine.pack())])).tolist()
        self.losses, all_ranks = Losses.unpack(values[: len(sums)]), RankReport.unpack(values[len(sums) :])
        self.should_stop, self.is_writing = all_ranks.should_stop > 0, all_ranks.is_writing > 0
        self.is_skipped = all_ranks.is_skipped > 0
        self.rank_seconds = RankSeconds(all_ranks.data_seconds, all_ranks.forward_seconds)


def name_nonfinite(batch: ClipBatch, losses: Sequence[float]) -> list[str]:
    """Describes the samples of a batch whose loss is not finite: `sample 12 of epoch 0 (clip dancer_3): nan`."""
    named = zip(losses, name_samples(batch), strict=True)
    return [f"{name}: {loss}" for loss, name in named if not math.isfinite(loss)]


def name_samples(batch: ClipBatch) -> list[str]:
    """Describes each sample of a batch: `sample 12 of epoch 0 (clip dancer_3)`."""
    keys = zip(batch.keys.tolist(), batch.clip_ids, strict=True)
    return [f"sample {sample_id} of epoch {epoch} (clip {clip_id})" for (_, epoch, sample_id), clip_id in keys]
