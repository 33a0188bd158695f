"""What lies in a file, known without reading it again: size and times are compared first, only what differs is hashed.

No torch here: a login node asks, too.
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
class FileState:
    """A file as it was once read.

    Attributes:
        size: in bytes.
        mtime_ns: time of the last change of its content, which programs can set back.
        ctime_ns: time of the last change of anything about it, which they cannot.
        sha256: of its content.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "FileState | None":
        """A state that was noted; None where the note is damaged, so that the file is read again."""
        if not isinstance(values, Mapping) or set(values) != set(cls.__dataclass_fields__):
            return None
        whole = all(type(values[name]) is int for name in ("size", "mtime_ns", "ctime_ns"))
        return cls(**values) if whole and isinstance(values["sha256"], str) else None


def read_state(
    path: Path, known: FileState | None = None, *, on_block: Callable[[], None] = lambda: None
) -> FileState | None:
    """The state of a file; its content is read only where size or times are not those of the known state.

    Args:
        path: of the file.
        known: its state when it was last read.
        on_block: called after each block that is read, for whoever watches that it goes on.

    Returns:
        None where there is no file, or none that may be read.

    Raises:
        OSError: the storage fails.
    """
    try:
        look = _look(path)
        if known is not None and look == (known.size, known.mtime_ns, known.ctime_ns):
            return known
        while True:
            digest = hash_file(path, on_block)
            before, look = look, _look(path)
            if look == before:  # else it was written to while it was read
                return FileState(size=look[0], mtime_ns=look[1], ctime_ns=look[2], sha256=digest)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None


def _look(path: Path) -> tuple[int, int, int]:
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # what never ends, or waits for a writer, is not read
        raise IsADirectoryError(errno.EISDIR, "not a regular file", str(path))
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns
