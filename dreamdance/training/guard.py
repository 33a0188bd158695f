"""Reaction to failed steps: they are skipped; after too many, the run ends or returns to a checkpoint.

The guard decides the same on every rank, because it reads only numbers that are summed over all ranks.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from dreamdance.recipe.training_sections import Recovery

# Before this many steps, no loss counts as a spike.
FEWEST_LOSSES = 10

Reaction = Literal["continue", "roll back", "stop"]


class StepGuard:
    """Counts skipped steps and keeps the recent losses. Checkpoints hold them, so a resumed run decides the same.

    Attributes:
        nonfinite_steps: the recent steps that were skipped because a loss or the gradient was not finite.
        spike_steps: the recent steps that were skipped because their loss was far above the recent median.
        roll_backs: how often the run has returned to a checkpoint.
    """

    def __init__(self, section: Recovery, *, max_nonfinite_steps: int) -> None:
        """Starts without skipped steps; the recipe's `recovery` and `max_nonfinite_steps` set the bounds."""
        self.section, self.max_nonfinite_steps = section, max_nonfinite_steps
        self.nonfinite_steps: list[int] = []
        self.spike_steps: list[int] = []
        self.roll_backs = 0
        self._losses: deque[float] = deque(maxlen=self.section.spike_window_steps)

    @property
    def looks_for_spikes(self) -> bool:
        return self.section.spike_factor is not None

    @property
    def usual_loss(self) -> float:
        """The median loss of the recent applied steps; NaN while they are fewer than `FEWEST_LOSSES`."""
        return statistics.median(self._losses) if len(self._losses) >= FEWEST_LOSSES else math.nan

    def is_spike(self, loss: float) -> bool:
        """Whether a step's mean loss is above `spike_factor` times the usual loss, so that its update is skipped."""
        factor = self.section.spike_factor
        return factor is not None and math.isfinite(loss) and loss > factor * self.usual_loss

    def note_applied(self, loss: float) -> None:
        """Records the loss of a step that was applied."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def note_spike(self, step: int) -> Reaction:
        """Records a step that was skipped because of its loss; returns the reaction."""
        self.spike_steps = [*self._recent(self.spike_steps, step), step]
        return self._reaction(len(self.spike_steps) > self.section.max_spikes)

    def note_nonfinite(self, step: int) -> Reaction:
        """Records a step that was skipped because a loss or the gradient was not finite; returns the reaction."""
        self.nonfinite_steps = [*self._recent(self.nonfinite_steps, step), step]
        return self._reaction(len(self.nonfinite_steps) > self.max_nonfinite_steps)

    def _recent(self, steps: list[int], step: int) -> list[int]:
        """Drops steps older than the window: in weeks of training single steps may fail; only many together matter."""
        return [old for old in steps if old > step - self.section.spike_window_steps]

    def _reaction(self, too_many: bool) -> Reaction:
        if not too_many:
            return "continue"
        return "roll back" if self.roll_backs < self.section.max_roll_backs else "stop"

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Loads the state from the checkpoint that the run returned to, and sets the counts to zero."""
        roll_backs = self.roll_backs + 1
        self.load_state_dict(state)
        self.nonfinite_steps, self.spike_steps, self.roll_backs = [], [], roll_backs

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "spike_steps": self.spike_steps,
            "roll_backs": self.roll_backs,
            "recent_losses": list(self._losses) if self.looks_for_spikes else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a state that `state_dict` returned."""
        self.nonfinite_steps, self.roll_backs = list(state["nonfinite_steps"]), state["roll_backs"]
        self.spike_steps = list(state["spike_steps"])
        self._losses = deque(state["recent_losses"], maxlen=self.section.spike_window_steps)
