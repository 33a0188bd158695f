"""Draws contact sheets: one picture of up to 100 clips, with all their maps and scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dreamdance.data.curation.shown_clip import ShownClip, score_texts, strip_frame
from dreamdance.runs.files import replace_atomically

CLIPS_PER_SHEET = 100

_COLUMNS = 4
_PICTURE_HEIGHT = 144
_TEXT_SIZE = 12
_LINE_HEIGHT = 15
_SCORES_PER_LINE = 4
_MARGIN = 6
# Unicode will never give it a meaning, so no font has a glyph for it.
_NO_CHARACTER = "\uffff"
_LARGEST_STRIP = 640  # pixels; strips of wide pictures are reduced to it
_BACKGROUND, _INK, _FAINT_INK = (250, 250, 250), (25, 25, 25), (95, 95, 95)


def draw_tile(clip: ShownClip) -> NDArray[np.uint8]:
    """Draws the middle frame of a clip with all maps, and its name and scores below: `(H, W, 3)` uint8.

    The name of its video is left out if the font, which has English letters alone, cannot show it.
    """
    strip = Image.fromarray(strip_frame(clip, len(clip.maps["rgb"]) // 2, height=_PICTURE_HEIGHT))
    if strip.width > _LARGEST_STRIP:
        strip = strip.resize((_LARGEST_STRIP, round(strip.height * _LARGEST_STRIP / strip.width)))
    font = ImageFont.load_default(size=_TEXT_SIZE)
    scores = score_texts(clip.scores)
    named = f"{clip.clip_id}  {clip.source}"
    lines = [named if _has_glyphs(font, named) else clip.clip_id]
    lines += ["   ".join(scores[start : start + _SCORES_PER_LINE]) for start in range(0, len(scores), _SCORES_PER_LINE)]
    width = max([strip.width, *(round(font.getlength(line)) for line in lines[1:])])
    tile = Image.new("RGB", (width, strip.height + len(lines) * _LINE_HEIGHT + 2), _BACKGROUND)
    tile.paste(strip, (0, 0))
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(lines):
        text = _shorten(line, font, width)
        place = (0, strip.height + 2 + number * _LINE_HEIGHT)
        draw.text(place, text, fill=_FAINT_INK if number else _INK, font=font)
    return np.asarray(tile)


def join_tiles(tiles: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Joins tiles of any sizes to a sheet of four columns, row by row: `(H, W, 3)` uint8.

    Raises:
        ValueError: there is no tile, or more than 100.
    """
    if not 1 <= len(tiles) <= CLIPS_PER_SHEET:
        raise ValueError(f"a contact sheet of {len(tiles)} clips; 1 to {CLIPS_PER_SHEET} are accepted")
    rows = [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]
    width = max(tile.shape[1] for tile in tiles)
    heights = [max(tile.shape[0] for tile in row) for row in rows]
    num_columns = min(_COLUMNS, len(tiles))
    size = (_MARGIN + num_columns * (width + _MARGIN), _MARGIN + sum(heights) + _MARGIN * len(rows))
    sheet = Image.new("RGB", size, _BACKGROUND)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (_MARGIN + column * (width + _MARGIN), top))
        top += height + _MARGIN
    return np.asarray(sheet)


def write_contact_sheet(path: Path, tiles: Sequence[NDArray[np.uint8]]) -> None:
    """Writes a sheet of up to 100 tiles as PNG; it appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        Image.fromarray(join_tiles(tiles)).save(temporary, format="PNG")


def _has_glyphs(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font can show a text; it shows all characters that it lacks as the same box."""
    box = bytes(font.getmask(_NO_CHARACTER))
    return all(bytes(font.getmask(character)) != box for character in set(text))


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
