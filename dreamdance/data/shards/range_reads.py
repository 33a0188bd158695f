"""Reads parts of one sample from an MDS file: its head, and ranges of its frames. It reads nothing else of the file.

MDS keeps a table of the samples at the head of the file: their number n, then n + 1 offsets, all uint32. A sample
begins with the sizes of its columns of variable width. The rest of the format is the library's own business.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamdance.data.shards.tracks import MAX_HEAD_BYTES, TRACK_COLUMNS, ClipHead, Extent, read_head
from dreamdance.errors import ShardError

# A first read of this size contains the whole head of most clips; the head of a longer clip costs a second read.
FIRST_READ_BYTES = 8192

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
    with _opened(path) as descriptor:
        begin, end = struct.unpack("<II", _read(descriptor, 8, 4 + 4 * position, where))
        data = os.pread(descriptor, min(FIRST_READ_BYTES, max(end - begin, 0)), begin)
        if len(data) < _SIZES.size:
            raise ShardError(f"{where} is damaged: it has no sizes of columns")
        head_bytes, id_bytes, frames_bytes = _SIZES.unpack_from(data)
        if _SIZES.size + head_bytes + id_bytes + frames_bytes + _VERSION_BYTES != end - begin:
            raise ShardError(f"{where} is damaged: its columns have another size than the sample")
        if head_bytes > MAX_HEAD_BYTES:
            raise ShardError(f"{where} is damaged: its head has {head_bytes} bytes, accepted are {MAX_HEAD_BYTES}")
        missing = _SIZES.size + head_bytes - len(data)
        if missing > 0:
            data += _read(descriptor, missing, begin + len(data), where)
    head = read_head(data[_SIZES.size : _SIZES.size + head_bytes], frames_bytes=frames_bytes, where=where)
    return SampleHead(head, begin + _SIZES.size + head_bytes + id_bytes)


def read_extents(path: Path, head: SampleHead, extents: Sequence[Extent], *, where: str) -> list[bytes]:
    """Reads frames of a sample and compares each with its CRC-32; frames that follow one another are read at once.

    Raises:
        ShardError: a frame is damaged.
        OSError: the file is missing or cannot be read.
    """
    payloads = list[bytes]()
    with _opened(path) as descriptor:
        for run in _runs(extents):
            start = run[0].start
            data = memoryview(_read(descriptor, run[-1].start + run[-1].size - start, head.frames_start + start, where))
            payloads += [
                check_extent(data[extent.start - start :][: extent.size], extent, where=where) for extent in run
            ]
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


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads ahead what nobody asks for
        yield descriptor
    finally:
        os.close(descriptor)


def _read(descriptor: int, size: int, start: int, where: str) -> bytes:
    """Reads exactly `size` bytes; one call of the kernel may return fewer."""
    pieces, left = list[bytes](), size
    while left > 0:
        piece = os.pread(descriptor, left, start + size - left)
        if not piece:
            raise ShardError(f"{where} is damaged: the file ends {left} bytes too early")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
