"""Maps of a clip as an array in an .npz file: depth in metres, unit normals, masks, without loss.

The file may be hostile: nothing is unpickled, and sizes are checked before memory is allocated. Frames are read one
after the other, so a file may be larger than the memory.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.archive_entry import ArchiveEntry
from dreamdance.media.video_container import MAX_FRAME_PIXELS, MAX_VIDEO_FRAMES, VideoError

# For each map the accepted arrays: name -> (types, channels).
_FLOATS = ("float16", "float32", "float64")
ACCEPTED: dict[str, dict[str, tuple[tuple[str, ...], int]]] = {
    "depth": {"depth": (_FLOATS, 1), "disparity": ((*_FLOATS, "uint16"), 1)},
    "normal": {"normal": ((*_FLOATS, "uint8"), 3)},
    "mask": {"mask": (("bool", "uint8"), 1)},
}
_BLOCK_BYTES = 1 << 20
_LENGTH_TOLERANCE = 0.1  # of unit normals


@dataclass(frozen=True)
class MapArray:
    """An array of an .npz file, found and checked but not read.

    Attributes:
        key: name of the array: `depth` (distance, positive, any unit), `disparity` (larger is nearer), `normal` (unit
            vectors: x right, y up, z towards the camera; or their encoding in uint8, (n+1)/2), `mask` (True or 255).
        num_frames, height, width: its shape `(f, H, W)`; normals are `(f, H, W, 3)`.
    """

    path: Path
    key: str
    num_frames: int
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    # Where the array is in the file, and the length of its header.
    entry: ArchiveEntry = field(compare=False, repr=False)
    header_bytes: int


def open_map_array(path: Path | str, modality: str) -> MapArray:
    """Finds the array of a modality in an .npz file, and reads through it once to compare its checksum.

    Raises:
        VideoError: the file is damaged, or has no array of an accepted name, type and shape; names what is accepted.
    """
    path = Path(path)
    if modality not in ACCEPTED:
        raise VideoError(
            f"{path}: a map of {modality} is read from a video; accepted as .npz are {', '.join(ACCEPTED)}"
        )
    accepted = ACCEPTED[modality]
    with _opened(path) as archive:
        names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found = [name for name in accepted if name in names]
        if len(found) != 1:
            wanted = " or ".join(f"'{name}' ({', '.join(types)})" for name, (types, _) in accepted.items())
            raise VideoError(f"{path} has the arrays {sorted(names)[:8]}; exactly one is accepted: {wanted}")
        info = names[found[0]]
        with archive.open(info) as file:
            shape, dtype = _read_header(file, path)
            types, channels = accepted[found[0]]
            expected = 3 if channels == 1 else 4
            if dtype.name not in types or len(shape) != expected or (channels == 3 and shape[-1] != 3):
                form = "(frames, height, width)" if channels == 1 else "(frames, height, width, 3)"
                raise VideoError(
                    f"{path}: '{found[0]}' is {dtype.name} of shape {shape}; accepted is {form} of {', '.join(types)}"
                )
            if not 0 < shape[0] <= MAX_VIDEO_FRAMES or not 0 < shape[1] * shape[2] <= MAX_FRAME_PIXELS:
                raise VideoError(
                    f"{path}: '{found[0]}' has shape {shape}; accepted are up to {MAX_VIDEO_FRAMES} frames of up to "
                    f"{MAX_FRAME_PIXELS} pixels"
                )
            header_bytes = file.tell()
            size = header_bytes + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if info.file_size != size:
                raise VideoError(f"{path}: '{found[0]}' has {info.file_size} bytes, its shape {shape} needs {size}")
            while file.read(_BLOCK_BYTES):  # at the end the archive compares the checksum
                pass
        entry = ArchiveEntry.of(path, info)
    return MapArray(path, found[0], shape[0], shape[1], shape[2], channels, dtype, entry, header_bytes)


def iterate_map_array(array: MapArray, frames: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Reads the chosen frames one after the other.

    Args:
        array: from `open_map_array`.
        frames: frame numbers that do not decrease; repeats are allowed.

    Yields:
        `(H, W)` or `(H, W, 3)` in the array's type.

    Raises:
        VideoError: the file is damaged, or a value is wrong: depth that is not positive, normals that are no unit
            vectors, anything that is not finite.
    """
    if sorted(frames) != list(frames):
        raise ValueError("frames are read in the order of the file; frame numbers must not decrease")
    if frames and not 0 <= frames[0] <= frames[-1] < array.num_frames:
        raise IndexError(f"{array.path} has {array.num_frames} frames; {frames[0]} to {frames[-1]} were asked for")
    shape = (array.height, array.width) if array.channels == 1 else (array.height, array.width, array.channels)
    size = array.dtype.itemsize * int(np.prod(shape))
    with _naming(array.path), array.path.open("rb") as file:
        before, data = -1, b""
        for number in frames:
            if number != before:
                data = array.entry.read(file, array.header_bytes + number * size, size)
                before = number
            if len(data) != size:
                raise VideoError(f"{array.path} changed while it was read: frame {number} is missing")
            frame = np.frombuffer(data, dtype=array.dtype).reshape(shape)
            _check_values(array, frame, number)
            yield frame


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _naming(path), zipfile.ZipFile(path) as archive:
        yield archive


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives errors of damaged files the file's name."""
    try:
        yield
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror or error}") from error
    # zipfile raises the last two for other kinds of compression and for encryption.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise VideoError(f"{path} is damaged or no .npz file: {error}") from error


def _read_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, by_columns, dtype = np.lib.format.read_array_header_2_0(file)
    except ValueError as error:
        raise VideoError(f"{path}: an array has no valid header: {error}") from error
    if dtype.hasobject or by_columns or dtype.byteorder == ">":
        raise VideoError(
            f"{path}: an array is of type {dtype}, by columns: {by_columns}; save it by np.savez from C order"
        )
    return shape, dtype


def _check_values(array: MapArray, frame: NDArray[Any], number: int) -> None:
    where = f"{array.path}: frame {number} of '{array.key}'"
    if array.dtype.kind == "f" and not np.isfinite(frame).all():
        raise VideoError(f"{where} has values that are not finite; fill holes before storing a map")
    if array.key == "depth" and frame.min() <= 0:
        raise VideoError(f"{where} has a depth of {frame.min():g}; positive ones are accepted, holes must be filled")
    if array.key == "normal" and array.dtype.kind == "f":
        lengths = np.linalg.norm(frame.astype(np.float32), axis=-1)
        worst = float(np.abs(lengths - 1).max())
        if worst > _LENGTH_TOLERANCE:
            raise VideoError(
                f"{where} has a vector of length {1 + worst:g} or {1 - worst:g}; unit vectors are accepted"
            )
    if array.key == "mask" and array.dtype.kind == "u" and frame.max() == 1:
        raise VideoError(f"{where} has the values 0 and 1 as uint8; accepted are bool, or 0 and 255")
