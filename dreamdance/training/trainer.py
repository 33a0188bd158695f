"""The training loop. It knows the order of things within a step and between steps, and nothing of how any is done."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dreamdance.data.clip_loader import ClipLoader
from dreamdance.data.collate import ClipBatch
from dreamdance.errors import UserError
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.training.checkpoint import Checkpointer
from dreamdance.training.distributed import gathered, sum_over_ranks
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.metrics import Losses, Metrics, StepReport
from dreamdance.training.objectives.output import NUM_DOMAINS, ObjectiveOutput
from dreamdance.training.preemption import StopRequest
from dreamdance.training.schedule import learning_rate


class Validation(Protocol):
    """What is done with the averaged weights every now and then; all ranks call it."""

    def after_step(self, step: int) -> None: ...


@dataclass
class Trainer:
    """Everything a training run is made of, put together by `run.train`.

    Attributes:
        step: finished optimizer steps.
        nonfinite_steps: how many of them were skipped because a loss or the gradient was not finite.
    """

    recipe: TrainingRecipe
    engine: Engine
    ema: ShardedEma
    loader: ClipLoader
    checkpointer: Checkpointer
    metrics: Metrics
    validation: Validation
    stop: StopRequest
    step: int = 0
    nonfinite_steps: int = 0

    def train(self) -> bool:
        """Trains to `max_steps`, or until all ranks agree to stop early; returns whether it got to the end."""
        steps = iter(self.loader)
        first_step = self.step
        while self.step < self.recipe.max_steps:
            tally = self._take_step(steps)
            if self.step == first_step + 1:
                self.checkpointer.reserve()
            if self.checkpointer.is_saving and not tally.is_writing:
                self._finish_save()
            if tally.is_nonfinite:
                self._count_nonfinite(tally)
            if tally.should_stop:
                self._begin_save()
                self._finish_save()
                return False
            self.validation.after_step(self.step)
            if self.step % self.recipe.checkpoint.every_steps == 0 or self.step == self.recipe.max_steps:
                self._begin_save()
        if self.checkpointer.is_saving:
            self._finish_save()
        return True

    def _take_step(self, steps: Iterator[list[ClipBatch]]) -> "Tally":
        started = time.perf_counter()
        micro_batches = next(steps)
        waited = time.perf_counter() - started
        tally = Tally(should_stop=bool(self.stop), is_writing=self.checkpointer.is_writing)
        for batch in micro_batches:
            output = self.engine.forward(batch)
            self.engine.backward(output.loss)
            tally.add(batch, output)
        rate = learning_rate(self.recipe.optimizer, self.step, max_steps=self.recipe.max_steps)
        update = self.engine.update(rate)
        if update.applied:
            self.ema.update(self.engine.masters)
        self.step += 1
        tally.agree(applied=update.applied)
        seconds = time.perf_counter() - started
        self.metrics.step(StepReport(self.step, tally.losses, rate, update.gradient_norm, seconds, waited))
        return tally

    def _count_nonfinite(self, tally: "Tally") -> None:
        """Reports a skipped step with its samples, and ends the run at one more than the recipe tolerates."""
        self.nonfinite_steps += 1
        found = [sample for samples in gathered(tally.nonfinite_samples) for sample in samples]
        where = "; ".join(found) or "no sample's loss, only the gradient"
        text = f"step {self.step}: not finite, update skipped on all ranks ({self.nonfinite_steps} so far): {where}"
        self.metrics.message(text, step=self.step)
        if self.nonfinite_steps > self.recipe.max_nonfinite_steps:
            raise UserError(
                f"{text}. More than max_nonfinite_steps={self.recipe.max_nonfinite_steps}: look at these samples, "
                "lower optimizer.lr, or tolerate more"
            )

    def _begin_save(self) -> None:
        """Returns as soon as the state is copied; the save before must have come to its end."""
        if self.checkpointer.is_saving:
            self._finish_save()
        self.metrics.flush()  # steps that a checkpoint has passed are not written again
        state = {"nonfinite_steps": self.nonfinite_steps, "loader": self.loader.state_dict()}
        self.checkpointer.begin(self.step, state)

    def _finish_save(self) -> None:
        saved = self.checkpointer.finish()
        self.metrics.saved(saved.step, seconds=saved.seconds, waited_seconds=saved.waited_seconds)


class Tally:
    """What one step adds up: over micro batches, then over ranks in a single exchange.

    Attributes:
        should_stop: whether this rank, and after `agree` any rank, was asked to stop.
        is_writing: whether this rank, and after `agree` any rank, is still writing a checkpoint.
        is_nonfinite: whether the step was skipped; true after `agree` on all ranks or on none.
        nonfinite_samples: this rank's samples whose loss is not finite, in words.
        losses: after `agree`, over all ranks.
    """

    losses: Losses

    def __init__(self, *, should_stop: bool, is_writing: bool = False) -> None:
        self.should_stop, self.is_writing = should_stop, is_writing
        self.is_nonfinite = False
        self.nonfinite_samples: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, batch: ClipBatch, output: ObjectiveOutput) -> None:
        """Adds a micro batch, and remembers the samples whose loss is not finite."""
        losses = output.sample_losses
        parts = (losses.sum().reshape(1), losses.new_tensor([len(losses)]), output.domain_sums, output.domain_counts)
        self._sums.append(torch.cat([part.to(torch.float64) for part in parts]))
        if not math.isfinite(output.loss.item()):
            self.nonfinite_samples += name_nonfinite(batch, losses.tolist())

    def agree(self, *, applied: bool) -> None:
        """Sums over all ranks: losses, and whether any rank wants to stop or met a number that is not finite."""
        sums = torch.stack(self._sums).sum(dim=0)
        flags = sums.new_tensor([self.should_stop, self.is_writing, bool(self.nonfinite_samples) or not applied])
        loss_sum, num_samples, *domains, stop, writing, nonfinite = sum_over_ranks(torch.cat([sums, flags])).tolist()
        self.losses = Losses(loss_sum, num_samples, domains[:NUM_DOMAINS], domains[NUM_DOMAINS:])
        self.should_stop, self.is_writing, self.is_nonfinite = stop > 0, writing > 0, nonfinite > 0


def name_nonfinite(batch: ClipBatch, losses: Sequence[float]) -> list[str]:
    """Which samples of a batch have a loss that is not finite: `sample 12 of epoch 0 (clip dancer_3): nan`."""
    named = zip(losses, batch.keys.tolist(), batch.clip_ids, strict=True)
    return [
        f"sample {sample_id} of epoch {epoch} (clip {clip_id}): {loss}"
        for loss, (_, epoch, sample_id), clip_id in named
        if not math.isfinite(loss)
    ]
