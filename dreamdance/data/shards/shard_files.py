"""Compares shard files with their index: size, hash, table of samples.

This module knows neither where the files come from nor which files were compared before.
"""

import hashlib
import struct
from pathlib import Path
from typing import IO

import numpy as np

from dreamdance.data.shards.index import HASH_DIGITS, ShardEntry, ShardFile
from dreamdance.data.shards.mds import get_hash
from dreamdance.errors import ShardError
from dreamdance.runs.file_states import FileStamp

READ_BYTES = 1 << 20


def compare_file(path: Path, entry: ShardEntry, file: ShardFile, *, by_hash: bool) -> FileStamp:
    """Compares a file with the index: its size, the table of samples if it is an MDS file, and its hash if asked to.

    Returns:
        The stamp of the file before it was read: a file that changes meanwhile has another stamp afterwards.

    Raises:
        ShardError: the file is not the one that the index describes.
        OSError: the file is missing or cannot be read.
    """
    with path.open("rb") as opened:
        stamp = FileStamp.of(opened.fileno())
        # Read before the comparison: a storage error must not be reported as a file of another size.
        head = opened.read(samples_table_bytes(entry)) if file is entry.raw else b""
        opened.seek(0)
        digest = _digest(opened, file) if by_hash else None
    check_size(stamp.size, file, where=str(path))
    if digest is not None:
        _check_digest(digest, file, where=str(path))
    if file is entry.raw:
        check_samples(head, stamp.size, entry, where=str(path))
    return stamp


def check_size(num_bytes: int, file: ShardFile, *, where: str) -> None:
    """Compares a file's size with the index.

    Raises:
        ShardError: the sizes differ.
    """
    if num_bytes != file.num_bytes:
        raise ShardError(f"shard {where} is damaged: it has {num_bytes} bytes, the index lists {file.num_bytes}")


def check_bytes(data: bytes, file: ShardFile, *, where: str) -> None:
    """Compares a file's content with the size and the strongest hash of the index.

    Raises:
        ShardError: size or hash differs.
    """
    check_size(len(data), file, where=where)
    _check_digest(get_hash(strongest_hash(file), data), file, where=where)


def check_samples(head: bytes, num_bytes: int, entry: ShardEntry, *, where: str) -> None:
    """Compares the table of samples at the head of an MDS file with the index.

    Args:
        head: the first bytes of the file, at least `samples_table_bytes(entry)`.
        num_bytes: the size of the whole file.

    Raises:
        ShardError: the number of samples differs, or the table points outside the file.
    """
    found = struct.unpack_from("<I", head)[0] if len(head) >= 4 else 0
    if found != entry.num_samples or len(head) < samples_table_bytes(entry):
        raise ShardError(f"shard {where} has {found} samples, the index lists {entry.num_samples}")
    offsets = np.frombuffer(head, dtype="<u4", count=entry.num_samples + 1, offset=4).astype(np.int64)
    if offsets[0] < samples_table_bytes(entry) or (np.diff(offsets) <= 0).any() or offsets[-1] != num_bytes:
        raise ShardError(f"shard {where} is damaged: its table of samples points outside the file")


def samples_table_bytes(entry: ShardEntry) -> int:
    """Size of the table at the head of an MDS file: the number of samples n, then n + 1 offsets."""
    return 4 * (entry.num_samples + 2)


def strongest_hash(file: ShardFile) -> str:
    """The name of the hash algorithm that the comparison of a file uses."""
    return next(name for name in HASH_DIGITS if name in file.hashes)


def _digest(opened: IO[bytes], file: ShardFile) -> str:
    """The hash of the file, which is read in pieces: a shard has up to 4 GiB, and every worker may hash one."""
    algorithm = strongest_hash(file)
    if algorithm not in hashlib.algorithms_guaranteed:
        return get_hash(algorithm, opened.read(file.num_bytes + 1))
    hasher, left = hashlib.new(algorithm), file.num_bytes + 1
    while left > 0 and (piece := opened.read(min(READ_BYTES, left))):
        hasher.update(piece)
        left -= len(piece)
    return hasher.hexdigest()


def _check_digest(digest: str, file: ShardFile, *, where: str) -> None:
    algorithm = strongest_hash(file)
    if digest != file.hashes[algorithm]:
        raise ShardError(f"shard {where} is damaged: its {algorithm} differs from the index")
