"""Reads clips that are folders of pictures, `NAME/images/*.png` with `NAME/masks/*.png`, as the TikTok data set has.

Each becomes `NAME.rgb.mkv` and `NAME.mask.mkv`, without loss, in a folder among the side files, with links to the other
files of `videos.folder`. So every later stage reads videos alone, and a changed picture is a changed video.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.writing.picture_problem import problem_file
from dreamdance.data.writing.video_list import choose_listed, read_list
from dreamdance.errors import is_transient
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
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BLACK: Colour = (0, 0, 0)


def find_picture_folders(folder: Path | str) -> list[str]:
    """The names of the subfolders that contain a folder `images`, in alphabetical order; hidden ones are ignored."""
    return sorted(path.parent.name for path in Path(folder).glob("*/images") if path.parent.name[0] != ".")


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
    """Pictures of one size that are read when they are asked for."""

    def __init__(self, paths: Sequence[Path], background: Colour, on_read: Callable[[str], None]) -> None:
        self.paths, self.brightest = paths, 0
        self._background, self._on_read = background, on_read
        self._size = self._read(0).shape

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
            raise VideoError(
                f"{self.paths[index]} is {sizes[0]}, {self.paths[0].name} {sizes[1]}; the pictures of a clip have one "
                "size"
            )
        self.brightest = max(self.brightest, int(picture.max()))
        return picture

    def _read(self, index: int) -> NDArray[np.uint8]:
        self._on_read(f"picture {index} of {len(self.paths)}")
        return read_picture(self.paths[index], background=self._background)


def _pack(source: VideosSource, name: str, target: Path, on_read: Callable[[str], None]) -> None:
    """Makes the videos of one folder, or notes why it cannot; does nothing if its files have not changed since."""
    folder, note, problem = Path(source.folder).absolute() / name, target / f".{name}.json", problem_file(target, name)
    videos = {kind: target / f"{name}.{kind}.mkv" for kind in ("rgb", "mask")}
    images, masks = (_list_pictures(folder / kind) for kind in ("images", "masks"))
    state = _describe([*images, *masks])
    is_whole = problem.exists() or videos["mask"].exists() == bool(masks)
    if _is_as_noted(note, state) and videos["rgb"].exists() and is_whole:
        return
    for path in (note, problem):
        remove(path)
    try:
        ordered = _order(folder / "images", images)
        write_video(videos["rgb"], _Pictures(ordered, WHITE, on_read), fps=source.images_fps, lossless=True)
        if masks or (folder / "masks").is_dir():
            pictures = _Pictures(_match(folder, ordered, masks), BLACK, on_read)
            write_video(videos["mask"], pictures, fps=source.images_fps, lossless=True)
            if pictures.brightest == 1:
                raise VideoError(f"{folder / 'masks'} has the values 0 and 1; accepted are 0 and 255")
        else:
            remove(videos["mask"])
    except (PictureError, VideoError) as error:
        if is_transient(error):
            raise
        remove(videos["mask"])
        write_atomically(problem, str(error))
        write_atomically(videos["rgb"], "")  # so that the clip is found, and is reported as damaged
    write_atomically(note, json.dumps(state))


def _list_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def _order(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """The pictures of a clip by their numbers; by their names if a name is no number.

    Raises:
        VideoError: there are none, or two have the same number.
    """
    if not paths:
        raise VideoError(f"{folder} contains no pictures ({', '.join(SUFFIXES)})")
    if not all(path.stem.isdecimal() for path in paths):
        return list(paths)
    ordered = sorted(paths, key=lambda path: int(path.stem))
    numbers = [int(path.stem) for path in ordered]
    for path, number, following in zip(ordered, numbers, numbers[1:], strict=False):
        if number == following:
            raise VideoError(f"{folder} has two pictures with the number {number}: keep one")
        if following != number + 1 and following - number != numbers[1] - numbers[0]:
            logger.warning("%s: no picture is between %s and number %d", printable(folder), path.name, following)
            break
    return ordered


def _match(folder: Path, images: Sequence[Path], masks: Sequence[Path]) -> list[Path]:
    """The mask of each picture.

    Raises:
        VideoError: a picture has no mask, or a mask has no picture.
    """
    by_stem = {path.stem: path for path in masks}
    if absent := [path.stem for path in images if path.stem not in by_stem]:
        raise VideoError(
            f"{folder / 'masks'} has no mask for {len(absent)} of {len(images)} pictures, such as {absent[0]}; give "
            "all masks, or remove the folder so that they are computed"
        )
    if spare := sorted(set(by_stem).difference(path.stem for path in images)):
        raise VideoError(f"{folder / 'images'} has no picture for {len(spare)} masks, such as {spare[0]}")
    return [by_stem[path.stem] for path in images]


def _describe(paths: Sequence[Path]) -> list[Any]:
    """Everything that changes when a picture is changed, added or removed."""
    stamps = [FileStamp.from_stat(path.stat() if path.exists() else path.lstat()) for path in paths]
    places = [f"{path.parent.name}/{path.name}" for path in paths]
    return [
        VERSION,
        *([place, one.size, one.mtime_ns, one.ctime_ns] for place, one in zip(places, stamps, strict=True)),
    ]


def _is_as_noted(note: Path, state: Sequence[Any]) -> bool:
    try:
        return bool(json.loads(note.read_text(encoding="utf-8")) == state)
    except (FileNotFoundError, ValueError):
        return False


def _link(folder: Path, target: Path, others: Sequence[str], names: Sequence[str]) -> None:
    """Links the other files, and removes what belongs to files and folders that are gone."""
    for name in others:
        with contextlib.suppress(FileExistsError):
            (target / name).symlink_to(folder.absolute() / name)
    packed = {f"{name}.{kind}.mkv" for name in names for kind in ("rgb", "mask")}
    for path in target.iterdir():
        if path.name[0] != "." and not (path.is_symlink() and path.name in others) and path.name not in packed:
            remove(path)
