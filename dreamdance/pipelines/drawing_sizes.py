"""Compares the resolution of pose drawings with the one at which networks were trained."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dreamdance.media.cropping import centred_crop

# Drawings that are this many times larger or smaller than the training's pictures give a warning.
MAX_DRAWING_SCALE = 1.5


class DrawingSizeWarning(UserWarning):
    """The networks may not know pose drawings of this resolution."""


def describe_drawing_size(
    drawings: str,
    drawn: tuple[int, int],
    *,
    shown: tuple[int, int],
    trained: tuple[int, int] | None,
    max_scale: float = MAX_DRAWING_SCALE,
) -> str | None:
    """A warning if drawings are much larger or smaller than the pictures of the training, otherwise None.

    DWPose's own program draws limbs 4 pixels wide at any size; this project's are relative to the short side of the
    picture, as if at 512 pixels. Only the resolution of a drawing is known, not which program drew it.

    Args:
        drawings: names them, in the plural.
        drawn: their width and height in pixels.
        shown: width and height of the frames, to whose aspect the drawings are cut.
        trained: width and height at which the networks were trained; if None, `shown` takes its place.
        max_scale: drawings this many times larger give a warning; `math.inf` accepts all larger ones.
    """
    part = centred_crop(*drawn, to_width=shown[0], to_height=shown[1])
    width, height = trained or shown
    scale = min(part.width, part.height) / min(width, height)
    if 1 / MAX_DRAWING_SCALE < scale < max_scale:
        return None
    known = f"the networks were trained at {width}x{height}"
    if trained is None:
        known = f"the frames have {width}x{height} (the export is older and lacks the size at which it was trained)"
    is_cut = (part.width, part.height) != drawn
    return (
        f"{drawings} have {drawn[0]}x{drawn[1]} pixels"
        + (f", of which {part.width}x{part.height} are shown" if is_cut else "")
        + f", and {known}. Limbs that a program draws with a constant width in pixels, as DWPose's does, are then "
        f"{max(scale, 1 / scale):.1f} times {'thinner' if scale > 1 else 'thicker'} than in drawings of that size, and "
        f"the networks may not know them. Draw at {round(drawn[0] / scale)}x{round(drawn[1] / scale)} pixels, or let "
        "this project draw key points ('keypoints' of a manifest, or `dreamdance.media.pose_drawing.draw_poses`)"
    )


def warn_of_drawing_size(
    drawn: Sequence[int],
    *,
    shown: Sequence[int],
    trained: tuple[int | None, int | None],
    larger_too: bool = True,
    stacklevel: int = 4,
) -> None:
    """Warns as `describe_drawing_size`, for the caller of the pipeline that calls this; silent for older exports.

    Args:
        drawn, shown: (height, width) of the drawings and of the frames.
        trained: `default_height` and `default_width` of the pipeline.
        larger_too: whether larger drawings give a warning.
        stacklevel: as in `warnings.warn`; 4 is the user of a pipeline whose `__call__`, under `no_grad`, calls this.
    """
    if trained[0] is None or trained[1] is None:
        return
    problem = describe_drawing_size(
        "the pose drawings",
        (drawn[1], drawn[0]),
        shown=(shown[1], shown[0]),
        trained=(trained[1], trained[0]),
        max_scale=MAX_DRAWING_SCALE if larger_too else math.inf,
    )
    if problem is not None:
        warnings.warn(problem, DrawingSizeWarning, stacklevel=stacklevel)


@contextmanager
def drawings_are_checked() -> Iterator[None]:
    """In the block, pipelines do not warn: the caller has compared the original drawings, and resized them since."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrawingSizeWarning)
        yield
