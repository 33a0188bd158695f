"""A part of a picture, and the centred part of the wanted aspect; `letterbox` finds black bars."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Crop:
    """A part of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """The part of frames `(..., H, W, c)`."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width, :]

    def within(self, other: "Crop") -> "Crop":
        """This crop of a frame that is itself the part `other`."""
        return Crop(left=self.left + other.left, top=self.top + other.top, width=self.width, height=self.height)


def centred_crop(width: int, height: int, *, to_width: int, to_height: int) -> Crop:
    """The largest centred part of `width` x `height` that has the aspect of `to_width` x `to_height`, to a pixel."""
    if width * to_height > height * to_width:
        kept = max(1, round(height * to_width / to_height))
        return Crop(left=(width - kept) // 2, top=0, width=kept, height=height)
    kept = max(1, round(width * to_height / to_width))
    return Crop(left=0, top=(height - kept) // 2, width=width, height=kept)
