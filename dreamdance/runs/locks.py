"""A lock for processes on one machine or on many: the operating system's, which ends with the process that holds it.

Some file systems have no such locks (Lustre without `flock`, some FUSE mounts, NFS without its lock service). There, a
file that only one process can create stands for the lock. Its holder touches the file while it lives; when that stops,
another process takes the lock over. The clocks of two machines are never compared, because some file systems stamp
files with the clock of the machine that writes. No torch here.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0  # how often the holder touches its file
SILENT_SECONDS = 60.0  # a process that has not touched its file for so long counts as lost
POLL_SECONDS, SLOW_POLL_SECONDS = 0.1, 0.5
NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})


class HeldLockError(TimeoutError):
    """Another process kept the lock for the whole waiting time."""


@contextmanager
def locked_file(path: Path, *, wait_seconds: float, remove: bool = False) -> Iterator[None]:
    """Holds a lock until the block ends.

    Args:
        path: the lock's file; its folder must exist.
        wait_seconds: how long to wait for another process that holds the lock. Where the file system has no locks, a
            process that does not touch its file is waited for until it counts as lost.
        remove: whether to remove the file in the end.

    Raises:
        HeldLockError: another process holds the lock; names that process if it is known.
        OSError: the file cannot be created.
    """
    give_up = time.monotonic() + wait_seconds
    handle = _acquire(path, give_up)
    holding = _made_file(path.with_name(f"{path.name}.held"), give_up) if handle is None else _held(handle)
    with holding:
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)  # while held: a process that opened it before finds its name removed


@contextmanager
def shared_file(path: Path, sharing: str, *, wait_seconds: float) -> Iterator[None]:
    """Holds a lock together with the processes that give the same text; excludes others, and those of `locked_file`.

    The process that leaves last removes the file.

    Args:
        path: the lock's file; its folder must exist.
        sharing: names the processes that share the lock.
        wait_seconds: how long to wait for other processes that hold the lock.

    Raises:
        HeldLockError: others hold the lock.
        OSError: the file cannot be created, or its file system has no locks (`NO_LOCKS`).
    """
    give_up = time.monotonic() + wait_seconds
    while (handle := _share(path, sharing.encode("utf-8", "surrogateescape"))) is None:
        if time.monotonic() >= give_up:
            raise HeldLockError(f"{_holder(path)} holds {path}")
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while others share the lock
            path.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _share(path: Path, sharing: bytes) -> int | None:
    """Locks a file together with others; the first process writes who shares it. None while it cannot be locked."""
    with contextlib.ExitStack() as unless_locked:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        unless_locked.callback(os.close, handle)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, sharing, 0)
        try:
            # Another process may have had the lock in between: so the text is read again.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not _is_at(path, handle) or os.pread(handle, len(sharing) + 1, 0) != sharing:
            return None
        unless_locked.pop_all()
        return handle


def file_system_time(folder: Path) -> float:
    """The present time by the file system's clock, which stamps files: the clocks of two machines may differ.

    Raises:
        OSError: no file can be created in the folder.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime


def _acquire(path: Path, give_up: float) -> int | None:
    """Locks a file; None where the file system has no locks."""
    while True:
        with contextlib.ExitStack() as unless_locked:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            unless_locked.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, handle):
                    unless_locked.pop_all()
                    return handle
                continue
            except BlockingIOError as error:
                if time.monotonic() >= give_up:
                    raise HeldLockError(f"another process holds {path}") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning("%s: its file system has no locks (%s); using a file with a heartbeat", path, error)
                return None
        time.sleep(POLL_SECONDS)


@contextmanager
def _held(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # releases the lock also where a child process inherited the handle
        os.close(handle)


@contextmanager
def _made_file(path: Path, give_up: float) -> Iterator[None]:
    """Creates a file that does not exist yet, and touches it until the block ends."""
    handle = _make(path, give_up)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # on an I/O error, skip this beat
                os.utime(handle)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_SECONDS)
        if _is_at(path, handle):  # else another process took the lock over, because this one counted as lost
            path.unlink(missing_ok=True)
        os.close(handle)


def _make(path: Path, give_up: float) -> int:
    holder, guard = WatchedFile(path), WatchedFile(path.with_name(f"{path.name}.taken"))
    first = _mark(path)
    while True:
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.write(handle, f"{socket.gethostname()} process {os.getpid()}".encode())
            return handle
        if holder.is_lost():
            _take_over(holder, guard)
        elif time.monotonic() >= give_up and holder.mark not in (None, first):  # else it may soon count as lost
            raise HeldLockError(f"{_holder(path)} holds {path}")
        else:
            time.sleep(SLOW_POLL_SECONDS)


class WatchedFile:
    """Another process's file: whether its time stamp changes, measured by this process's own clock.

    Attributes:
        mark: which file it was and its time stamp, when it was read last; None if there was no file.
    """

    def __init__(self, path: Path, *, silent_seconds: float | None = None) -> None:
        """Reads nothing yet.

        Args:
            path: the file that the other process touches.
            silent_seconds: after how long without a touch it counts as lost; by default `SILENT_SECONDS`.
        """
        self.path = path
        self._limit_seconds = SILENT_SECONDS if silent_seconds is None else silent_seconds
        self.mark: tuple[int, int] | None = None
        self._silent_seconds = 0.0
        self._read_at = time.monotonic()

    def is_lost(self) -> bool:
        """Whether the file was not touched for too long; call it repeatedly."""
        before, self.mark = self.mark, _mark(self.path)
        now = time.monotonic()
        # Between two calls, this process may have been stopped together with the other one; that time does not count.
        elapsed, self._read_at = min(now - self._read_at, BEAT_SECONDS), now
        self._silent_seconds = self._silent_seconds + elapsed if self.mark == before else 0.0
        return self.mark is not None and self._silent_seconds > self._limit_seconds


def _take_over(lost: WatchedFile, guard: WatchedFile) -> None:
    """Removes a lost process's file. The guard file lets one process at a time compare once more and remove it."""
    try:
        os.close(os.open(guard.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        if guard.is_lost():  # the guard's process was lost between creating and removing it
            guard.path.unlink(missing_ok=True)
        time.sleep(POLL_SECONDS)
        return
    try:
        if _mark(lost.path) == lost.mark:
            logger.warning(
                "%s has not touched its lock for %.0f s: taking over %s",
                _holder(lost.path),
                SILENT_SECONDS,
                lost.path,
            )
            lost.path.unlink(missing_ok=True)
    finally:
        guard.path.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int] | None:
    """The file's inode and time stamp; None without a file. Opening it makes a network file system ask its server."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except PermissionError:
        state = path.stat()
    return state.st_ino, state.st_mtime_ns


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
