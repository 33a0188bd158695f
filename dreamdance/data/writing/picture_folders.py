"""Reads clips that are folders of pictures, `NAME/images/*.png` with `NAME/masks/*.png`, as the TikTok data set has.

Each becomes `NAME.rgb.mkv` and `NAME.mask.mkv`, without loss, in a folder among the side files, with links to the other
files of `videos.folder`. So every later stage reads videos alone, and a changed picture is a changed video.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.writing.map_files import candidate_files, present_files
from dreamdance.data.writing.picture_problem import problem_file
from dreamdance.data.writing.video_list import choose_listed, read_list
from dreamdance.errors import is_transient
from dreamdance.media.picture_names import PICTURE_SUFFIXES, find_picture_folders, list_pictures, packed_names
from dreamdance.media.pictures import WHITE, Colour, PictureError, read_picture
from dreamdance.media.video import VideoError, write_video
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import remove, write_atomically
from dreamdance.runs.work_queue import WorkQueue

logger = logging.getLogger(__name__)

# Increase it when the code makes other videos of the same pictures.
VERSION = 1
BLACK: Colour = (0, 0, 0)
# Of a picture within its clip.
Place = tuple[int | str, ...]


def with_packed_pictures(source: VideosSource, side_files: Path, queue: WorkQueue) -> VideosSource:
    """Makes videos of all folders of pictures with the other processes; what exists is not made again.

    Args:
        source: the folder of videos and folders of pictures.
        side_files: the folder of the results of annotators.
        queue: the processes share the folders by it.

    Returns:
        The source with the folder of videos that were made; unchanged if it has no folders of pictures.

    Raises:
        MissingInputError: none of the folders is in `videos.list`, and there are no videos.
    """
    names = find_picture_folders(source.folder) if source.annotators is not None else []
    if not names:
        return source
    key = hashlib.sha256(f"{Path(source.folder).absolute()} {source.images_fps}".encode("utf-8", "surrogateescape"))
    target = side_files.absolute() / f".pictures-{key.hexdigest()[:12]}"
    others = [path.name for path in Path(source.folder).glob("*.*") if path.name[0] != "." and not path.is_dir()]
    if not others:
        choose_listed(source, names)  # raises if the list has none of them
    wanted = names if source.list is None else read_list(source.list)
    chosen = [name for name in names if name in set(wanted)]
    target.mkdir(parents=True, exist_ok=True)
    share = queue.share("pictures", chosen)
    for name in share.take():
        if name is not None:
            _pack(source, name, target, partial(queue.watchdog.enter, f"reading {printable(name)}"))
            share.finish(name)
    queue.once("picture folders", lambda: _link(Path(source.folder), target, others, names))
    return source.model_copy(update={"folder": str(target)})


class _Pictures(Sequence[NDArray[np.uint8]]):
    """Pictures of one size that are read when they are asked for; the size is the first one's, or that of others."""

    def __init__(
        self,
        paths: Sequence[Path],
        background: Colour,
        on_read: Callable[[str], None],
        *,
        like: "_Pictures | None" = None,
    ) -> None:
        self.paths, self.brightest = paths, 0
        self._background, self._on_read = background, on_read
        self._first: Path = paths[0] if like is None else like.paths[0]
        self._size: tuple[int, ...] = self._read(0).shape if like is None else like._size

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.uint8]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | Sequence[NDArray[np.uint8]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        picture = self._read(index)
        if picture.shape != self._size:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (picture.shape, self._size)]
            other = f"{self._first.parent.name}/{self._first.name}"
            raise VideoError(
                f"{self.paths[index]} is {sizes[0]}, {other} {sizes[1]}; the pictures and masks of a clip have one size"
            )
        self.brightest = max(self.brightest, int(picture.max()))
        return picture

    def _read(self, index: int) -> NDArray[np.uint8]:
        self._on_read(f"picture {index} of {len(self.paths)}")
        return read_picture(self.paths[index], background=self._background)


def _pack(source: VideosSource, name: str, target: Path, on_read: Callable[[str], None]) -> None:
    """Makes the videos of one folder, or notes why it cannot; does nothing if its files have not changed since."""
    folder, note, problem = Path(source.folder).absolute() / name, _note_file(target, name), problem_file(target, name)
    packed = packed_names(source.folder, name)
    rgb, *mask = (target / file for file in packed)
    images, masks = (list_pictures(folder / kind) for kind in ("images", "masks"))
    files = candidate_files(source.folder, name, plain=True)
    given = [path for kind in ("rgb", "mask")[: len(packed)] for path in present_files(files[kind])]
    state = _describe([*images, *masks, *given])
    if _is_as_noted(note, state) and (problem.exists() or all(map(_is_made, (rgb, *mask)))):
        return
    for path in (note, problem, *(target / f"{name}.{kind}.mkv" for kind in ("rgb", "mask"))):
        remove(path)  # a link to a given mask is made again
    try:
        if given:
            raise VideoError(f"{folder.parent} has {given[0].name} and pictures in {name}: keep what shall be read")
        ordered = _order(folder / "images", images)
        _report_gap(folder / "images", list(ordered.values()))
        pictures = _Pictures(list(ordered.values()), WHITE, on_read)
        write_video(rgb, pictures, fps=source.images_fps, lossless=True)
        for path in mask:
            values = _Pictures(_match(folder, ordered, masks), BLACK, on_read, like=pictures)
            write_video(path, values, fps=source.images_fps, lossless=True)
            if values.brightest == 1:
                raise VideoError(f"{folder / 'masks'} has the values 0 and 1; accepted are 0 and 255")
    except (PictureError, VideoError) as error:
        if is_transient(error):
            raise
        for path in mask:
            remove(path)
        write_atomically(problem, str(error))
        write_atomically(rgb, "")  # so that the clip is found, and is reported as damaged
    write_atomically(note, json.dumps(state))


def _is_made(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _order(folder: Path, paths: Sequence[Path]) -> dict[Place, Path]:
    """The pictures of a clip in the order of their places.

    Raises:
        VideoError: there are none, or two have the same place.
    """
    if not paths:
        raise VideoError(f"{folder} contains no pictures ({', '.join(PICTURE_SUFFIXES)})")
    ordered: dict[Place, Path] = {}
    for place, path in sorted((_place(path), path) for path in paths):
        if place in ordered:
            raise VideoError(f"{folder} has {ordered[place].name} and {path.name} for one frame: keep one")
        ordered[place] = path
    return ordered


def _place(path: Path) -> Place:
    """The place of a picture, and of its mask: texts and numbers in turn, so that 2 and f2 come before 10 and f10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.stem))


def _report_gap(folder: Path, paths: Sequence[Path]) -> None:
    """Warns about the first missing number among pictures that have numbers as names."""
    if not all(path.stem.isdecimal() for path in paths):
        return
    numbers = [int(path.stem) for path in paths]
    for path, number, following in zip(paths, numbers, numbers[1:], strict=False):
        if following != number + 1 and following - number != numbers[1] - numbers[0]:
            logger.warning("%s: no picture is between %s and number %d", printable(folder), path.name, following)
            break


def _match(folder: Path, images: Mapping[Place, Path], masks: Sequence[Path]) -> list[Path]:
    """The mask of each picture.

    Raises:
        VideoError: a picture has no mask, or a mask has no picture.
    """
    found = _order(folder / "masks", masks) if masks else {}
    if absent := [path.stem for place, path in images.items() if place not in found]:
        raise VideoError(
            f"{folder / 'masks'} has no mask for {len(absent)} of {len(images)} pictures, such as {absent[0]}; give "
            "all masks, or remove the folder so that they are computed"
        )
    if spare := [path.stem for place, path in found.items() if place not in images]:
        raise VideoError(f"{folder / 'images'} has no picture for {len(spare)} masks, such as {spare[0]}")
    return [found[place] for place in images]


def _describe(paths: Sequence[Path]) -> list[Any]:
    """Everything that changes when a picture is changed, added or removed."""
    stamps = [FileStamp.from_stat(path.stat() if path.exists() else path.lstat()) for path in paths]
    places = [f"{path.parent.name}/{path.name}" for path in paths]
    return [
        VERSION,
        *([place, one.size, one.mtime_ns, one.ctime_ns] for place, one in zip(places, stamps, strict=True)),
    ]


def _note_file(target: Path, name: str) -> Path:
    return target / f".{name}.json"


def _is_as_noted(note: Path, state: Sequence[Any]) -> bool:
    try:
        return bool(json.loads(note.read_text(encoding="utf-8")) == state)
    except (FileNotFoundError, ValueError):
        return False


def _link(folder: Path, target: Path, others: Sequence[str], names: Sequence[str]) -> None:
    """Removes what belongs to files and folders that are gone, and links the other files."""
    kept = {file for name in names for file in packed_names(folder, name)}
    kept.update(path.name for name in names for path in (_note_file(target, name), problem_file(target, name)))
    for path in target.iterdir():
        if path.name not in kept and not (path.is_symlink() and path.name in others):
            remove(path)
    for name in others:
        with contextlib.suppress(FileExistsError):
            (target / name).symlink_to(folder.absolute() / name)
