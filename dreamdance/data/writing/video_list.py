"""Chooses among the videos of a folder by a list of names (`videos.list`), such as the ids of TikTok videos."""

from collections.abc import Sequence
from pathlib import Path

from dreamdance.data.writing.video_clips import find_videos
from dreamdance.errors import MissingInputError, UserError
from dreamdance.recipe.schema import VideosSource


def read_list(path: Path | str) -> list[str]:
    """The names in a list: one in each line, without the file's suffix; `#` begins a comment.

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
    return sorted({name for line in lines if (name := line.partition("#")[0].strip())})


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
