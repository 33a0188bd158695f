"""The scores of a clip, from which a training recipe chooses (`data.filters`). They are measured once and stored.

A score is None where it cannot be measured, for example the sharpness of a body that is nowhere visible.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ScoreKind:
    """What a score means.

    Attributes:
        meaning: one sentence.
        unit: for people to read.
        low, high: the range of its values; `high` is None if there is no largest one.
    """

    meaning: str
    unit: str
    low: float
    high: float | None


SCORE_KINDS = {
    "cut": ScoreKind("highest probability of a cut within the clip", "probability", 0.0, 1.0),
    "motion": ScoreKind("mean motion over the whole picture", "frame heights per second", 0.0, None),
    "sharpness": ScoreKind("variance of the Laplacian of the brightness within the body", "(0 to 255)²", 0.0, None),
    "visible_joints": ScoreKind("share of the 18 joints of the body that are seen, over all frames", "share", 0.0, 1.0),
    "people": ScoreKind("most people in one frame", "people", 0.0, None),
    "jitter": ScoreKind("noise of the key points before they are smoothed", "lengths of the torso", 0.0, None),
    "geometry_angle": ScoreKind("mean angle between the normals and those of the depth", "degrees", 0.0, 180.0),
}


@dataclass(frozen=True)
class Scores:
    """The seven scores of a clip; `SCORE_KINDS` gives their meaning, unit and range."""

    cut: float | None = None
    motion: float | None = None
    sharpness: float | None = None
    visible_joints: float | None = None
    people: int | None = None
    jitter: float | None = None
    geometry_angle: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: a score is not finite or out of its range; the error names it.
        """
        for name, value in self.values().items():
            kind = SCORE_KINDS[name]
            if value is None:
                continue
            high = math.inf if kind.high is None else kind.high
            if not (math.isfinite(value) and kind.low <= value <= high):
                most = "no limit above" if kind.high is None else f"{kind.high:g}"
                raise ValueError(f"the score {name} is {value:g}; finite values from {kind.low:g} to {most} exist")

    def values(self) -> dict[str, float | None]:
        """All scores by name, in the order of `SCORE_KINDS`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_json(self) -> dict[str, float | None]:
        """The scores for the metadata of a clip."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Scores":
        """Reads scores from a clip's metadata.

        Raises:
            ValueError: a name is unknown, or a value is not a number or out of its range.
        """
        if unknown := sorted(set(content) - set(SCORE_KINDS)):
            raise ValueError(f"unknown scores: {', '.join(unknown)}; there are {', '.join(SCORE_KINDS)}")
        for name, value in content.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"the score {name} is {value!r}; a number or null is accepted")
        return cls(**content)
