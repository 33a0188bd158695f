"""Which clips pass the filters of a training recipe."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dreamdance.data.curation.scores import Scores
from dreamdance.recipe.filter_section import ScoreFilters


@dataclass(frozen=True)
class Limits:
    """The accepted values of a score, both ends included; None is no limit."""

    low: float | None = None
    high: float | None = None

    def accept(self, value: float | None) -> bool:
        """Whether a value passes; an unknown one does not."""
        if value is None:
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.low == self.high:
            return f"{self.low:g}"
        low, high = ("" if end is None else f"{end:g}" for end in (self.low, self.high))
        return f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"


def filter_limits(filters: ScoreFilters) -> dict[str, Limits]:
    """The limits of each score that the recipe names."""
    limits = {
        "cut": Limits(high=filters.cut),
        "motion": Limits(*(filters.motion or (None, None))),
        "sharpness": Limits(low=filters.sharpness),
        "visible_joints": Limits(low=filters.visible_joints),
        "people": Limits(filters.people, filters.people),
        "jitter": Limits(high=filters.jitter),
        "geometry_angle": Limits(high=filters.geometry_angle),
    }
    return {name: limit for name, limit in limits.items() if limit != Limits()}


def failed_filters(scores: Scores, limits: Mapping[str, Limits]) -> list[str]:
    """The names of the scores by which a clip does not pass; empty if it passes."""
    values = scores.values()
    return [name for name, limit in limits.items() if not limit.accept(values[name])]


@dataclass(frozen=True)
class ClipChoice:
    """The result of filters on a set of clips.

    Attributes:
        passed: for each clip whether it is used.
        dropped_by: for each filter the number of clips that it drops, also if another one drops them too.
        without: for each filter the number of those clips that have no such score.
    """

    passed: tuple[bool, ...]
    dropped_by: Mapping[str, int]
    without: Mapping[str, int]

    def report(self) -> str:
        """One line for the log."""
        kept, total = sum(self.passed), len(self.passed)
        reasons = ", ".join(self._reason(name, count) for name, count in self.dropped_by.items() if count)
        return f"{kept} of {total} clips remain" + (f"; dropped by {reasons}" if reasons else "")

    def _reason(self, name: str, count: int) -> str:
        without = self.without[name]
        return f"{name}: {count}" + (f" ({without} without this score)" if without else "")


def choose_clips(scores: Iterable[Scores], filters: ScoreFilters) -> ClipChoice:
    """Applies the filters of a recipe to clips."""
    limits, scores = filter_limits(filters), list(scores)
    failures = [failed_filters(one, limits) for one in scores]
    counts = {name: sum(name in failed for failed in failures) for name in limits}
    without = {name: sum(one.values()[name] is None for one in scores) for name in limits}
    return ClipChoice(tuple(not failed for failed in failures), counts, without)
