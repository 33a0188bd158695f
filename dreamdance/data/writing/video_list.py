"""Chooses among the videos of a folder by a list of names (`videos.list`), such as the ids of TikTok videos."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from dreamdance.data.writing.video_clips import find_videos
from dreamdance.errors import MissingInputError, UserError
from dreamdance.media.video_names import VIDEO_SUFFIXES
from dreamdance.recipe.schema import VideosSource

SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Titles of the column with the names in a table, without spaces and signs; the first one that is there is taken.
TITLES = ("url", "videourl", "webvideourl", "link", "videoid", "itemid", "id", "videoname", "filename", "file", "name")
# The address of a TikTok video: https://www.tiktok.com/@user/video/6875468410612993286?lang=en
ADDRESS = re.compile(r"https?://\S*tiktok\S*/(?:video|v)/([0-9]+)")


def read_list(path: Path | str) -> list[str]:
    """The names in a list, one in each line; `#` begins a comment.

    In a table (.csv or .tsv) the names are in the column `id`, `url` or similar, else in the first one. A name may be
    given as the address of a TikTok video, which ends in the id, or with the suffix of a video's file.

    Raises:
        MissingInputError: there is no such file.
        UserError: it is no text.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"`videos.list` {path} is no text in UTF-8: {error}") from error
    except OSError as error:
        raise MissingInputError(f"`videos.list` {path.absolute()} cannot be read: {error.strerror}") from error
    if (separator := SEPARATORS.get(path.suffix.lower())) is not None:
        found = _column(list(csv.reader(lines, delimiter=separator)))
    else:
        found = [line if ADDRESS.search(line) else line.partition("#")[0] for line in lines]
    return sorted({name for text in found if (name := _to_name(text.strip()))})


def _column(rows: Sequence[Sequence[str]]) -> list[str]:
    """The cells with the names in a table with or without a line of titles."""
    rows = [row for row in rows if row]
    titles = [re.sub("[^a-z]", "", cell.lower()) for cell in rows[0]] if rows else []
    for title in TITLES:
        if title in titles:
            place = titles.index(title)
            return [row[place] for row in rows[1:] if place < len(row)]
    return [row[0] for row in rows if not row[0].startswith("#")]


def _to_name(text: str) -> str:
    if address := ADDRESS.search(text):
        return address[1]
    stem, dot, suffix = text.rpartition(".")
    return stem if f"{dot}{suffix.lower()}" in VIDEO_SUFFIXES else text


def choose_listed(source: VideosSource, names: Sequence[str]) -> list[str]:
    """Those of the names that `videos.list` contains; all if the recipe has no list.

    Raises:
        MissingInputError: none of them is in the list.
    """
    if source.list is None:
        return list(names)
    wanted = read_list(source.list)
    if chosen := sorted(set(names).intersection(wanted)):
        return chosen
    examples = f"; such as {wanted[0]} in the list and {names[0]} in the folder" if wanted and names else ""
    raise MissingInputError(
        f"none of the {len(wanted)} names in {Path(source.list).absolute()} (`videos.list`) is one of the {len(names)} "
        f"videos in {Path(source.folder).absolute()} (`videos.folder`){examples}. A line contains a file's name "
        "without its suffix"
    )


def missing_names(source: VideosSource, names: Sequence[str]) -> list[str]:
    """The names in `videos.list` that no video has."""
    return [] if source.list is None else sorted(set(read_list(source.list)).difference(names))


def listed_videos(source: VideosSource) -> list[str]:
    """The names of the videos in the folder that the recipe uses, in alphabetical order.

    Raises:
        MissingInputError: there are none.
    """
    return choose_listed(source, find_videos(source.folder, plain=source.annotators is not None))
