"""Writes videos: H.264 for viewing, FFV1 without loss."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray

from dreamdance.media.video_container import VideoError
from dreamdance.runs.files import replace_atomically

LOSSLESS_SUFFIX = ".mkv"
# Equal frames make equal files, on any number of cores. Without `mbtree` (rates by what later frames predict from a
# block): its AVX-512 code in x264 165 gives other rates with other contents of the memory, so files differed from
# process to process. With one thread: the number of threads, by default that of the cores, changes the result too.
_H264_OPTIONS = {"preset": "medium", "mbtree": "0", "threads": "1"}
AVCOL_SPC_BT709 = 1  # FFmpeg's name of the matrix; PyAV's `Colorspace` holds the scaler's own numbers


def write_video(
    path: Path | str,
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8] | NDArray[np.uint16],
    *,
    fps: float,
    lossless: bool = False,
    crf: int = 18,
) -> None:
    """Writes a video; it appears under its name when it is complete. Equal frames make equal files.

    Args:
        path: `.mp4`, or `.mkv` for a lossless one.
        frames: `(H, W, 3)` uint8 each. H.264 needs even sizes: an odd one grows by repeating its last row or column.
        fps: frames per second.
        lossless: write FFV1 in RGB instead, from which exactly these frames (of any size) are read back. Frames
            `(H, W)` uint16 are written as 16-bit grey, for depth.
        crf: H.264's quality, smaller is better; 18 looks like the original.

    Raises:
        VideoError: there are no frames, their shapes differ or are wrong, the suffix is wrong, or the disk is full.
    """
    path = Path(path)
    suffix = LOSSLESS_SUFFIX if lossless else ".mp4"
    if path.suffix != suffix:
        raise VideoError(f"{path}: the name of {'a lossless' if lossless else 'an H.264'} video ends in {suffix}")
    if len(frames) == 0:
        raise VideoError(f"{path}: there are no frames to write")
    first = np.asarray(frames[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        options = {"fflags": "+bitexact"}  # no random identifiers, no versions
        with replace_atomically(path) as temporary, av.open(str(temporary), "w", options=options) as container:
            rate = Fraction(fps).limit_denominator(1 << 16)
            stream = container.add_stream("ffv1", rate) if lossless else container.add_stream("libx264", rate)
            stream.height, stream.width = (size + (0 if lossless else size % 2) for size in first.shape[:2])
            if lossless:
                stream.pix_fmt = "gray16le" if first.ndim == 2 else "bgr0"
                stream.options = {"level": "3", "slicecrc": "1"}  # so that a reader notices damage
            else:
                stream.pix_fmt = "yuv420p"
                stream.options = {**_H264_OPTIONS, "crf": str(crf)}
                _tag(stream.codec_context)
            for number, frame in enumerate(frames):
                picture = _check_frame(np.asarray(frame), first, lossless=lossless, where=f"{path}: frame {number}")
                container.mux(stream.encode(_lossless_frame(picture) if lossless else _bt709_frame(picture)))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise VideoError(f"{path} cannot be written: {error.strerror}") from error


def _check_frame(frame: NDArray[Any], like: NDArray[Any], *, lossless: bool, where: str) -> NDArray[Any]:
    is_picture = frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8
    is_grey16 = frame.ndim == 2 and frame.dtype == np.uint16 and lossless
    if frame.shape != like.shape or not (is_picture or is_grey16):
        accepted = "(H, W, 3) uint8 or (H, W) uint16" if lossless else "(H, W, 3) uint8"
        raise VideoError(f"{where} is {frame.shape} {frame.dtype}; expected {accepted} like the first, {like.shape}")
    return np.ascontiguousarray(frame)


def _lossless_frame(picture: NDArray[Any]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(picture, format="gray16le" if picture.ndim == 2 else "rgb24")


def _bt709_frame(picture: NDArray[np.uint8]) -> av.VideoFrame:
    """Converts to BT.709's YUV in limited range and sets the tags; without tags players guess by the frames' size."""
    picture = np.pad(picture, [(0, size % 2) for size in picture.shape[:2]] + [(0, 0)], mode="edge")
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )
    _tag(frame)
    return frame


def _tag(target: av.VideoFrame | VideoCodecContext) -> None:
    target.color_primaries, target.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    target.colorspace, target.color_range = AVCOL_SPC_BT709, ColorRange.MPEG
