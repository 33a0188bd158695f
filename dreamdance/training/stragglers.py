"""Finds a rank that delays all other ranks.

A step takes equally long on all ranks, because they exchange gradients. Ranks differ in two times in which they do not
wait for one another: while they wait for their data, and in the forward pass.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# A report covers at least this many steps: every rank is slow in some step.
LEAST_STEPS = 5
# A rank is a straggler if its time is at least this many times the (lower) median of all ranks,
NOTABLE_FACTOR = 2.0
# and if the difference is at least this share of the step.
NOTABLE_SHARE = 0.1


@dataclass(frozen=True)
class RankSeconds:
    """Seconds of one step, by rank: waiting for data, and in the forward pass."""

    data: Sequence[float]
    forward: Sequence[float]


NOT_TIMED = RankSeconds((), ())


class StragglerReport:
    """Adds up steps, and reports which rank delays the others in which phase.

    The same rank and phase are reported again only after `take` has found another rank or none.
    """

    def __init__(self) -> None:
        self._reported: tuple[int, str] | None = None
        self._reset()

    def add(self, rank_seconds: RankSeconds, step_seconds: float) -> None:
        """Adds a step."""
        self._steps += 1
        self._step_seconds += step_seconds
        phases = (("waiting for its data", rank_seconds.data), ("in the forward pass", rank_seconds.forward))
        for phase, seconds in phases if rank_seconds.data else ():
            before = self._sums.get(phase, [0.0] * len(seconds))
            self._sums[phase] = [sum(pair) for pair in zip(before, seconds, strict=True)]

    def take(self) -> str | None:
        """The report on the steps since the last finding; None if they are too few, or if the finding is the same."""
        if self._steps < LEAST_STEPS:
            return None
        steps, step_seconds, sums = self._steps, self._step_seconds / self._steps, self._sums
        self._reset()
        found: list[tuple[float, tuple[int, str], str]] = []
        for phase, seconds in sums.items():
            slowest, usual = max(seconds) / steps, statistics.median_low(seconds) / steps
            excess = slowest - usual
            rank = seconds.index(max(seconds))
            if slowest >= NOTABLE_FACTOR * usual and excess >= NOTABLE_SHARE * step_seconds:
                text = (
                    f"rank {rank} delays the other ranks: {slowest:.3g} s of each step {phase}; "
                    f"half of the ranks need at most {usual:.3g} s (a step takes {step_seconds:.3g} s)"
                )
                found.append((excess, (rank, phase), text))
        _, worst, text = max(found, default=(0.0, None, ""))
        reported, self._reported = self._reported, worst
        return text if worst not in (None, reported) else None

    def _reset(self) -> None:
        self._steps, self._step_seconds = 0, 0.0
        self._sums: dict[str, list[float]] = {}
