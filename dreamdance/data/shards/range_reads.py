"""Reads parts of one sample from an MDS file: its head, and ranges of its frames. It reads nothing else of the file.

MDS keeps a table of the samples at the head of the file: their number n, then n + 1 offsets, all uint32. A sample
begins with the sizes of its columns of variable width. The rest of the format is the library's own business.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dreamdance.data.shards.tracks import MAX_HEAD_BYTES, TRACK_COLUMNS, ClipHead, Extent, read_head
from dreamdance.errors import ShardError
from dreamdance.runs.file_states import FileStamp

# A first read of this size contains the whole head of most clips; the head of a longer clip costs a second read.
FIRST_READ_BYTES = 8192
# Files that a process keeps open. A sample is read by six or more calls from one file; samples come from any file.
MAX_OPEN_FILES = 8

_SIZES = struct.Struct(f"<{sum(kind in ('bytes', 'str') for kind in TRACK_COLUMNS.values())}I")
_VERSION_BYTES = 8


@dataclass(frozen=True)
class SampleHead:
    """The head of a sample, and where the bytes of its frames begin in the file."""

    clip: ClipHead
    frames_start: int


def read_sample_head(path: Path, position: int, *, where: str) -> SampleHead:
    """Reads the head of a sample of schema 2.

    Args:
        path: the MDS file, whose table of samples was compared with the index (`shard_files.compare_file`).
        position: the number of the sample in the file.
        where: the sample's place, for error texts.

    Raises:
        ShardError: the head is damaged, or the sizes of the columns contradict one another.
        OSError: the file is missing or cannot be read.
    """
    file = _opened(path)
    begin, end = struct.unpack("<II", _read(file, 8, 4 + 4 * position, where))
    data = file.read(min(FIRST_READ_BYTES, max(end - begin, 0)), begin)
    if len(data) < _SIZES.size:
        raise ShardError(f"{where} is damaged: it has no sizes of columns")
    head_bytes, id_bytes, frames_bytes = _SIZES.unpack_from(data)
    if _SIZES.size + head_bytes + id_bytes + frames_bytes + _VERSION_BYTES != end - begin:
        raise ShardError(f"{where} is damaged: its columns have another size than the sample")
    if head_bytes > MAX_HEAD_BYTES:
        raise ShardError(f"{where} is damaged: its head has {head_bytes} bytes, accepted are {MAX_HEAD_BYTES}")
    missing = _SIZES.size + head_bytes - len(data)
    if missing > 0:
        data += _read(file, missing, begin + len(data), where)
    head = read_head(data[_SIZES.size : _SIZES.size + head_bytes], frames_bytes=frames_bytes, where=where)
    return SampleHead(head, begin + _SIZES.size + head_bytes + id_bytes)


def read_extents(path: Path, head: SampleHead, extents: Sequence[Extent], *, where: str) -> list[bytes]:
    """Reads frames of a sample and compares each with its CRC-32; frames that follow one another are read at once.

    Raises:
        ShardError: a frame is damaged.
        OSError: the file is missing or cannot be read.
    """
    payloads, file = list[bytes](), _opened(path)
    for run in _runs(extents):
        start = run[0].start
        data = memoryview(_read(file, run[-1].start + run[-1].size - start, head.frames_start + start, where))
        payloads += [check_extent(data[extent.start - start :][: extent.size], extent, where=where) for extent in run]
    return payloads


def check_sample(sample: Mapping[str, Any], *, where: str) -> ClipHead:
    """Compares a whole sample, as the library reads it, with its checksums; returns its head.

    Raises:
        ShardError: a part of it is damaged.
    """
    frames = memoryview(sample["frames"])
    head = read_head(sample["clip"], frames_bytes=len(frames), where=where)
    for track in head.tracks:
        for extent in map(track.extent, range(len(track.rows))):
            payload = frames[extent.start : extent.start + extent.size]
            check_extent(payload, extent, where=f"{where} (clip '{head.clip_id}')")
    return head


def check_extent(payload: memoryview, extent: Extent, *, where: str) -> bytes:
    """Returns the bytes of a frame if they match its CRC-32.

    Raises:
        ShardError: they do not.
    """
    if len(payload) != extent.size or zlib.crc32(payload) != extent.checksum:
        raise ShardError(f"{where}, {extent.name} does not match its checksum; the shard is damaged")
    return bytes(payload)


def _runs(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Groups of extents that follow one another in the file."""
    run: list[Extent] = []
    for extent in extents:
        if run and run[-1].start + run[-1].size != extent.start:
            yield run
            run = []
        run.append(extent)
    if run:
        yield run


class _OpenFile:
    """A file that is open for reading until nothing refers to this object."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Else the kernel reads ahead what nobody asks for.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never opened, or the process ends
            os.close(self._descriptor)

    def read(self, size: int, start: int) -> bytes:
        """Up to `size` bytes; a position of its own in each call, so that threads and forked processes may share it."""
        return os.pread(self._descriptor, size, start)


def _opened(path: Path) -> _OpenFile:
    return _open(path, FileStamp.of(path))


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open(path: Path, stamp: FileStamp) -> _OpenFile:
    """Opens a file once for all reads; a file that was changed or replaced has another stamp and is opened again."""
    return _OpenFile(path)


def _read(file: _OpenFile, size: int, start: int, where: str) -> bytes:
    """Reads exactly `size` bytes; one call of the kernel may return fewer."""
    pieces, left = list[bytes](), size
    while left > 0:
        piece = file.read(left, start + size - left)
        if not piece:
            raise ShardError(f"{where} is damaged: the file ends {left} bytes too early")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
