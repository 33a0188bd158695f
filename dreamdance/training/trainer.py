"""The training loop. It knows the order of things within a step and between steps, and nothing of how any is done."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.errors import UserError
from dreamdance.modalities import DOMAINS
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.process_group import gathered, sum_over_ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.checkpointing.checkpointer import Checkpointer
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.guard import StepGuard
from dreamdance.training.metrics import Losses, Metrics, StepReport
from dreamdance.training.objectives.output import ObjectiveOutput
from dreamdance.training.schedule import learning_rate
from dreamdance.training.stragglers import OwnSeconds, Stopwatch


class Validation(Protocol):
    """What is done with the averaged weights every now and then; all ranks call it.

    Whether it got through: it breaks off where any rank is asked to stop.
    """

    def after_step(self, step: int) -> bool: ...


@dataclass
class Trainer:
    """Everything a training run is made of, put together by `run.train`.

    Attributes:
        step: finished optimizer steps.
        owes_validation: whether the run was stopped after its last step and before that step's validation was through.
    """

    recipe: TrainingRecipe
    engine: Engine
    ema: ShardedEma
    loader: ClipLoader
    checkpointer: Checkpointer
    metrics: Metrics
    validation: Validation
    stop: StopRequest
    guard: StepGuard
    watchdog: Watchdog
    step: int = 0
    owes_validation: bool = False

    def train(self) -> bool:
        """Trains to `max_steps`, or until all ranks agree to stop early; returns whether it got to the end."""
        if self.owes_validation:
            if not self._validate():
                return False  # the checkpoint that it came from says the same
            self.metrics.note_owed_validation(self.step)
        first_step = self.step
        # Closed in any case: the traceback of an error keeps it, and its processes would keep this one from ending.
        with contextlib.closing(iter(self.loader)) as steps:
            while self.step < self.recipe.max_steps:
                tally = self._take_step(steps)
                if self.step == first_step + 1:
                    self.checkpointer.reserve()
                if self.checkpointer.is_saving and not tally.is_writing:
                    self._finish_save()
                if tally.is_skipped:
                    self._after_skipped_step(tally)
                self.owes_validation = True
                if tally.should_stop or not self._validate():
                    self._begin_save()
                    self._finish_save()
                    return False
                if self.step % self.recipe.checkpoint.every_steps == 0 or self.step == self.recipe.max_steps:
                    self._begin_save()
            if self.checkpointer.is_saving:
                self._finish_save()
        return True

    def _validate(self) -> bool:
        self.watchdog.enter("validating", f"step {self.step}")
        self.owes_validation = not self.validation.after_step(self.step)
        return not self.owes_validation

    def _take_step(self, steps: Iterator[list[ClipBatch]]) -> "Tally":
        self.watchdog.enter("training a step", f"step {self.step + 1}", is_measured=True)
        started = time.perf_counter()
        micro_batches = next(steps)
        waited = time.perf_counter() - started
        tally, forward = Tally(), Stopwatch(self.engine.ranks.device)
        for batch in micro_batches:
            with forward.running():
                output = self.engine.forward(batch)
            if self.guard.looks_for_spikes and batch is micro_batches[-1]:
                tally.is_spike = self.guard.is_spike(tally.agreed_loss(output))
            self.engine.backward(output.loss, drop=tally.is_spike)
            tally.add(batch, output)
        rate = learning_rate(self.recipe.optimizer, self.step, max_steps=self.recipe.max_steps)
        update = self.engine.update(rate)
        if update.applied:
            self.ema.update(self.engine.masters)
        self.step += 1
        own = (waited, forward.seconds())
        # Asked as late as can be: what is heard after it has to wait for one more step.
        tally.agree(
            applied=update.applied, should_stop=bool(self.stop), is_writing=self.checkpointer.is_writing, own=own
        )
        if not tally.is_skipped:
            self.guard.note_applied(tally.losses.mean)
        seconds = time.perf_counter() - started
        report = StepReport(self.step, tally.losses, rate, update.gradient_norm, seconds, waited, tally.own_seconds)
        self.metrics.step(report)
        return tally

    def _after_skipped_step(self, tally: "Tally") -> None:
        """Reports it; at one more than the recipe tolerates, goes back to a checkpoint or ends the run."""
        section = self.recipe.recovery
        if tally.is_spike:
            verdict, count = self.guard.note_spike(self.step), len(self.guard.spike_steps)
            worst = max(gathered(tally.worst_sample()), key=itemgetter(0))[1]
            reason = (
                f"loss {tally.losses.mean:.4g} leapt over {section.spike_factor:g} x {self.guard.usual_loss:.4g}, "
                f"most of all {worst}"
            )
            bound = f"recovery.max_spikes={section.max_spikes}"
        else:
            verdict, count = self.guard.note_nonfinite(self.step), len(self.guard.nonfinite_steps)
            found = [sample for samples in gathered(tally.nonfinite_samples) for sample in samples]
            reason = f"not finite: {'; '.join(found) or 'no loss of any sample, only the gradient'}"
            bound = f"max_nonfinite_steps={self.recipe.max_nonfinite_steps}"
        count_in = f"{count} within {section.spike_window_steps} steps"
        text = f"step {self.step}: update skipped on all ranks ({count_in}), {reason}"
        self.metrics.message(text, step=self.step, level=logging.WARNING)
        if verdict == "go on":
            return
        if self.checkpointer.is_saving:
            self._finish_save()
        if verdict == "roll back":
            self._roll_back(bound)
        else:
            raise UserError(
                f"{text}. More than {bound}: look at these samples, lower optimizer.lr, tolerate more, or have the run "
                "go back by recovery.max_roll_backs"
            )

    def _roll_back(self, bound: str) -> None:
        """Takes weights, moments and average from the newest checkpoint, and goes on here with the next data.

        Going back in the data as well would meet the same samples and, being deterministic, the same end.
        """
        self.watchdog.enter("going back", f"step {self.step}")
        resumed = self.checkpointer.resume()
        if resumed is None:
            raise UserError(f"more than {bound} before the first checkpoint: there is nothing to go back to")
        self.guard.roll_back(resumed.state["guard"])
        self.metrics.message(
            f"step {self.step}: more than {bound}; back to the weights of step {resumed.manifest.step}, on with the "
            f"next data (roll-back {self.guard.roll_backs}, recovery.max_roll_backs="
            f"{self.recipe.recovery.max_roll_backs})",
            step=self.step,
            level=logging.WARNING,
        )

    def _begin_save(self) -> None:
        """Returns as soon as the state is copied; the save before must have come to its end."""
        self.watchdog.enter("saving", f"step {self.step}")
        if self.checkpointer.is_saving:
            self._finish_save()
        self.metrics.flush()  # steps that a checkpoint has passed are not written again
        state = {
            "guard": self.guard.state_dict(),
            "loader": self.loader.state_dict(),
            "owes_validation": self.owes_validation,
        }
        self.checkpointer.begin(self.step, state)

    def _finish_save(self) -> None:
        self.watchdog.enter("saving", f"step {self.step}")
        saved = self.checkpointer.finish()
        self.metrics.saved(saved.step, seconds=saved.seconds, waited_seconds=saved.waited_seconds)


class Tally:
    """What one step adds up: over micro batches, then over ranks in a single exchange.

    Attributes:
        is_spike: whether the step's update was dropped because of its loss; the same on all ranks.
        losses: after `agree`, over all ranks.
        is_skipped: after `agree`, whether the update was dropped for whatever reason, on all ranks.
        should_stop: after `agree`, whether any rank was asked to stop.
        is_writing: after `agree`, whether any rank is still writing a checkpoint.
        own_seconds: after `agree`, of all ranks.
    """

    losses: Losses
    own_seconds: OwnSeconds

    def __init__(self) -> None:
        self.is_spike = self.is_skipped = self.should_stop = self.is_writing = False
        self._sums: list[Tensor] = []
        self._added: list[tuple[ClipBatch, Tensor]] = []

    def add(self, batch: ClipBatch, output: ObjectiveOutput) -> None:
        """Adds a micro batch. Asks for no number: the next forward pass need not wait for this one on a GPU."""
        losses = output.sample_losses.detach()
        self._added.append((batch, losses))
        parts = (losses.sum().reshape(1), losses.new_tensor([len(losses)]), output.domain_sums, output.domain_counts)
        self._sums.append(torch.cat([part.to(torch.float64) for part in parts]))

    @property
    def nonfinite_samples(self) -> list[str]:
        """This rank's samples whose loss is not finite, in words."""
        return [name for batch, losses in self._added for name in name_nonfinite(batch, losses.tolist())]

    def worst_sample(self) -> tuple[float, str]:
        """This rank's largest loss, and whose it is."""
        named = [
            pair for batch, losses in self._added for pair in zip(losses.tolist(), name_samples(batch), strict=True)
        ]
        loss, name = max(named)
        return loss, f"{name}: {loss:.4g}"

    def agreed_loss(self, output: ObjectiveOutput) -> float:
        """The mean loss over all ranks of what was added and this last micro batch. Collective."""
        losses = output.sample_losses.detach().to(torch.float64)
        sums = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        total, count = map(float, sum_over_ranks(sum((part[:2] for part in self._sums), sums)).tolist())
        return total / count

    def agree(
        self,
        *,
        applied: bool,
        should_stop: bool = False,
        is_writing: bool = False,
        own: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Brings together what all ranks have. Collective.

        Args:
            applied: whether this rank's update was.
            should_stop: whether this rank was asked to.
            is_writing: whether this rank is, at a checkpoint.
            own: seconds that this rank waited for its data and was in the forward pass.
        """
        sums = torch.stack(self._sums).sum(dim=0)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        # To the device and back at once: each way, the step waits for it.
        told = [float(should_stop), float(is_writing), float(bool(self.nonfinite_samples) or not applied)]
        told += [seconds if one == rank else 0.0 for seconds in own for one in range(world_size)]
        values = iter(sum_over_ranks(torch.cat([sums, sums.new_tensor(told)])).tolist())
        loss_sum, num_samples, *domains = islice(values, len(sums))
        stop, writing, skipped, *seconds_of_ranks = values
        self.losses = Losses(loss_sum, num_samples, domains[: len(DOMAINS)], domains[len(DOMAINS) :])
        self.should_stop, self.is_writing, self.is_skipped = stop > 0, writing > 0, skipped > 0
        self.own_seconds = OwnSeconds(seconds_of_ranks[:world_size], seconds_of_ranks[world_size:])


def name_nonfinite(batch: ClipBatch, losses: Sequence[float]) -> list[str]:
    """Which samples of a batch have a loss that is not finite: `sample 12 of epoch 0 (clip dancer_3): nan`."""
    named = zip(losses, name_samples(batch), strict=True)
    return [f"{name}: {loss}" for loss, name in named if not math.isfinite(loss)]


def name_samples(batch: ClipBatch) -> list[str]:
    """`sample 12 of epoch 0 (clip dancer_3)` and so on."""
    keys = zip(batch.keys.tolist(), batch.clip_ids, strict=True)
    return [f"sample {sample_id} of epoch {epoch} (clip {clip_id})" for (_, epoch, sample_id), clip_id in keys]
