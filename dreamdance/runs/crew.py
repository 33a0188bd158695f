"""This rank among those that share work without collectives: what is done by all, and whether all are still there.

Each watches itself (`watchdog`) and says from a thread that it lives; the main rank keeps the place where they meet and
listens. Of the main rank the others notice that it no longer answers. It must not know what the work is.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from dreamdance.errors import LostWorkerError
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.layout import note_done
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.watchdog import Watchdog

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.2

Answer = TypeVar("Answer")


class Crew:
    """A context manager around a rank's share; left without an error, it waits until all ranks are through.

    A rank that is stopped, or whose node is, falls silent: after `cluster.step_timeout_seconds` the main rank gives up
    with an error that has the job start again, and where the main rank is the silent one, the others end by their
    watchdogs. A rank that works says that it lives however long a piece of work takes: that is its watchdog's matter.
    """

    def __init__(self, ranks: Ranks, *, cluster: Cluster | None = None, run_folder: Path | None = None) -> None:
        """Knows nobody yet.

        Args:
            ranks: this process.
            cluster: how long is too long.
            run_folder: takes the note of what is done, by which it is judged whether the run got any further.
        """
        cluster = cluster or Cluster()
        self.ranks = ranks
        self.watchdog = Watchdog.of(cluster)
        is_watched = cluster.step_timeout_seconds > 0
        self.silence_seconds = float(cluster.step_timeout_seconds) if is_watched else math.inf
        self.stall_seconds = float(self.watchdog.unmeasured_seconds) if is_watched else math.inf
        self._job_seconds = 60.0 * cluster.time_minutes
        self._run_folder = run_folder
        self._store: Store | None = None
        self._num_through = 0
        self._lost: str | None = None
        self._is_called_off = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="crew", daemon=True)
        self._entered = ExitStack()

    def __enter__(self) -> "Crew":
        with ExitStack() as entered:
            entered.enter_context(self.watchdog)
            if self.ranks.world_size > 1:
                self._meet()
                entered.callback(self._over.set)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._entered:
            if kind is None and self._store is not None:
                self._leave()

    def finish(self, name: str | None = None) -> None:
        """One more piece of this rank's share is through.

        Args:
            name: if it was made now, and is on the disk.

        Raises:
            LostWorkerError: another rank is lost.
        """
        if name is not None and self._run_folder is not None:
            note_done(self._run_folder, self.ranks.rank, name)
        self._num_through += 1
        if self._store is not None:
            self._ask(lambda store: store.add("through", 1))
        self.check()

    def num_through(self) -> int:
        """How many pieces are through, of all ranks, in this start."""
        return self._num_through if self._store is None else self._ask(lambda store: store.add("through", 0))

    def pause(self, what: str) -> None:
        """A moment's wait for other ranks; to be called again and again.

        Args:
            what: is missing, in words.

        Raises:
            LostWorkerError: a rank is lost, so it will not come.
        """
        self.watchdog.enter("waiting for the other ranks", what)
        self.check(what)
        if self._store is None:
            raise LostWorkerError(f"{what}, and there is no other rank here")
        time.sleep(POLL_SECONDS)

    def check(self, what: str = "it cannot go on alone") -> None:
        """Looks whether all ranks are still there.

        Raises:
            LostWorkerError: one is not.
        """
        if self._lost is not None:
            raise LostWorkerError(f"{self._lost}: {what}. What is done is kept, the next start does the rest")

    def gather(self, text: str, on_wait: Callable[[], None]) -> list[str]:
        """On the main rank, the texts of all ranks, by rank, when all have given theirs; on the others nothing.

        Args:
            text: of this rank.
            on_wait: called now and then while others are still at work.

        Raises:
            LostWorkerError: a rank is lost.
        """
        if self._store is None:
            return [text]
        self._ask(lambda store: store.set(f"gathered/{self.ranks.rank}", text))
        if not self.ranks.is_main:
            return []
        keys = [f"gathered/{rank}" for rank in range(self.ranks.world_size)]
        while missing := sum(not self._has(key) for key in keys):
            on_wait()
            self.pause(f"{missing} of {len(keys)} ranks are not through")
        return [self._get(key) for key in keys]

    def exchange(self, name: str, text: str, on_wait: Callable[[], None] = lambda: None) -> list[str]:
        """On every rank, the texts of all ranks, by rank: no rank goes on before all have given theirs.

        Args:
            name: of this exchange; another one each time.
            text: of this rank.
            on_wait: called now and then while others are still at work.

        Raises:
            LostWorkerError: a rank is lost.
        """
        if self._store is None:
            return [text]
        self._ask(lambda store: store.set(f"{name}/{self.ranks.rank}", text))
        keys = [f"{name}/{rank}" for rank in range(self.ranks.world_size)]
        while missing := sum(not self._has(key) for key in keys):
            on_wait()
            self.pause(f"{missing} of {len(keys)} ranks have not got so far ({name})")
        texts = [self._get(key) for key in keys]
        self._ask(lambda store: store.add(f"{name}/read", 1))
        # The store ends with the main rank: it may leave when everybody has read.
        while self.ranks.is_main and self._ask(lambda store: store.add(f"{name}/read", 0)) < len(keys):
            self.pause(f"some ranks have not read all texts ({name})")
        return texts

    def call_off(self) -> None:
        """Has all ranks begin nothing more of what they share; what they have in hand they finish."""
        self._is_called_off = True
        if self._store is not None:
            self._ask(lambda store: store.set("called off", ""))

    def is_called_off(self) -> bool:
        """Whether any rank has called the work off."""
        if not self._is_called_off and self._store is not None:
            self._is_called_off = self._has("called off")
        return self._is_called_off

    def _meet(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.watchdog.enter("meeting the main rank", f"at {address}:{port}")
        patience = timedelta(seconds=min(self.stall_seconds, self._job_seconds))
        try:
            meeting = TCPStore(address, port, is_master=self.ranks.is_main, timeout=patience, wait_for_workers=False)
        except DistError as error:
            raise LostWorkerError(f"no meeting with the main rank at {address}:{port}: {error}") from error
        # Another job may have drawn this port: under the name of this start, its ranks are not taken for these.
        self._store = PrefixStore(self.ranks.start, meeting)
        self._ask(lambda store: store.add("through", 0))  # measures what an answer takes
        self._thread.start()

    def _leave(self) -> None:
        """Nobody leaves before all are through, so that each is missed who stops before."""
        if self.ranks.is_main:
            self._ask(lambda store: store.set("over", ""))
            # The store ends with this process; who still asks it would take that for a fault.
            left = [f"left/{rank}" for rank in range(1, self.ranks.world_size)]
            while not all(map(self._has, left)):
                self.pause("some ranks have not left")
            return
        while not self._has("over"):
            self.pause("the main rank is not through")
        self._over.set()
        self._thread.join()
        self._ask(lambda store: store.set(f"left/{self.ranks.rank}", ""))

    def _get(self, key: str) -> str:
        return self._ask(lambda store: store.get(key)).decode()

    def _has(self, key: str) -> bool:
        return self._ask(lambda store: store.check([key]))

    def _ask(self, question: Callable[[Store], Answer]) -> Answer:
        """Of a main rank that is gone there is an error; one that was stopped is this rank's watchdog's matter."""
        assert self._store is not None
        self.watchdog.enter("asking the main rank", f"rank {self.ranks.rank}", is_measured=True)
        try:
            answer = question(self._store)
        except DistError as error:
            raise LostWorkerError(f"the main rank is gone ({error}); the next start does the rest") from error
        self.watchdog.enter("going on", "after an answer")
        return answer

    def _beat(self) -> None:
        """Speaks, or on the main rank listens, until it is over."""
        say_or_hear = self._hear() if self.ranks.is_main else self._say()
        try:
            while self._lost is None and not self._over.is_set():
                next(say_or_hear)
                self._over.wait(BEAT_SECONDS)
        except DistError as error:
            self._lost = f"the main rank is gone ({error})"

    def _say(self) -> Iterator[None]:
        assert self._store is not None
        while True:
            self._store.add(f"beats/{self.ranks.rank}", 1)
            yield

    def _hear(self) -> Iterator[None]:
        assert self._store is not None
        others = range(1, self.ranks.world_size)
        heard, silent = dict.fromkeys(others, 0), dict.fromkeys(others, 0.0)
        last = time.monotonic()
        while True:
            now = time.monotonic()
            # Time in which not even this thread ran does not count: the job was suspended as a whole.
            elapsed, last = min(now - last, 2 * BEAT_SECONDS), now
            for rank in others:
                beats = self._store.add(f"beats/{rank}", 0)
                is_heard = beats != heard[rank] or self._store.check([f"left/{rank}"])
                heard[rank], silent[rank] = beats, 0.0 if is_heard else silent[rank] + elapsed
                if silent[rank] > (self.silence_seconds if beats else self.stall_seconds):
                    self._lost = f"rank {rank} has given no sign for {silent[rank]:.0f} s"
            yield
