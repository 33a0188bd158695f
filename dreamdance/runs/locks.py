"""One process at a time, on one machine or on many: a lock of the operating system, which dies with its holder.

Some file systems have none (Lustre without `flock`, some FUSE mounts, NFS without its lock service). There a file that
only one can make says who has the lock; its holder touches it as long as it lives, and when that stops another process
takes it over. Machines' clocks are never compared: some file systems stamp files by the toucher's. No torch here.
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

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A process that gave no sign for so long counts as lost."""
POLL_SECONDS, SLOW_POLL_SECONDS = 0.1, 0.5
NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})


class HeldLockError(TimeoutError):
    """Another process kept the lock for longer than was waited."""


@contextmanager
def locked_file(path: Path, *, wait_seconds: float, remove: bool = False) -> Iterator[None]:
    """Holds a lock until the block is left.

    Args:
        path: the lock's file; its folder must be there.
        wait_seconds: how long another process that holds it is waited for. Where the file system has no locks, one
            that gives no sign is waited for until it counts as lost.
        remove: the file, in the end.

    Raises:
        HeldLockError: another process has it; says which, if that is known.
        OSError: the file cannot be made.
    """
    give_up = time.monotonic() + wait_seconds
    handle = _acquire(path, give_up)
    holding = _made_file(path.with_name(f"{path.name}.held"), give_up) if handle is None else _held(handle)
    with holding:
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)  # still held: who opened it before finds that its name is gone


def file_system_time(folder: Path) -> float:
    """Now, by the clock with which the file system stamps files: two machines' clocks may differ by more than that.

    Raises:
        OSError: no file can be made there.
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
                logger.warning("%s: no locks on its file system (%s); a file with a heartbeat is used", path, error)
                return None
        time.sleep(POLL_SECONDS)


@contextmanager
def _held(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # also for processes that inherited the handle
        os.close(handle)


@contextmanager
def _made_file(path: Path, give_up: float) -> Iterator[None]:
    """Makes a file that is not there yet, and touches it until the block is left."""
    handle = _make(path, give_up)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the storage fails for a moment: the next beat may succeed
                os.utime(handle)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_SECONDS)
        if _is_at(path, handle):  # and not another process's, which took this one for lost
            path.unlink(missing_ok=True)
        os.close(handle)


def _make(path: Path, give_up: float) -> int:
    holder, guard = _Watched(path), _Watched(path.with_name(f"{path.name}.taken"))
    first = _look(path)
    while True:
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            os.write(handle, f"{socket.gethostname()} process {os.getpid()}".encode())
            return handle
        if holder.is_lost():
            _take_over(holder, guard)
        elif time.monotonic() >= give_up and holder.look not in (None, first):  # else it may soon count as lost
            raise HeldLockError(f"{_holder(path)} holds {path}")
        else:
            time.sleep(SLOW_POLL_SECONDS)


class _Watched:
    """Another process's file: whether its stamp changes, by this process's own clock.

    Attributes:
        look: how it was found last; None if it was gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.look: tuple[int, int] | None = None
        self._silent_seconds = 0.0
        self._looked_at = time.monotonic()

    def is_lost(self) -> bool:
        """Whether its process gave no sign for long; to be called again and again."""
        before, self.look = self.look, _look(self.path)
        now = time.monotonic()
        # Between two looks, this process may have been stopped together with the other one: that is no silence.
        elapsed, self._looked_at = min(now - self._looked_at, BEAT_SECONDS), now
        self._silent_seconds = self._silent_seconds + elapsed if self.look == before else 0.0
        return self.look is not None and self._silent_seconds > SILENT_SECONDS


def _take_over(lost: _Watched, guard: _Watched) -> None:
    """Removes a lost process's file; of several that want to, one at a time looks again and does."""
    try:
        os.close(os.open(guard.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        if guard.is_lost():  # its process was lost in the moment between these lines
            guard.path.unlink(missing_ok=True)
        time.sleep(POLL_SECONDS)
        return
    try:
        if _look(lost.path) == lost.look:
            logger.warning(
                "%s gave no sign for %.0f s: its lock %s is taken over", _holder(lost.path), SILENT_SECONDS, lost.path
            )
            lost.path.unlink(missing_ok=True)
    finally:
        guard.path.unlink(missing_ok=True)


def _look(path: Path) -> tuple[int, int] | None:
    """Which file it is, and its stamp; None if it is gone. Opening it makes a network file system ask its server."""
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
