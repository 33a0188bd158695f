"""Converts a decoded frame to the one that a player shows: square pixels, upright, not mirrored, in sRGB's primaries.

The file's tags give the matrix from YUV to RGB and the range; a file without tags is read as BT.601 in limited range at
every size, as FFmpeg does. Videos of high dynamic range are refused, because no single way to show them is right.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorPrimaries, ColorTrc
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dreamdance.media.video_container import MAX_FRAME_PIXELS, VideoError
from dreamdance.media.video_names import printable
from dreamdance.runtime.warnings_once import warn_once

HIGH_DYNAMIC_RANGE = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
TONE_MAP = (
    "ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable:desat=0,zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p "
    "-crf 12 OUT.mp4"
)
# FFmpeg's numbers of colour matrices that its scaler would read as BT.601.
FOREIGN_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived constant luminance",
    14: "ICtCp",
    15: "IPT-C2 of Dolby Vision",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
WIDE_PRIMARIES = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE431: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # its videos are shown on D65 screens
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
WHITE_D65 = (0.3127, 0.3290)
SCREEN_GAMMA = 2.4  # BT.1886: how screens show video
ASPECT_TOLERANCE = 0.02
GREY16_FORMATS = frozenset({"gray16le", "gray16be"})


@dataclass(frozen=True)
class Orientation:
    """The rotation of a stored frame: first rows and columns may be exchanged, then each axis may be reversed."""

    transposed: bool = False
    flipped_x: bool = False
    flipped_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame, path: Path) -> "Orientation":
        """Reads the display matrix, which phones write: x' = a x + c y, y' = b x + d y.

        Raises:
            VideoError: the matrix turns by an angle that is no multiple of 90 degrees.
        """
        side_data = cast(SideDataContainer, frame.side_data)
        matrices = [bytes(side) for side in side_data if side.type is SideDataType.DISPLAYMATRIX]
        if not matrices:
            return cls()
        a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(float)
        straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
        if max(abs(a), abs(b), abs(c), abs(d)) == 0:
            return cls()
        if straight > 0 and max(abs(b), abs(c)) < 0.01 * straight:
            return cls(flipped_x=bool(a < 0), flipped_y=bool(d < 0))
        if crossed > 0 and max(abs(a), abs(d)) < 0.01 * crossed:
            return cls(transposed=True, flipped_x=bool(c < 0), flipped_y=bool(b < 0))
        degrees = np.degrees(np.arctan2(b, a))
        raise VideoError(
            f"{path} has a rotation tag of {degrees:.0f} degrees; 90, 180 and 270 degrees and mirror images are "
            "accepted. Turn its pixels instead: ffmpeg -i IN -crf 12 OUT.mp4"
        )

    def turn(self, picture: NDArray[Any]) -> NDArray[Any]:
        """`(H, W, 3)` or `(H, W)` as it is shown."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[:: -1 if self.flipped_y else 1, :: -1 if self.flipped_x else 1])


@dataclass(frozen=True)
class Display:
    """The conversion from stored to shown frames; one conversion holds for all frames of a video.

    Attributes:
        stored_width, stored_height: size of the first stored frame.
        scaled_width, scaled_height: its size with square pixels, before the rotation.
        is_grey16: whether a frame is stored as one 16-bit number per pixel.
    """

    path: Path
    stored_width: int
    stored_height: int
    scaled_width: int
    scaled_height: int
    orientation: Orientation
    is_grey16: bool

    @classmethod
    def of(cls, frame: av.VideoFrame, stream: VideoStream, path: Path) -> "Display":
        """From the first frame.

        Raises:
            VideoError: it cannot be shown faithfully, or would become too large.
        """
        width, height = frame.width, frame.height
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        scaled_width = max(width, round(width * aspect))  # the shorter side grows, so that no detail is lost
        scaled_height = max(height, round(height / aspect))
        if scaled_width * scaled_height > MAX_FRAME_PIXELS:
            raise VideoError(
                f"{path} has pixels of shape {stream.sample_aspect_ratio}: {width}x{height} would be shown as "
                f"{scaled_width}x{scaled_height}; up to {MAX_FRAME_PIXELS} pixels are accepted"
            )
        is_grey16 = frame.format.name in GREY16_FORMATS
        display = cls(path, width, height, scaled_width, scaled_height, Orientation.of(frame, path), is_grey16)
        FrameConverter(display).show(frame, number=0)
        return display

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the shown frame."""
        width, height = self.scaled_width, self.scaled_height
        return (height, width) if self.orientation.transposed else (width, height)


class FrameConverter:
    """Converts the frames of one pass through a video; two passes must not share a converter.

    With `as_grey16` frames are `(H, W)` uint16 instead, from a video whose display `is_grey16` without any change.
    """

    def __init__(self, display: Display, *, as_grey16: bool = False) -> None:
        self._display = display
        self._as_grey16 = as_grey16
        self._scaler: _Scaler | None = None

    def show(self, frame: av.VideoFrame, *, number: int) -> NDArray[Any]:
        """The frame as a player shows it, `(H, W, 3)` uint8, at the size of the first one; warns if it is interlaced.

        Raises:
            VideoError: high dynamic range, or another aspect than the first frame's.
        """
        display = self._display
        if frame.color_trc in HIGH_DYNAMIC_RANGE:
            kind = HIGH_DYNAMIC_RANGE[ColorTrc(frame.color_trc)]
            raise VideoError(
                f"{display.path} is of high dynamic range ({kind}); videos of standard range (BT.709) are accepted. "
                f"Tone-map it: {TONE_MAP}"
            )
        if frame.colorspace in FOREIGN_MATRICES:
            raise VideoError(
                f"{display.path} stores its colours as {FOREIGN_MATRICES[frame.colorspace]}; RGB and YUV of BT.601, "
                "BT.709 and BT.2020 are accepted. Convert it with a program that shows it correctly"
            )
        across, along = frame.width * display.stored_height, frame.height * display.stored_width
        if abs(across - along) > ASPECT_TOLERANCE * max(across, along):
            raise VideoError(
                f"{display.path}: frame {number} is stored as {frame.width}x{frame.height}, the first as "
                f"{display.stored_width}x{display.stored_height}; the size may change within a video, the aspect "
                "may not. Cut the video where it changes"
            )
        if frame.interlaced_frame:  # in some videos the first frames are not interlaced
            warn_once(
                f"{printable(display.path)} is interlaced: moving edges look like combs, and a network would learn "
                "them. Deinterlace it: ffmpeg -i IN -vf bwdif=send_frame -crf 12 OUT.mp4"
            )
        if self._scaler is None or not self._scaler.takes(frame):
            form = "gray16le" if self._as_grey16 else "rgb24"
            self._scaler = _Scaler(frame, display.scaled_width, display.scaled_height, form)
        picture = self._scaler.scale(frame)
        if frame.color_primaries in WIDE_PRIMARIES and not self._as_grey16:
            picture = _to_bt709(picture, ColorPrimaries(frame.color_primaries))
        return display.orientation.turn(picture)


class _Scaler:
    """The conversion from a decoded frame to RGB or grey as FFmpeg's command line does it: a graph of filters."""

    def __init__(self, like: av.VideoFrame, width: int, height: int, form: str) -> None:
        self._kind = _kind_of(like)
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(
            width=like.width, height=like.height, format=like.format, time_base=Fraction(1, 1000)
        )
        scale = self._graph.add("scale", f"{width}:{height}:flags=bicubic")
        convert, sink = self._graph.add("format", form), self._graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(convert)
        convert.link_to(sink)
        self._graph.configure()

    def takes(self, frame: av.VideoFrame) -> bool:
        return self._kind == _kind_of(frame)

    def scale(self, frame: av.VideoFrame) -> NDArray[Any]:
        self._graph.vpush(frame)
        return np.asarray(self._graph.vpull().to_ndarray())


def _kind_of(frame: av.VideoFrame) -> tuple[object, ...]:
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _to_bt709(picture: NDArray[np.uint8], primaries: ColorPrimaries) -> NDArray[np.uint8]:
    """Converts colours of a wider gamut to BT.709's primaries; colours outside of BT.709's gamut are clipped."""
    linear = _LINEAR[picture] @ _wide_to_bt709(primaries).T
    steps = len(_ENCODED) - 1
    return _ENCODED[(linear.clip(0.0, 1.0) ** 0.5 * steps + 0.5).astype(np.int32)]


_LINEAR = (np.linspace(0.0, 1.0, 256) ** SCREEN_GAMMA).astype(np.float32)
_ENCODED = (255 * np.linspace(0.0, 1.0, 1 << 14) ** (2 / SCREEN_GAMMA)).round().astype(np.uint8)  # by the square root


@cache
def _wide_to_bt709(primaries: ColorPrimaries) -> NDArray[np.float32]:
    return (np.linalg.inv(_to_xyz(BT709_PRIMARIES)) @ _to_xyz(WIDE_PRIMARIES[primaries])).astype(np.float32)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    """The matrix from linear RGB to XYZ: its columns are the primaries, scaled so that their sum is white."""

    def xyz(x: float, y: float) -> NDArray[np.float64]:
        return np.array([x / y, 1.0, (1 - x - y) / y])

    columns = np.stack([xyz(*point) for point in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz(*WHITE_D65))
