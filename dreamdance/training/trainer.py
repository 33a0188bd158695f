"""The training loop: the order of the work within a step and between steps. Other modules do the work itself."""

import contextlib
import logging
import time
from dataclasses import dataclass, field
from operator import itemgetter

from dreamdance.data.loading.loader import ClipLoader
from dreamdance.errors import UserError
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.process_group import gather_from_ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.stopwatch import Stopwatch
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.checkpointing.checkpointer import Checkpointer
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.guard import StepGuard
from dreamdance.training.inputs import PreparedInputs
from dreamdance.training.metrics import Metrics, StepReport
from dreamdance.training.schedule import learning_rate
from dreamdance.training.step_flops import StepFlops
from dreamdance.training.step_totals import StepTotals
from dreamdance.training.validation import Validator

NO_GRADIENT = (
    "every gradient of step {step} is 0, so that nothing is learned; where layers begin at zero (stage 2's "
    "controlnet.*zero_convolution*), no gradient reaches the layers before them unless they train as well: see "
    "optimizer.only"
)


@dataclass
class Trainer:
    """All parts of a training run; `train.py` builds it.

    Attributes:
        step: finished optimizer steps.
        inputs: the prepared micro batches; `train` sets it.
        validation_pending: whether the last step's validation was interrupted and must be repeated.
        warned_of_zero_gradient: the warning comes once.
    """

    recipe: TrainingRecipe
    engine: Engine
    ema: ShardedEma
    loader: ClipLoader
    checkpointer: Checkpointer
    metrics: Metrics
    validation: Validator
    stop: StopRequest
    guard: StepGuard
    watchdog: Watchdog
    flops: StepFlops
    step: int = 0
    validation_pending: bool = False
    warned_of_zero_gradient: bool = False
    inputs: PreparedInputs = field(init=False)

    def train(self) -> bool:
        """Trains to `max_steps`, or until all ranks agree to stop early; returns whether it reached `max_steps`."""
        if self.validation_pending:
            if not self._validate():
                return False  # the checkpoint that the run resumed from has the flag already
            self.metrics.note_pending_validation_done(self.step)
        first_step = self.step
        # Always close: after an error the traceback keeps the iterator alive, and its workers block exit.
        with contextlib.closing(iter(self.loader)) as steps:
            self.inputs = PreparedInputs(steps, self.engine.objective, self.engine.ranks.device)
            while self.step < self.recipe.max_steps:
                totals = self._take_step()
                if self.step == first_step + 1:
                    self.checkpointer.reserve()
                if self.checkpointer.is_saving and not totals.is_writing:
                    self._finish_save()
                if totals.is_skipped:
                    self._after_skipped_step(totals)
                self.validation_pending = True
                if totals.should_stop or not self._validate():
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
        self.validation_pending = not self.validation.after_step(self.step)
        return not self.validation_pending

    def _take_step(self) -> StepTotals:
        self.watchdog.enter("training a step", f"step {self.step + 1}", is_measured=True)
        started = time.perf_counter()
        totals, forward, host_seconds = StepTotals(), Stopwatch(self.engine.ranks.device), 0.0
        is_last_step = self.step + 1 == self.recipe.max_steps
        for index, batch in enumerate(self.inputs.micro_batches(is_last_step=is_last_step), start=1):
            begun = time.perf_counter()
            with forward.running(), self.flops.counting("forward"):
                output = self.engine.forward(batch)
            host_seconds += time.perf_counter() - begun
            if self.guard.looks_for_spikes and index == self.engine.accumulation_steps:
                totals.is_spike = self.guard.is_spike(totals.loss_with(output))
            begun = time.perf_counter()
            with self.flops.counting("backward"):
                self.engine.backward(output.loss, drop=totals.is_spike)
            host_seconds += time.perf_counter() - begun
            totals.add(batch.clips, output)
        waited = self.inputs.take_waited_seconds()
        rate = learning_rate(self.recipe.optimizer, self.step, max_steps=self.recipe.max_steps)
        update = self.engine.update(rate)
        if update.applied:
            self.ema.update(self.engine.masters)
        self.step += 1
        forward_seconds = forward.seconds()
        # The stop flag is read last: a signal that comes later is handled at the next step.
        totals.reduce(
            applied=update.applied,
            should_stop=bool(self.stop),
            is_writing=self.checkpointer.is_writing,
            data_seconds=waited,
            forward_seconds=forward_seconds,
        )
        if not totals.is_skipped:
            self.guard.note_applied(totals.losses.mean)
        seconds = time.perf_counter() - started
        report = StepReport(
            step=self.step,
            losses=totals.losses,
            learning_rate=rate,
            gradient_norm=update.gradient_norm,
            seconds=seconds,
            data_wait_seconds=waited,
            rank_seconds=totals.rank_seconds,
            scaled_rates=self.engine.scaled_rates,
            host_seconds=host_seconds,
            flops=self.flops.of_micro_batches(self.engine.accumulation_steps),
        )
        self.metrics.step(report)
        if update.applied and update.gradient_norm == 0 and not self.warned_of_zero_gradient:
            self.warned_of_zero_gradient = True
            self.metrics.message(NO_GRADIENT.format(step=self.step), step=self.step, level=logging.WARNING)
        return totals

    def _after_skipped_step(self, totals: StepTotals) -> None:
        """Reports the step; if there are more than the recipe tolerates, returns to a checkpoint or ends the run."""
        section = self.recipe.recovery
        if totals.is_spike:
            reaction, count = self.guard.note_spike(self.step), len(self.guard.spike_steps)
            worst = max(gather_from_ranks(totals.worst_sample()), key=itemgetter(0))[1]
            reason = (
                f"loss {totals.losses.mean:.4g} exceeds {section.spike_factor:g} x the recent median "
                f"{self.guard.usual_loss:.4g}; largest in {worst}"
            )
            bound = f"recovery.max_spikes={section.max_spikes}"
        else:
            reaction, count = self.guard.note_nonfinite(self.step), len(self.guard.nonfinite_steps)
            found = [sample for samples in gather_from_ranks(totals.nonfinite_samples) for sample in samples]
            reason = f"not finite: {'; '.join(found) or 'the gradient, but no loss of a sample'}"
            bound = f"max_nonfinite_steps={self.recipe.max_nonfinite_steps}"
        count_in = f"{count} within {section.spike_window_steps} steps"
        text = f"step {self.step}: update skipped on all ranks ({count_in}), {reason}"
        self.metrics.message(text, step=self.step, level=logging.WARNING)
        if reaction == "continue":
            return
        if self.checkpointer.is_saving:
            self._finish_save()
        if reaction == "roll back":
            self._roll_back(bound)
        else:
            raise UserError(
                f"{text}. That is more than {bound}: look at these samples, lower optimizer.lr, raise that bound, or "
                "set recovery.max_roll_backs so that the run returns to a checkpoint"
            )

    def _roll_back(self, bound: str) -> None:
        """Loads weights, moments and average from the newest checkpoint, and continues with the next data.

        The data position does not return: training is deterministic, so the same samples would fail again.
        """
        self.watchdog.enter("rolling back", f"step {self.step}")
        resumed = self.checkpointer.resume()
        if resumed is None:
            raise UserError(f"more than {bound} before the first checkpoint: there is no checkpoint to return to")
        self.guard.roll_back(resumed.state["guard"])
        self.metrics.message(
            f"step {self.step}: more than {bound}; returned to the weights of step {resumed.manifest.step}; continues "
            f"with the next data (roll-back {self.guard.roll_backs}, recovery.max_roll_backs="
            f"{self.recipe.recovery.max_roll_backs})",
            step=self.step,
            level=logging.WARNING,
        )

    def _begin_save(self) -> None:
        """Returns as soon as the state is copied; the previous save is finished first."""
        self.watchdog.enter("saving", f"step {self.step}")
        if self.checkpointer.is_saving:
            self._finish_save()
        self.metrics.flush()  # steps before a checkpoint are not written again
        state = {
            "guard": self.guard.state_dict(),
            "loader": self.loader.state_dict(steps_ahead=self.inputs.steps_ahead),
            "validation_pending": self.validation_pending,
        }
        self.checkpointer.begin(self.step, state)

    def _finish_save(self) -> None:
        self.watchdog.enter("saving", f"step {self.step}")
        saved = self.checkpointer.finish()
        self.metrics.saved(saved.step, seconds=saved.seconds, waited_seconds=saved.waited_seconds)
