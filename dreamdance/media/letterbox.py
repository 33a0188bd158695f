"""Finds the black bars around a video: the rows and columns at its edges that are dark in every frame.

A bar is cut from all frames. If a hand reaches into it in a single frame, that part of the bar stays.
"""

from collections.abc import Generator, Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import UserError
from dreamdance.media.cropping import Crop

# Brightness from 0 to 255. A pixel that is brighter in any channel is content; codec noise in black bars is darker.
NOISE_BRIGHTNESS = 64
# A pixel is content too if it and the mean of its 3x3 area are brighter: compression leaves single grey pixels only.
BAR_BRIGHTNESS = 24
MAX_BAR_SHARE = 0.75


def search_letterbox(frames: Iterable[NDArray[np.uint8]], *, where: str) -> Generator[None, None, Crop]:
    """Searches the smallest rectangle that contains every bright pixel of every frame.

    Args:
        frames: all frames of the video, `(H, W, 3)` uint8 each; the function reads them one after the other.
        where: the video's name, for the error message.

    Yields:
        None after each frame, so that the caller can report progress on long videos.

    Returns:
        The rectangle.

    Raises:
        UserError: almost nothing of the frame would remain.
    """
    brightest = brightest_areas = np.zeros((0, 0, 3), np.uint8)
    for frame in frames:
        if not brightest.size:
            brightest, brightest_areas = np.zeros_like(frame), np.zeros_like(frame)
        np.maximum(brightest, frame, out=brightest)
        areas = np.minimum(frame, cv2.blur(frame, (3, 3), borderType=cv2.BORDER_REPLICATE))
        np.maximum(brightest_areas, areas, out=brightest_areas)
        yield
    height, width = brightest.shape[:2]
    content = ((brightest > NOISE_BRIGHTNESS) | (brightest_areas > BAR_BRIGHTNESS)).any(axis=2)
    left, right = _bars(content.any(axis=0))
    top, bottom = _bars(content.any(axis=1))
    crop = Crop(left=left, top=top, width=width - left - right, height=height - top - bottom)
    if crop.width * crop.height < (1 - MAX_BAR_SHARE) * width * height:
        raise UserError(
            f"{where}: finding black bars would leave {max(crop.width, 0)}x{max(crop.height, 0)} of {width}x{height}; "
            "give `videos.crop`, or set `videos.crop_letterbox` to false"
        )
    return crop


def _bars(content: NDArray[np.uint8]) -> tuple[int, int]:
    """Counts the entries without content at both ends; if no entry has content, all count at the front."""
    found = np.flatnonzero(content)
    return (int(found[0]), len(content) - 1 - int(found[-1])) if len(found) else (len(content), 0)
