"""Divides the items of a task among processes by claim files in a folder; a process may join or leave at any time.

A process claims an item by creating a file that only one process can create, does the item, and writes the result
into a second file. When a process is lost (`members.py` finds that out), others take over its claims. The queue does
not know what the items are.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dreamdance.errors import LostWorkerError, UserError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import QUEUE_FOLDER, note_done
from dreamdance.runs.locks import HeldLockError, locked_file
from dreamdance.runs.members import MEMBER_PREFIX, Members
from dreamdance.runtime.exits import before_good_exit
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 1.0
# How long a listing of the queue's folder is used again while there are items to claim.
LISTING_SECONDS = 1.0
# How often an item may pass to another process because the last one was lost.
MAX_TAKEOVERS = 3
LOCK_SECONDS = 600.0
OVER, LOCK = "over", "lock"


class QueueError(UserError):
    """Every process that did an item was lost, or processes found different items."""


class WorkQueue:
    """A context manager around a process's part of the work; a block that ends without an error waits for the others.

    A process that hangs is ended by its own watchdog. A process that is stopped, or whose node is stopped, gives no
    sign for `cluster.step_timeout_seconds`: the others do its items, then they raise an error after which the job
    starts again, so that the launcher ends the stopped process. The launcher notices by itself when a process dies.
    """

    def __init__(self, ranks: Ranks, *, cluster: Cluster | None = None, run_folder: Path | None = None) -> None:
        """Does not join yet.

        Args:
            ranks: this process; all processes of one `start` share one queue.
            cluster: the time limits.
            run_folder: holds the queue, and the list of finished items, from which the launcher sees whether the run
                has made progress. None for a process that works alone.
        """
        cluster = cluster or Cluster()
        self.ranks = ranks
        self.watchdog = Watchdog(
            least_seconds=cluster.step_timeout_seconds, unmeasured_seconds=cluster.collective_timeout_seconds
        )
        silence_seconds = float(cluster.step_timeout_seconds) or math.inf
        self.stall_seconds = max(silence_seconds, self.watchdog.unmeasured_seconds)
        self.run_folder, self.folder = run_folder, Path()
        self.members = Members(ranks.rank, silence_seconds=silence_seconds)
        self.held = set[Path]()
        self._names, self._listed_at = set[str](), -math.inf
        self._poll_seconds = POLL_SECONDS
        self._entered = ExitStack()

    def __enter__(self) -> "WorkQueue":
        with ExitStack() as entered:
            entered.enter_context(self.watchdog)
            parent = None if self.run_folder is None else self.run_folder / QUEUE_FOLDER
            self._open(parent or Path(entered.enter_context(tempfile.TemporaryDirectory())) / QUEUE_FOLDER)
            self.members.join(self.folder)
            entered.callback(self._leave)
            entered.enter_context(before_good_exit(self._leave))
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None:
                self._leave()
                self._wait_for_others()

    def share(self, name: str, items: Sequence[str], *, stop: str | None = None) -> "Share":
        """Items that the processes divide among themselves.

        Args:
            name: name of this part of the task, for file names.
            items: the same list in every process, without duplicates.
            stop: the name by which `call_off` ends this share; `name` by default.

        Raises:
            QueueError: another process has a different list.
        """
        digest = hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()
        if self.agree(f"{name}.items", digest) != digest and not self.is_over():
            raise QueueError(
                f"the processes of this run found different items ({name}): the files that the recipe names changed "
                "while the job started. Start it again when no other program writes them"
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
        """Only one process at a time can be in this block: to agree on a text, or to take over an item."""
        try:
            with locked_file(self.folder / LOCK, wait_seconds=LOCK_SECONDS):
                yield
        except HeldLockError as error:
            raise LostWorkerError(f"a process was stopped while it held the queue's lock: {error}") from error

    def call_off(self, name: str, reason: str = "") -> None:
        """Ends a share: no process claims another item of it, and each process finishes the item that it has."""
        self.agree(f"{name}.off", reason)
        self._listed_at = -math.inf

    def called_off(self, name: str) -> str | None:
        """The reason that was given to `call_off`; None if the share was not called off."""
        if f"{name}.off" not in self.names():
            return None
        return (self.folder / f"{name}.off").read_text(encoding="utf-8")

    def pause(self, what: str) -> None:
        """Waits a moment for other processes; `what` describes what is missing, for the watchdog's message."""
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
        """Remembers a claim of this process: it is given back when the process leaves before it finished the item."""
        self.held.add(claim)
        self._poll_seconds = POLL_SECONDS

    def _open(self, parent: Path) -> None:
        """Creates the queue's folder on the main rank; other ranks wait for it."""
        self.folder = parent / hashlib.sha256(self.ranks.start.encode()).hexdigest()[:16]
        if self.ranks.is_main:
            shutil.rmtree(parent, ignore_errors=True)  # the queues of earlier starts
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        give_up = time.monotonic() + self.stall_seconds
        while not self.folder.is_dir():
            if time.monotonic() > give_up:
                raise LostWorkerError(f"the main rank has given no sign for {self.stall_seconds:.0f} s")
            self.pause("the main rank has not begun")

    def _leave(self) -> None:
        """Gives back the items that this process has claimed and not finished."""
        for claim in list(self.held):
            with contextlib.suppress(OSError):
                if claim.read_text(encoding="utf-8").startswith(self.members.name):
                    claim.unlink()
        self.members.leave()

    def _wait_for_others(self) -> None:
        def found() -> list[str]:
            return [name for name in self.names(max_age_seconds=0.0) if name.startswith(MEMBER_PREFIX)]

        while others := [name for name in found() if self.members.why_lost(name) is None]:
            self.pause(f"{len(others)} processes are still at work")
        if silent := [self.members.silent[name] for name in found() if name in self.members.silent]:
            raise LostWorkerError(
                f"{'; '.join(silent)}: the other ranks have done its share; the next start finds all of it done"
            )
        if self.ranks.is_main:
            (self.folder / OVER).touch()  # for a process that joins later
            for name in self.names():
                if not name.startswith(MEMBER_PREFIX) and name not in (LOCK, OVER):
                    (self.folder / name).unlink(missing_ok=True)


class Share:
    """The items of one part of a task, and this process's claims among them."""

    def __init__(self, queue: WorkQueue, name: str, items: Sequence[str], stop: str) -> None:
        self.items, self._queue, self._share, self._stop = items, queue, name, stop
        self._numbers = {item: number for number, item in enumerate(items)}
        self._untried = deque(range(len(items)))
        self._pending = list(range(len(items)))

    def claim(self) -> str | None:
        """Claims an item that no process has, or whose process is lost; None if there is no such item now.

        Raises:
            QueueError: too many processes were lost while they did the same item.
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
        """Marks an item as done; its files must be on the disk.

        Args:
            item: an item that this process claimed.
            text: the item's result, for `results`.
            made: name of what was made now, for the launcher's count of progress; None if it existed before.
        """
        if made is not None and self._queue.run_folder is not None:
            note_done(self._queue.run_folder, self._queue.ranks.rank, made)
        number = self._numbers[item]
        write_atomically(self._path(number, "done"), text)
        self._queue.names().add(self._name(number, "done"))
        self._queue.held.discard(self._path(number, "claim"))

    def check(self, item: str) -> None:
        """Raises LostWorkerError if another process has taken over the item, because this one counted as lost."""
        if not (self._read_claim(self._numbers[item]) or "").startswith(self._queue.members.name):
            raise LostWorkerError(f"this process was stopped for so long that another one does '{item}'")

    def take(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yields items to do; finish each before the next. Returns when all are done, or the share was called off.

        Args:
            on_wait: called during the wait for other processes, whenever they have done more.
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
        """Whether all items are done, or the share was called off and no process is doing an item."""
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
        """The result of each item that is done, in the order of the items."""
        pending, found = set(self._not_done()), {}
        for number, item in enumerate(self.items):
            with contextlib.suppress(FileNotFoundError):  # all is over, and the main rank has removed the files
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
                file.write(f"{self._queue.members.name} 0")
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
        """The claim of a lost process, and the reason; None if its process is not lost, or there is no claim."""
        claimed = self._read_claim(number)
        if claimed is None:
            return None
        why = self._queue.members.why_lost(claimed.split()[0] if claimed else self._name(number, "claim"))
        return None if why is None else (claimed, why)

    def _take_over(self, number: int) -> bool:
        if (loss := self._find_loss(number)) is None:
            return False
        (claimed, why), item = loss, self.items[number]
        times = int(claimed.split()[1]) + 1 if claimed else 1
        if times > MAX_TAKEOVERS:
            raise QueueError(
                f"'{item}' ({self._share}) was given up: {times} processes were lost while they did it; for the last "
                f"one, {why}. Read their logs: was there too little memory?"
            )
        with self._queue.locked():
            if self._read_claim(number) != claimed or self._path(number, "done").exists():
                return False
            write_atomically(self._path(number, "claim"), f"{self._queue.members.name} {times}")
        logger.warning("%s: this process takes over '%s'", why, item)
        self._queue.hold(self._path(number, "claim"))
        return True
