"""The sizes at which a set may be stored: the largest, that of its frames, and smaller ones of the same aspect."""

from collections.abc import Sequence

Size = tuple[int, int]


def smaller_sizes_problem(frames: Size, sizes: Sequence[Size]) -> str | None:
    """Why frames cannot be stored at further sizes too; None if they can.

    Key points are fractions of the frame, so every size shows the whole frame: `media.cropping.centred_crop` cuts
    nothing off.

    Args:
        frames: width and height of the frames.
        sizes: the further widths and heights.
    """
    width, height = frames
    for place, (to_width, to_height) in enumerate(sizes):
        if (to_width, to_height) in sizes[:place]:
            return f"{to_width}x{to_height} is given twice"
        same_aspect = round(height * to_width / to_height) == width or round(width * to_height / to_width) == height
        if to_width >= width or to_height >= height or not same_aspect:
            fitting = min(to_width, width - 1)
            return (
                f"{to_width}x{to_height} is not smaller than the frames ({width}x{height}) with the same aspect; "
                f"{fitting}x{max(1, round(height * fitting / width))} would be"
            )
    return None
