"""Writes videos of results as one animated WebP, one below the other, as a README shows them.

    python tools/moving_picture.py .media/demo.webp results/demo/*/side_by_side.mp4

The videos must have equal sizes and frame rates; the longest sets the length, shorter ones keep their last frame. The
file repeats for ever. Exit codes: 0 done, 1 error, such as a file above --max-kilobytes (nothing is written then).
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dreamdance.errors import UserError
from dreamdance.media.video import probe_video, read_frames
from dreamdance.runs.files import replace_atomically


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write, *.webp")
    parser.add_argument("videos", type=Path, nargs="+", help="videos of equal size")
    parser.add_argument("--quality", type=int, default=80, choices=range(1, 101), metavar="1..100", help="of WebP (80)")
    parser.add_argument("--max-kilobytes", type=int, default=1500, help="refuse to write a larger file (1500)")
    options = parser.parse_args(arguments)
    try:
        rates = {float(probe_video(path).fps) for path in options.videos}
        if len(rates) > 1:
            raise UserError(f"the videos have different frame rates: {sorted(rates)}; give videos of one rate")
        frames = stack([read_frames(path) for path in options.videos])
        content = encode(frames, fps=rates.pop(), quality=options.quality)
        if len(content) > 1000 * options.max_kilobytes:
            raise UserError(
                f"the picture would have {len(content) / 1000:.0f} kB, more than --max-kilobytes "
                f"{options.max_kilobytes}: give fewer videos or a lower --quality"
            )
        with replace_atomically(options.out) as temporary:
            temporary.write_bytes(content)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {len(content) / 1000:.0f} kB")
    return 0


def stack(videos: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Videos `f H W 3` of equal sizes, one below the other: `f (n H) W 3`.

    Raises:
        UserError: the sizes differ.
    """
    sizes = {video.shape[1:3] for video in videos}
    if len(sizes) > 1:
        raise UserError(f"the videos have different sizes (height, width): {sorted(sizes)}; give videos of one size")
    length = max(len(video) for video in videos)
    longest = [np.concatenate([video, np.repeat(video[-1:], length - len(video), axis=0)]) for video in videos]
    return np.concatenate(longest, axis=1)


def encode(frames: NDArray[np.uint8], *, fps: float, quality: int) -> bytes:
    """An animated WebP of frames `f H W 3`, repeated for ever."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, quality=quality, method=6
    )
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
