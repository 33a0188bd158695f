"""Crops: a rectangle of a picture, and the centred one of a wanted aspect. The module `letterbox` finds black bars."""

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Crop:
    """A rectangle of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, frames: NDArray[Any]) -> NDArray[Any]:
        """Cuts the rectangle out of frames `(..., H, W, c)`."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width, :]

    def within(self, other: "Crop") -> "Crop":
        """This crop in the coordinates of the whole frame, if it was measured in the part `other`."""
        return Crop(left=self.left + other.left, top=self.top + other.top, width=self.width, height=self.height)


@dataclass(frozen=True)
class PartialCrop:
    """A part of a rectangle with the same aspect, to a pixel, of whatever size the rectangle is.

    Attributes:
        share: its share of the area, in (0, 1].
        x, y: its place in [0, 1): 0 is at the left or top edge, almost 1 at the right or bottom edge.
    """

    share: float
    x: float
    y: float

    def of(self, whole: Crop) -> Crop:
        """The part of a rectangle, in the same coordinates."""
        width, height = (max(1, round(side * math.sqrt(self.share))) for side in (whole.width, whole.height))
        left, top = int(self.x * (whole.width - width + 1)), int(self.y * (whole.height - height + 1))
        return Crop(left=whole.left + left, top=whole.top + top, width=width, height=height)


def centred_crop(width: int, height: int, *, to_width: int, to_height: int) -> Crop:
    """The largest centred part of `width` x `height` that has the aspect of `to_width` x `to_height`, to a pixel.

    A frame whose sides are within one pixel of that aspect is kept whole, so that cropping twice equals cropping once.
    """
    fitting_width = max(1, round(height * to_width / to_height))
    fitting_height = max(1, round(width * to_height / to_width))
    if fitting_width == width or fitting_height == height:
        return Crop(left=0, top=0, width=width, height=height)
    if fitting_width < width:
        return Crop(left=(width - fitting_width) // 2, top=0, width=fitting_width, height=height)
    return Crop(left=0, top=(height - fitting_height) // 2, width=width, height=fitting_height)
