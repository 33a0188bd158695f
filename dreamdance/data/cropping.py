"""Which part of a picture is kept: black bars are cut away, and a centred part of the wanted aspect is taken."""

from dataclasses import dataclass

import numpy as np

from dreamdance.errors import UserError

BAR_BRIGHTNESS = 24  # of 255: H.264 leaves a little ringing in bars that were black
BRIGHTEST_PERCENT = 98  # a few noisy pixels do not make a row of a bar part of the picture
MAX_BAR_SHARE = 0.75


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


def find_letterbox(frames: np.ndarray, *, where: str = "the video") -> Crop:
    """The part of a video that is not black bars.

    Args:
        frames: `(n, H, W, 3)` uint8, taken from the whole length of the video: what is dark in all of them is a bar.
        where: the video's name, for the error's text.

    Raises:
        UserError: hardly anything would be left.
    """
    brightest = frames.max(axis=(0, 3))
    left, right = _bars(np.percentile(brightest, BRIGHTEST_PERCENT, axis=0))
    top, bottom = _bars(np.percentile(brightest, BRIGHTEST_PERCENT, axis=1))
    height, width = brightest.shape
    crop = Crop(left=left, top=top, width=width - left - right, height=height - top - bottom)
    if crop.width * crop.height < (1 - MAX_BAR_SHARE) * width * height:
        raise UserError(
            f"{where}: finding black bars would leave {max(crop.width, 0)}x{max(crop.height, 0)} of {width}x{height}; "
            "give `videos.crop`, or set `videos.crop_letterbox` to false"
        )
    return crop


def _bars(brightness: np.ndarray) -> tuple[int, int]:
    """How many entries at both ends are dark; all of them at the front if none is bright."""
    bright = np.flatnonzero(brightness > BAR_BRIGHTNESS)
    return (int(bright[0]), len(brightness) - 1 - int(bright[-1])) if len(bright) else (len(brightness), 0)
