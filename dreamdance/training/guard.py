"""What to do about steps that go wrong: they are skipped; too many end the run, or it goes back to a checkpoint.

Pure bookkeeping, the same on every rank: it sees only numbers that are already summed over all ranks.
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
    """Counts skipped steps and keeps the recent losses. Every checkpoint holds it, so a resumed run decides alike.

    Attributes:
        nonfinite_steps: the recent steps that were skipped because a loss or the gradient was not finite.
        spike_steps: the recent steps that were skipped because their loss was far above the usual one.
        roll_backs: how often the run has gone back.
    """

    def __init__(self, section: Recovery, *, max_nonfinite_steps: int) -> None:
        """Starts with a clean record; the recipe's `recovery` and `max_nonfinite_steps` set what is tolerated."""
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
        """The median over the recent steps that were applied; not a number while there are too few."""
        return statistics.median(self._losses) if len(self._losses) >= FEWEST_LOSSES else math.nan

    def is_spike(self, loss: float) -> bool:
        """Whether a step's mean loss is so far above the usual one that its update must be skipped."""
        factor = self.section.spike_factor
        return factor is not None and math.isfinite(loss) and loss > factor * self.usual_loss

    def note_applied(self, loss: float) -> None:
        """Records the loss of a step that was applied."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def note_spike(self, step: int) -> Reaction:
        """Records a step that was skipped for its loss; returns what follows."""
        self.spike_steps = [*self._recent(self.spike_steps, step), step]
        return self._reaction(len(self.spike_steps) > self.section.max_spikes)

    def note_nonfinite(self, step: int) -> Reaction:
        """Records a step that was skipped because something was not finite; returns what follows."""
        self.nonfinite_steps = [*self._recent(self.nonfinite_steps, step), step]
        return self._reaction(len(self.nonfinite_steps) > self.max_nonfinite_steps)

    def _recent(self, steps: list[int], step: int) -> list[int]:
        """Drops the steps before the window: in weeks of training a single step may fail; only many in a row matter."""
        return [old for old in steps if old > step - self.section.spike_window_steps]

    def _reaction(self, too_many: bool) -> Reaction:
        if not too_many:
            return "continue"
        return "roll back" if self.roll_backs < self.section.max_roll_backs else "stop"

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Loads the record of the checkpoint that the run has gone back to, and sets the counts to zero."""
        roll_backs = self.roll_backs + 1
        self.load_state_dict(state)
        self.nonfinite_steps, self.spike_steps, self.roll_backs = [], [], roll_backs

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "spike_steps": self.spike_steps,
            "roll_backs": self.roll_backs,
            "recent_losses": list(self._losses) if self.looks_for_spikes else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.nonfinite_steps, self.roll_backs = list(state["nonfinite_steps"]), state["roll_backs"]
        self.spike_steps = list(state["spike_steps"])
        self._losses = deque(state["recent_losses"], maxlen=self.section.spike_window_steps)
