"""Divides the items of a task among processes by claim files in a folder; a process may join or leave at any time.

A process claims an item by creating a file that only one process can create, does the item, and writes the result
into a second file. When a process is lost (`members.py` finds that out), others take over its claims. All processes of
a run share one folder, whatever their job and rank. The queue does not know what the items are.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dreamdance.errors import LostWorkerError, UserError
from dreamdance.runs.files import remove, write_atomically
from dreamdance.runs.layout import QUEUE_FOLDER, note_done
from dreamdance.runs.locks import HeldLockError, locked_file
from dreamdance.runs.members import MEMBER_PREFIX, Members
from dreamdance.runtime.exits import before_good_exit
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.watchdog import TimeLimits, Watchdog

logger = logging.getLogger(__name__)

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 1.0
# How often an item may pass to another process because the last one was lost.
MAX_TAKEOVERS = 3
LOCK_SECONDS = 600.0
# Names of files: all processes have left, no item is claimed any more, the lock.
OVER, STOPPED, LOCK = "over", "stopped", "lock"


class QueueError(UserError):
    """Every process that did an item was lost, or processes found different items."""


class WorkQueue:
    """A context manager around a process's part of the work; a block that ends without an error waits for the others.

    The queue lasts from the first process that joins to the last that leaves; the next start after that begins
    with an empty queue. The queue permits several jobs of a run at once (C7 names what excludes a second job today).
    The ranks of each job wait for its main rank before they join.

    A process that hangs is ended by its own watchdog. A process that is stopped, or whose node is stopped, gives no
    sign for `cluster.step_timeout_seconds`: the others do its items, then they raise an error after which the job
    starts again, so that the launcher ends the stopped process. The launcher notices by itself when a process dies.

    Attributes:
        everyone_left: whether all other processes had done all items and left before this one joined; it then does
            nothing.
    """

    members: Members

    def __init__(self, ranks: Ranks, *, limits: TimeLimits | None = None, run_folder: Path | None = None) -> None:
        """Does not join yet.

        Args:
            ranks: this process.
            limits: the time limits; None means no limits.
            run_folder: holds the queue, and the list of finished items, from which the launcher sees whether the run
                has made progress. None for a process that works alone.
        """
        self.ranks = ranks
        self.watchdog = Watchdog.from_limits(limits) if limits else Watchdog(least_seconds=0, unmeasured_seconds=0)
        self.silence_seconds = self.watchdog.least_seconds or math.inf
        self.stall_seconds = max(self.silence_seconds, self.watchdog.unmeasured_seconds)
        self.run_folder, self.folder = run_folder, Path()
        self.everyone_left = False
        self.held = set[Path]()
        self._poll_seconds = POLL_SECONDS
        self._entered = ExitStack()

    def __enter__(self) -> "WorkQueue":
        with ExitStack() as entered:
            entered.enter_context(self.watchdog)
            parent = self.run_folder or Path(entered.enter_context(tempfile.TemporaryDirectory()))
            self.folder = parent / QUEUE_FOLDER
            self.folder.mkdir(parents=True, exist_ok=True)
            self.members = Members(self.folder, self.ranks, silence_seconds=self.silence_seconds)
            entered.callback(self._leave)
            entered.enter_context(before_good_exit(self._leave))
            self._join()
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None:
                self._leave()
                self._wait_for_others()

    def share(self, name: str, items: Sequence[str]) -> "Share":
        """Items that the processes divide among themselves.

        Args:
            name: name of this part of the task, for file names.
            items: the same list in every process, without duplicates.

        Raises:
            QueueError: another process has a different list.
        """
        digest = hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()
        if not self.everyone_left and self.agree(f"{name}.items", digest) != digest:
            raise QueueError(
                f"the processes of this run found different items ({name}): the files that the recipe names changed "
                "while the job started. Start it again when no other program writes them"
            )
        return Share(self, name, items)

    def once(self, name: str, action: Callable[[], None]) -> None:
        """One of the processes calls `action`; all wait until it has returned. A stopped queue skips it."""
        share = self.share(name, [name])
        for item in share.take():
            if item is not None:
                action()
                share.finish(item)

    def agree(self, name: str, text: str) -> str:
        """The text that the first process gave under this name."""
        path = self.folder / name
        with self.locked():
            if not path.exists():
                write_atomically(path, text)
            return path.read_text(encoding="utf-8")

    def stop(self, reason: str) -> None:
        """From now on no process claims an item; each finishes the items that it has."""
        self.agree(STOPPED, reason)

    def stop_reason(self) -> str | None:
        """The reason that was first given to `stop`; None if no process has called it."""
        try:
            return (self.folder / STOPPED).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def pause(self, what: str) -> None:
        """Waits a moment for other processes; `what` describes what is missing, for the watchdog's message."""
        self.watchdog.enter("waiting for the other ranks", what)
        time.sleep(self._poll_seconds)
        self._poll_seconds = min(2 * self._poll_seconds, LONGEST_POLL_SECONDS)

    def hold(self, claim: Path) -> None:
        """Remembers a claim of this process: it is given back when the process leaves before it finished the item."""
        self.held.add(claim)
        self._poll_seconds = POLL_SECONDS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time can be in this block."""
        try:
            with locked_file(self.folder / LOCK, wait_seconds=LOCK_SECONDS):
                yield
        except HeldLockError as error:
            raise LostWorkerError(f"a process was stopped while it held the queue's lock: {error}") from error

    def _join(self) -> None:
        """Joins after the main rank of this start, which clears the queue if no other job is at work on it."""
        started = self.folder / f"start.{hashlib.sha256(self.ranks.start.encode()).hexdigest()[:16]}"
        give_up = time.monotonic() + self.stall_seconds
        while not self.ranks.is_main and not started.exists():
            if time.monotonic() > give_up:
                raise LostWorkerError(f"the main rank has given no sign for {self.stall_seconds:.0f} s")
            self.pause("the main rank has not begun")
        with self.locked():
            if self.ranks.is_main:
                names = os.listdir(self.folder)
                at_work = [name for name in names if name.startswith(MEMBER_PREFIX) and self.members.is_at_work(name)]
                if OVER in names or not at_work:
                    self._clear(keep=())
                started.touch()
            self.everyone_left = (self.folder / OVER).exists()
            if not self.everyone_left:
                self.members.join()

    def _leave(self) -> None:
        """Gives back the items that this process has claimed and not finished."""
        for claim in list(self.held):
            with contextlib.suppress(OSError):
                if claim.read_text(encoding="utf-8").startswith(self.members.name):
                    claim.unlink()
        self.members.leave()

    def _wait_for_others(self) -> None:
        """Waits until all processes have left, then closes the queue, unless another process has done so."""
        while not self.everyone_left:
            members = [name for name in os.listdir(self.folder) if name.startswith(MEMBER_PREFIX)]
            if others := [name for name in members if self.members.why_lost(name) is None]:
                self.pause(f"{len(others)} processes are still at work")
                continue
            if silent := [self.members.silent[name] for name in members if name in self.members.silent]:
                raise LostWorkerError(
                    f"{'; '.join(silent)}: the other ranks have done its share; the next start finds all of it done"
                )
            with self.locked():
                now = [name for name in os.listdir(self.folder) if name.startswith(MEMBER_PREFIX)]
                if set(now) <= set(members):  # no process has joined in the meantime
                    (self.folder / OVER).touch()  # for a process of these jobs that joins later
                    self._clear(keep=(OVER, "start."))
                    self.everyone_left = True

    def _clear(self, *, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if not path.name.startswith((LOCK, *keep)):
                remove(path)


class Share:
    """The items of one part of a task, and this process's claims among them."""

    def __init__(self, queue: WorkQueue, name: str, items: Sequence[str]) -> None:
        self.items, self._queue, self._share = items, queue, name
        self._numbers = {item: number for number, item in enumerate(items)}
        self._untried = deque(range(len(items)))
        self._pending = list(range(len(items)))

    def take(self) -> Iterator[str | None]:
        """Claims items, and returns when all are done, or the queue was stopped and the items in progress are done.

        Yields:
            An item to do; or None when there is no item to claim, because other processes have the rest. It is yielded
            when they have finished more, for a report, and always while this process has items to finish.

        Raises:
            QueueError: too many processes were lost while they did the same item.
            LostWorkerError: this process was stopped for so long that another start has replaced it.
        """
        seen = -1
        while (item := self._claim()) is not None or not self.is_done():
            if item is not None or self._queue.held or len(self._pending) != seen:
                yield item
            if item is None and not self._queue.held:
                seen = len(self._pending)
                self._queue.pause(f"{seen} of {len(self.items)} items ({self._share}) are not done")

    def finish(self, item: str, text: str = "", *, made: str | None = None) -> None:
        """Marks an item as done; its files must be on the disk.

        Args:
            item: an item that this process claimed.
            text: the item's result, for `results`.
            made: name of what was made now, for the launcher's count of progress; None if it existed before.
        """
        if made is not None and self._queue.run_folder is not None:
            note_done(self._queue.run_folder, self._queue.ranks, made)
        number = self._numbers[item]
        write_atomically(self._path(number, "done"), text)
        self._queue.held.discard(self._path(number, "claim"))

    def check(self, item: str) -> None:
        """Raises LostWorkerError if another process has taken over the item, because this one counted as lost."""
        if not (self._read_claim(self._numbers[item]) or "").startswith(self._queue.members.name):
            raise LostWorkerError(f"this process was stopped for so long that another one does '{item}'")

    def is_done(self) -> bool:
        """Whether all items are done; if the queue was stopped, whether no process is doing an item."""
        names = self._look()
        if not self._pending or self._queue.stop_reason() is None:
            return not self._pending
        return all(self._find_loss(number) for number in self._pending if self._name(number, "claim") in names)

    def num_done(self) -> int:
        """How many items are done, by all processes."""
        self._look()
        return len(self.items) - len(self._pending)

    def results(self) -> dict[str, str]:
        """The result of each item that is done, in the order of the items; nothing if everyone had left."""
        if self._queue.everyone_left:
            return {}
        self._look()
        done = sorted(set(range(len(self.items))).difference(self._pending))
        return {self.items[number]: self._path(number, "done").read_text(encoding="utf-8") for number in done}

    def _name(self, number: int, kind: str) -> str:
        return f"{self._share}.{number:07d}.{kind}"

    def _path(self, number: int, kind: str) -> Path:
        return self._queue.folder / self._name(number, kind)

    def _look(self) -> set[str]:
        """Finds the items that are not done; returns the names of the queue's files."""
        if self._queue.everyone_left:
            self._pending = []
            return set()
        names = set(os.listdir(self._queue.folder))
        if self._queue.members.name not in names:
            raise LostWorkerError("this process was stopped for so long that another start has replaced it")
        self._pending = [number for number in self._pending if self._name(number, "done") not in names]
        return names

    def _claim(self) -> str | None:
        """Claims an item that no process has, or whose process is lost; None if there is no such item now."""
        if self._queue.everyone_left or self._queue.stop_reason() is not None:
            return None
        while self._untried:  # without a listing, which may be long
            if self._create(number := self._untried.popleft()):
                return self.items[number]
        names = self._look()
        for number in self._pending:
            if self._path(number, "claim") in self._queue.held:
                continue
            if self._take_over(number) if self._name(number, "claim") in names else self._create(number):
                return self.items[number]
        return None

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
