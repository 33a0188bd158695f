"""Tells whether a file has changed: by size and times (a stamp) first; only a file whose stamp differs is read again.

No torch here: the launcher uses this on a login node.
"""

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dreamdance.runs.files import hash_file


@dataclass(frozen=True)
class FileStamp:
    """What the file system knows of a file without reading it; it differs after the content was changed or replaced.

    Attributes:
        size: size in bytes.
        mtime_ns: when the content changed last, in nanoseconds since 1970; programs can set it back.
        ctime_ns: when content, name or permissions changed last; programs cannot set it.
    """

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "FileStamp":
        """The stamp of a path, or of an open file's descriptor.

        Raises:
            OSError: the file is missing or out of reach.
        """
        return cls.from_stat(os.stat(file))

    @classmethod
    def from_stat(cls, found: os.stat_result) -> "FileStamp":
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True)
class FileState:
    """A file when it was last read: its stamp, and the SHA-256 of its content in hexadecimal digits."""

    stamp: FileStamp
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.stamp), "sha256": self.sha256}

    @classmethod
    def from_json(cls, values: Any) -> "FileState | None":
        """The state that a record contains; None if the record is damaged, so that the file is read again."""
        times = tuple(FileStamp.__dataclass_fields__)
        if not isinstance(values, Mapping) or set(values) != {*times, "sha256"}:
            return None
        is_sound = all(type(values[name]) is int for name in times) and isinstance(values["sha256"], str)
        return cls(FileStamp(**{name: values[name] for name in times}), values["sha256"]) if is_sound else None


def read_state(
    path: Path, known: FileState | None = None, *, on_block: Callable[[], None] = lambda: None
) -> FileState | None:
    """The state of a file, whose content is read only if its stamp is not that of the known state.

    Args:
        path: the file.
        known: its state when it was last read.
        on_block: called after each block that is read, so that a watchdog sees progress.

    Returns:
        None where there is no file, or none that this user may read.

    Raises:
        OSError: the storage fails.
    """
    try:
        stamp = _stamp_regular(path)
        if known is not None and stamp == known.stamp:
            return known
        while True:
            digest = hash_file(path, on_block)
            before, stamp = stamp, _stamp_regular(path)
            if stamp == before:  # else the file was written to while it was read
                return FileState(stamp, digest)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None


def _stamp_regular(path: Path) -> FileStamp:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a device never ends, a pipe waits for a writer
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
    return FileStamp.from_stat(found)
