"""Differences between two results of the same clips: paired clip by clip, so that hard clips do not hide them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dreamdance.evaluation.scores import IMPROVEMENT_KEYS, METRICS, Scores

PAIR_HEADER = ["", "this run", "other", "which", "difference", "standard error", "better in"]


@dataclass(frozen=True)
class PairedDifference:
    """One score of two results, over the clips in which both have it.

    Attributes:
        own, other: means over these clips.
        difference: mean of own - other.
        standard_error: of that mean over the clips, with n - 1 degrees of freedom; None for one clip.
        num_better: number of clips in which the own score is the better one.
        num_clips: number of clips.
    """

    own: float
    other: float
    difference: float
    standard_error: float | None
    num_better: int
    num_clips: int


def paired_differences(clips: Mapping[str, Mapping[str, Scores]], own: str, other: str) -> dict[str, PairedDifference]:
    """The differences for each of `IMPROVEMENT_KEYS` that both results have.

    Args:
        clips: clip id -> row name -> scores.
        own, other: names of the two rows.
    """
    metrics = {metric.key: metric for metric in METRICS}
    found = {}
    for key in IMPROVEMENT_KEYS:
        both = [(rows.get(own, {}).get(key, np.nan), rows.get(other, {}).get(key, np.nan)) for rows in clips.values()]
        pairs = np.asarray(both, dtype=np.float64).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        if len(pairs) == 0:
            continue
        differences = pairs[:, 0] - pairs[:, 1]
        gains = differences if metrics[key].higher_is_better else -differences
        error = float(differences.std(ddof=1) / np.sqrt(len(pairs))) if len(pairs) > 1 else None
        means = pairs.mean(axis=0)
        found[key] = PairedDifference(
            float(means[0]), float(means[1]), float(differences.mean()), error, int((gains > 0).sum()), len(pairs)
        )
    return found


def pairs_as_json(
    clips: Mapping[str, Mapping[str, Scores]], own: str, other: str
) -> dict[str, dict[str, float | int | None]]:
    """The differences as JSON values."""
    return {key: asdict(found) for key, found in paired_differences(clips, own, other).items()}


def pair_lines(clips: Mapping[str, Mapping[str, Scores]], own: str, other: str) -> list[list[str]]:
    """The differences as lines below `PAIR_HEADER`."""
    metrics = {metric.key: metric for metric in METRICS}
    lines = []
    for key, found in paired_differences(clips, own, other).items():
        digits = metrics[key].digits
        error = "one clip" if found.standard_error is None else f"{found.standard_error:.{digits}f}"
        numbers = [f"{found.own:.{digits}f}", f"{found.other:.{digits}f}", other, f"{found.difference:+.{digits}f}"]
        lines.append([key, *numbers, error, f"{found.num_better} of {found.num_clips} clips"])
    return lines
