"""A clip as people look at it: its maps side by side, small, and its scores as short texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.data.curation.scores import Scores

# The maps that are shown, in this order; a clip may lack some.
SHOWN_MAPS = ("rgb", "pose", "mask", "depth", "normal")


class Frames(Protocol):
    """The frames of a map: an array, or frames that are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, frame: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class ShownClip:
    """A clip to show.

    Attributes:
        clip_id: name of the clip; letters, digits, `_`, `.` and `-`.
        source: where it comes from, for people to read, such as the video and the time span.
        fps: frames per second.
        maps: frames by modality, in the encodings of the shards (C9): `(f, H, W, 3)` uint8, depth `(f, H, W)` uint16,
            mask `(f, H, W)` uint8.
        scores: of the clip.
    """

    clip_id: str
    source: str
    fps: float
    maps: Mapping[str, Frames]
    scores: Scores


def strip_frame(clip: ShownClip, frame: int, *, height: int) -> NDArray[np.uint8]:
    """One frame of all shown maps side by side: `height` pixels high, in colours; a map that is absent is grey.

    Returns:
        `(height, 5 w, 3)` uint8; w is even, so that H.264 stores the strip as it is.
    """
    rows, columns = clip.maps["rgb"].shape[1:3]
    width = max(2, 2 * round(columns * height / rows / 2))
    pictures = []
    for name in SHOWN_MAPS:
        if name in clip.maps:
            picture = _in_colours(clip.maps[name][frame])
            shrinks = height < picture.shape[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            pictures.append(np.asarray(cv2.resize(picture, (width, height), interpolation=how), dtype=np.uint8))
        else:
            pictures.append(np.full((height, width, 3), 200, np.uint8))
    return np.concatenate(pictures, axis=1)


def score_texts(scores: Scores) -> list[str]:
    """Each score as `name value`; a score that is not known is a dash. Nothing if none is known."""
    if all(value is None for value in scores.values().values()):
        return []
    return [f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in scores.values().items()]


def _in_colours(picture: NDArray[Any]) -> NDArray[np.uint8]:
    if picture.dtype == np.uint16:
        picture = np.round(picture / 257).astype(np.uint8)
    return np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture
