"""The scores of a clip, from which a training recipe chooses (`data.filters`). They are measured once and stored.

A score is None where it cannot be measured, for example the sharpness of a body that is nowhere visible.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.media.keypoints import BODY
from dreamdance.media.pose_drawing import CONFIDENCE_THRESHOLD

# Higher frames are reduced to this height before sharpness is measured, so that a video's size matters less.
SHARPNESS_HEIGHT = 512
# A number of people that is seen in fewer of the frames than this is a false detection.
_LEAST_PEOPLE_SHARE = 0.05
# Pixels at the outline of the body, which show an edge however blurred the body is.
_OUTLINE_PIXELS = 2


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


def measure_cut(probabilities: NDArray[np.floating[Any]]) -> float | None:
    """The score `cut` from the probabilities of a clip's frames, `(f,)`: that of its last frame lies at its end."""
    inside = np.asarray(probabilities)[:-1]
    return float(inside.max()) if len(inside) else None


def measure_sharpness(rgb: NDArray[np.uint8], mask: NDArray[Any]) -> float | None:
    """The score `sharpness`: the median over the frames.

    Args:
        rgb: `(f, H, W, 3)` uint8.
        mask: `(f, H, W)`, more than 0.5 on the body (or bool).

    Returns:
        The variance; None if no frame shows the body's inside.
    """
    values = [_frame_sharpness(frame, inside) for frame, inside in zip(rgb, mask, strict=True)]
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _frame_sharpness(frame: NDArray[np.uint8], mask: NDArray[Any]) -> float | None:
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32)
    body = (np.asarray(mask) > 0.5).astype(np.uint8)
    if grey.shape[0] > SHARPNESS_HEIGHT:
        size = (max(1, round(grey.shape[1] * SHARPNESS_HEIGHT / grey.shape[0])), SHARPNESS_HEIGHT)
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), dtype=np.float32)
        body = np.asarray(cv2.resize(body, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    kernel = np.ones((2 * _OUTLINE_PIXELS + 1,) * 2, np.uint8)
    inside = cv2.erode(body, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1).astype(bool)
    return float(cv2.Laplacian(grey, cv2.CV_32F)[inside].var()) if inside.any() else None


def measure_visible_joints(keypoints: NDArray[np.floating[Any]]) -> float | None:
    """The score `visible_joints` of key points `(f, 128, 3)`; a joint counts if its pose would be drawn."""
    body = keypoints[:, BODY]
    inside = ((body[..., :2] >= 0) & (body[..., :2] <= 1)).all(axis=-1)
    return float((inside & (body[..., 2] >= CONFIDENCE_THRESHOLD)).mean()) if len(body) else None


def measure_people(counts: Sequence[int]) -> int | None:
    """The score `people`: the largest number of people in one frame that is seen in at least 5 % of the frames.

    Args:
        counts: the number of people in each frame of the clip.
    """
    if not len(counts):
        return None
    ordered = np.sort(np.asarray(counts, np.int64))[::-1]
    return int(ordered[math.ceil(_LEAST_PEOPLE_SHARE * len(ordered)) - 1])
