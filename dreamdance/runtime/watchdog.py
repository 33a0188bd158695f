"""Ends this process when it hangs, and logs where, so that the job can start again.

A rank that hangs, or that waits for a rank that hangs, would stay in a collective until the time-out, or without limit.
Every rank watches itself from a thread. Where a rank cannot (it is stopped, or swapped out), the watchdogs of the ranks
that wait for it act. The watchdog does not know what the activities are.
"""

import logging
import statistics
import threading
import time
from collections import defaultdict, deque
from typing import Protocol

from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE, exit_process

logger = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 0.5
TOLERANCE = 10  # an activity may take so many times its median duration
_REMEMBERED = 50


class TimeLimits(Protocol):
    """Has the limits that the section `cluster` of a recipe states."""

    @property
    def step_timeout_seconds(self) -> float:
        """The lowest limit of any activity; 0 means no limits."""

    @property
    def collective_timeout_seconds(self) -> float:
        """The limit of an activity that has not been measured."""


class Watchdog:
    """Ends the process when an activity takes too long; a context manager around the training loop.

    The limit is measured: `TOLERANCE` times the median duration of the activity so far, but at least `least_seconds`.
    The first time, and for rare activities, the limit is `unmeasured_seconds`: first steps compile and tune, a save
    waits for a slow disk.
    """

    def __init__(self, *, least_seconds: float, unmeasured_seconds: float) -> None:
        """Prepares; the thread starts with the `with` block.

        Args:
            least_seconds: the lowest limit of any activity; 0 turns the watchdog off.
            unmeasured_seconds: the limit of an activity that has not been measured.
        """
        self.least_seconds, self.unmeasured_seconds = least_seconds, max(least_seconds, unmeasured_seconds)
        self._measured: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._lock = threading.Lock()
        self._activity, self._where, self._limit, self._key = "", "", float("inf"), "collective"
        self._entered = 0.0
        self._elapsed = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @classmethod
    def from_limits(cls, limits: TimeLimits) -> "Watchdog":
        """A watchdog with the limits of a recipe."""
        return cls(least_seconds=limits.step_timeout_seconds, unmeasured_seconds=limits.collective_timeout_seconds)

    def __enter__(self) -> "Watchdog":
        if self.least_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def enter(self, activity: str, where: str, *, is_measured: bool = False) -> None:
        """Ends the previous activity and starts the limit of this one.

        Args:
            activity: its name; the same words each time.
            where: distinguishes this time from the others, e.g. the step.
            is_measured: whether the limit follows from the activity's earlier durations.
        """
        now = time.monotonic()
        with self._lock:
            if self._activity:
                self._measured[self._activity].append(now - self._entered)
            limit = self.limit_seconds(activity) if is_measured else self.unmeasured_seconds
            self._key = "step" if is_measured and self._measured[activity] else "collective"
            self._activity, self._where, self._limit = activity, where, limit
            self._entered, self._elapsed = now, 0.0

    def limit_seconds(self, activity: str) -> float:
        """How long an activity may take the next time, from its measured durations."""
        if not (durations := self._measured[activity]):
            return self.unmeasured_seconds
        return max(self.least_seconds, TOLERANCE * statistics.median(durations))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(LOOK_EVERY_SECONDS):
            now = time.monotonic()
            with self._lock:
                # Time in which this thread did not run either does not count: a suspended job does not hang.
                self._elapsed += min(now - last, 2 * LOOK_EVERY_SECONDS)
                is_late = self._elapsed > self._limit
            last = now
            if is_late:
                self._end()

    def _end(self) -> None:
        exit_process(
            logger,
            "%s (%s) has taken over %.0f s: this process, or one that it waits for, hangs. This process ends, the next "
            "start resumes from what is saved; see cluster.%s_timeout_seconds. Every thread's stack follows",
            self._activity,
            self._where,
            self._limit,
            self._key,
            exit_code=TRY_AGAIN_EXIT_CODE,
            with_stacks=True,
        )
