"""Draws labelled grids of pictures for training samples, results and evaluations. It takes arrays and texts alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Narrower pictures are enlarged by a whole factor with nearest neighbour, so that every pixel stays visible.
SMALLEST_SIDE = 112

_MARGIN = 4
_TITLE_SIZE = 15
_BACKGROUND, _INK, _FAINT_INK, _LINE = (250, 250, 250), (25, 25, 25), (110, 110, 110), (200, 200, 200)


@dataclass(frozen=True)
class GridRow:
    """One line of a grid.

    Attributes:
        label: written to the left; a second line after a newline is fainter.
        pictures: `H W 3` uint8, all of one size over the whole grid; None leaves a gap.
        rule_above: whether a line separates it from the row before (a new clip).
    """

    label: str
    pictures: Sequence[NDArray[np.uint8] | None]
    rule_above: bool = False


def draw_grid(
    rows: Sequence[GridRow], *, titles: Sequence[str] = (), smallest_width: int = SMALLEST_SIDE
) -> NDArray[np.uint8]:
    """Draws rows of pictures with their labels to the left and titles of the columns above.

    Args:
        rows: at least one picture among them.
        titles: one for each column, or none.
        smallest_width: narrower pictures are enlarged to at least this.

    Returns:
        `H W 3` uint8.
    """
    height, width = next(picture.shape[:2] for row in rows for picture in row.pictures if picture is not None)
    factor = max(1, math.ceil(smallest_width / width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=_TITLE_SIZE)
    left = max(_text_width(font, line) for row in rows for line in row.label.split("\n")) + 3 * _MARGIN
    top = _TITLE_SIZE + 3 * _MARGIN if titles else _MARGIN
    columns = max(len(row.pictures) for row in rows)
    size = (left + columns * (width + _MARGIN), top + len(rows) * (height + _MARGIN))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        middle = left + column * (width + _MARGIN) + width // 2
        draw.text((middle, top // 2), title, fill=_INK, font=font, anchor="mm")
    for index, row in enumerate(rows):
        y = top + index * (height + _MARGIN)
        if row.rule_above:
            draw.line([(0, y - _MARGIN // 2), (size[0], y - _MARGIN // 2)], fill=_LINE, width=2)
        for line, text in enumerate(row.label.split("\n")):
            place = (_MARGIN, y + height // 2 + line * (_TITLE_SIZE + 4))
            draw.text(place, text, fill=_FAINT_INK if line else _INK, font=font, anchor="lm")
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
                canvas.paste(Image.fromarray(enlarged), (left + column * (width + _MARGIN), y))
    return np.asarray(canvas)


def _text_width(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> int:
    return math.ceil(font.getlength(text))
