"""Processes share the items of a task through a folder of claim files; any process may join or leave at any time.

A process claims an item by creating a file that only one process can create, does the item, and writes what came of it
into a second file. Each process touches a file of its own as long as it lives. When it dies, or gives no sign for too
long, others take over its claims. The queue knows nothing of what the items are.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dreamdance.errors import LostWorkerError, UserError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import QUEUE_FOLDER, note_done
from dreamdance.runs.locks import HeldLockError, WatchedFile, locked_file
from dreamdance.runtime.exits import before_good_exit
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 1.0
# A listing of the queue's folder serves this long while there are items to claim.
LISTING_SECONDS = 1.0
# An item whose process was lost so many times is not given to yet another process.
MAX_TAKEOVERS = 3
LOCK_SECONDS = 600.0
MEMBER, OVER, LOCK = "member.", "over", "lock"


class QueueError(UserError):
    """An item ends every process that does it, or processes disagree about the items."""


class WorkQueue:
    """A context manager around a process's part of the work; left without an error, it waits for all other processes.

    A process whose watchdog finds that it hangs ends itself. One that is stopped, or whose node is, gives no sign for
    `cluster.step_timeout_seconds`: others do its items, and then fail with an error that has the job start again, so
    that the launcher ends the stopped process. Of one that has died, the launcher knows.
    """

    def __init__(self, ranks: Ranks, *, cluster: Cluster | None = None, run_folder: Path | None = None) -> None:
        """Joins nothing yet.

        Args:
            ranks: this process; all processes of one `start` share one queue.
            cluster: how long is too long.
            run_folder: takes the queue, and the note of what is done, by which the launcher sees whether the run got
                any further. None for a process that works alone.
        """
        cluster = cluster or Cluster()
        self.ranks, self.watchdog = ranks, Watchdog.of(cluster)
        is_watched = cluster.step_timeout_seconds > 0
        self.silence_seconds = float(cluster.step_timeout_seconds) if is_watched else math.inf
        self.stall_seconds = float(self.watchdog.unmeasured_seconds) if is_watched else math.inf
        self.run_folder, self.folder = run_folder, Path()
        self.me = f"{MEMBER}{uuid.uuid4().hex}"
        self.held = set[Path]()
        self._machine = _machine()
        self._names, self._listed_at = set[str](), -math.inf
        self._watched: dict[str, WatchedFile] = {}
        self._silent: dict[str, str] = {}
        self._poll_seconds = POLL_SECONDS
        self._over = threading.Event()
        self._entered = ExitStack()

    def __enter__(self) -> "WorkQueue":
        with ExitStack() as entered:
            entered.enter_context(self.watchdog)
            parent = None if self.run_folder is None else self.run_folder / QUEUE_FOLDER
            self._open(parent or Path(entered.enter_context(tempfile.TemporaryDirectory())) / QUEUE_FOLDER)
            process = {"process": os.getpid(), "began": _began(os.getpid())}
            member = {"rank": self.ranks.rank, "machine": self._machine, **process}
            write_atomically(self.folder / self.me, json.dumps(member))
            entered.callback(self._leave)
            entered.enter_context(before_good_exit(self._leave))
            threading.Thread(target=self._beat, name="work queue", daemon=True).start()
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None:
                self._leave()
                self._wait_for_others()

    def share(self, name: str, items: Sequence[str], *, stop: str | None = None) -> "Share":
        """Items that the processes divide.

        Args:
            name: of this part of the task, for file names.
            items: the same list in every process, without doubles.
            stop: under which name `call_off` ends it; by default its own.

        Raises:
            QueueError: another process has another list.
        """
        digest = hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()
        if self.agree(f"{name}.items", digest) != digest and not self.is_over():
            raise QueueError(
                f"the processes of this run found different items ({name}): what the recipe names changed while the "
                "job started. Start it again when nothing writes there"
            )
        return Share(self, name, items, stop or name)

    def is_over(self) -> bool:
        """Whether all other processes of this start have done all shares and left."""
        return OVER in self.names(max_age_seconds=0.0)

    def agree(self, name: str, text: str) -> str:
        """The text that the first process gave under this name."""
        path = self.folder / name
        with self.locked():
            if not path.exists():
                write_atomically(path, text)
            return path.read_text(encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from agreeing on anything, and from taking items over."""
        try:
            with locked_file(self.folder / LOCK, wait_seconds=LOCK_SECONDS):
                yield
        except HeldLockError as error:
            raise LostWorkerError(f"a process was stopped while it held the queue's lock: {error}") from error

    def call_off(self, name: str, reason: str = "") -> None:
        """Has no process claim any more items of a share; what the processes have in hand they finish."""
        self.agree(f"{name}.off", reason)
        self._listed_at = -math.inf

    def called_off(self, name: str) -> str | None:
        """The reason for which a share was called off; None if it was not."""
        if f"{name}.off" not in self.names():
            return None
        return (self.folder / f"{name}.off").read_text(encoding="utf-8")

    def pause(self, what: str) -> None:
        """A moment's wait for other processes; `what` names in words what is missing."""
        self.watchdog.enter("waiting for the other ranks", what)
        time.sleep(self._poll_seconds)
        self._poll_seconds = min(2 * self._poll_seconds, LONGEST_POLL_SECONDS)
        self._listed_at = -math.inf

    def names(self, *, max_age_seconds: float = LISTING_SECONDS) -> set[str]:
        """The names of the queue's files."""
        if time.monotonic() - self._listed_at > max_age_seconds:
            try:
                self._names = set(os.listdir(self.folder))
            except FileNotFoundError as error:
                raise LostWorkerError(f"{self.folder} is gone: another start has replaced this one") from error
            self._listed_at = time.monotonic()
        return self._names

    def hold(self, claim: Path) -> None:
        """Remembers a claim, to be given back when this process leaves."""
        self.held.add(claim)
        self._poll_seconds = POLL_SECONDS

    def why_lost(self, name: str) -> str | None:
        """Why a process will not finish what it has claimed; None while it may.

        Args:
            name: of the process's file; or of a claim that is empty still, because it was lost before it wrote there.
        """
        file = self._watched.setdefault(name, WatchedFile(self.folder / name, silent_seconds=self.silence_seconds))
        is_silent = file.is_lost()
        try:
            text = file.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return "a process has left"
        told = json.loads(text or '{"rank": "?", "machine": "?"}')
        if told["machine"] == self._machine and told["began"] != _began(told["process"]):
            return f"rank {told['rank']} has died"
        if is_silent:
            self._silent[name] = f"rank {told['rank']} has given no sign for {self.silence_seconds:.0f} s"
        return self._silent[name] if is_silent else None

    def _open(self, parent: Path) -> None:
        """The main rank makes the queue's folder, when the output is its own; until then the others wait for it."""
        self.folder = parent / hashlib.sha256(self.ranks.start.encode()).hexdigest()[:16]
        if self.ranks.is_main:
            shutil.rmtree(parent, ignore_errors=True)  # of earlier starts
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        give_up = time.monotonic() + self.stall_seconds
        while not self.folder.is_dir():
            if time.monotonic() > give_up:
                raise LostWorkerError(f"the main rank has given no sign for {self.stall_seconds:.0f} s")
            self.pause("the main rank has not begun")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the storage fails for a moment: the next beat may succeed
                os.utime(self.folder / self.me)

    def _leave(self) -> None:
        """Gives back what this process has claimed and not done."""
        self._over.set()
        for claim in list(self.held):
            with contextlib.suppress(OSError):
                if claim.read_text(encoding="utf-8").startswith(self.me):
                    claim.unlink()
        with contextlib.suppress(OSError):
            (self.folder / self.me).unlink()

    def _wait_for_others(self) -> None:
        def members() -> list[str]:
            return [name for name in self.names(max_age_seconds=0.0) if name.startswith(MEMBER)]

        while others := [name for name in members() if self.why_lost(name) is None]:
            self.pause(f"{len(others)} processes are still at work")
        if silent := [self._silent[name] for name in members() if name in self._silent]:
            raise LostWorkerError(
                f"{'; '.join(silent)}: the other ranks have done its share; the next start finds all of it done"
            )
        if self.ranks.is_main:
            (self.folder / OVER).touch()  # for a process that comes only now
            for name in self.names():
                if not name.startswith(MEMBER) and name not in (LOCK, OVER):
                    (self.folder / name).unlink(missing_ok=True)


class Share:
    """The items of one part of a task, as this process sees them."""

    def __init__(self, queue: WorkQueue, name: str, items: Sequence[str], stop: str) -> None:
        self.items, self._queue, self._share, self._stop = items, queue, name, stop
        self._numbers = {item: number for number, item in enumerate(items)}
        self._untried = deque(range(len(items)))
        self._pending = list(range(len(items)))

    def claim(self) -> str | None:
        """An item that no other process has, or whose process is lost; None if there is none now.

        Raises:
            QueueError: one item was the end of too many processes.
        """
        names = self._queue.names()
        if OVER in names or f"{self._stop}.off" in names:
            return None
        while self._untried:
            number = self._untried.popleft()
            if self._name(number, "claim") not in names and self._create(number):
                return self.items[number]
        for number in self._not_done():
            if self._path(number, "claim") in self._queue.held:
                continue
            if self._take_over(number) if self._name(number, "claim") in names else self._create(number):
                return self.items[number]
        return None

    def finish(self, item: str, text: str = "", *, made: str | None = None) -> None:
        """An item is done, and on the disk.

        Args:
            item: that this process claimed.
            text: what came of it, for `results`.
            made: names what was made now, for the launcher's count; None where it was there before.
        """
        if made is not None and self._queue.run_folder is not None:
            note_done(self._queue.run_folder, self._queue.ranks.rank, made)
        number = self._numbers[item]
        write_atomically(self._path(number, "done"), text)
        self._queue.names().add(self._name(number, "done"))
        self._queue.held.discard(self._path(number, "claim"))

    def check(self, item: str) -> None:
        """Raises LostWorkerError where another process has taken this one for lost, and the item over."""
        if not (self._read_claim(self._numbers[item]) or "").startswith(self._queue.me):
            raise LostWorkerError(f"this process was stopped for so long that another one does '{item}'")

    def take(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yields items to do, each to be finished before the next; returns when all are done, or called off.

        Args:
            on_wait: called while other processes are at work, whenever they have done more.
        """
        before = -1
        while True:
            item = self.claim()
            if item is not None:
                yield item
            elif self.is_over():
                return
            else:
                if (done := self.num_done()) != before:
                    on_wait()
                before = done
                self._queue.pause(f"{len(self._pending)} of {len(self.items)} items ({self._share}) are not done")

    def is_over(self) -> bool:
        """Whether nothing is left: all items are done, or the share was called off and nobody has one in hand."""
        pending, names = self._not_done(), self._queue.names()
        if not pending or OVER in names:
            return True
        if f"{self._stop}.off" not in names:
            return False
        return all(self._find_loss(number) for number in pending if self._name(number, "claim") in names)

    def num_done(self) -> int:
        """How many items are done, by all processes of this start."""
        return len(self.items) - len(self._not_done())

    def results(self) -> dict[str, str]:
        """What came of each item that is done, in the order of the items."""
        pending, found = set(self._not_done()), {}
        for number, item in enumerate(self.items):
            with contextlib.suppress(FileNotFoundError):  # the main rank has cleared up: all is over
                if number not in pending:
                    found[item] = self._path(number, "done").read_text(encoding="utf-8")
        return found

    def _name(self, number: int, kind: str) -> str:
        return f"{self._share}.{number:07d}.{kind}"

    def _path(self, number: int, kind: str) -> Path:
        return self._queue.folder / self._name(number, kind)

    def _not_done(self) -> list[int]:
        names = self._queue.names()
        is_over = OVER in names
        self._pending = [n for n in self._pending if not is_over and self._name(n, "done") not in names]
        return self._pending

    def _create(self, number: int) -> bool:
        claim = self._path(number, "claim")
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(f"{self._queue.me} 0")
        except FileExistsError:
            return False
        self._queue.hold(claim)
        return True

    def _read_claim(self, number: int) -> str | None:
        try:
            return self._path(number, "claim").read_text(encoding="utf-8")
        except FileNotFoundError:  # it was given back
            return None

    def _find_loss(self, number: int) -> tuple[str, str] | None:
        """A claim whose process is lost, and how that is known; None where the item is in good hands, or in none."""
        claimed = self._read_claim(number)
        if claimed is None:
            return None
        why = self._queue.why_lost(claimed.split()[0] if claimed else self._name(number, "claim"))
        return None if why is None else (claimed, why)

    def _take_over(self, number: int) -> bool:
        if (loss := self._find_loss(number)) is None:
            return False
        (claimed, why), item = loss, self.items[number]
        times = int(claimed.split()[1]) + 1 if claimed else 1
        if times > MAX_TAKEOVERS:
            raise QueueError(
                f"'{item}' ({self._share}) was given up: {times} processes were lost while they did it; of the last "
                f"one, {why}. Look into their logs: did the memory not suffice?"
            )
        with self._queue.locked():
            if self._read_claim(number) != claimed or self._path(number, "done").exists():
                return False
            write_atomically(self._path(number, "claim"), f"{self._queue.me} {times}")
        logger.warning("%s: this process takes over '%s'", why, item)
        self._queue.hold(self._path(number, "claim"))
        return True


def _machine() -> str:
    """Tells this machine from others, and this container from others on it: process numbers count only within."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # nothing is known of any process but by its signs


def _began(process: int) -> str | None:
    """When a process of this machine began, which tells it from a later one of the same number; None if it is gone."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] in "ZX" else state[19]
