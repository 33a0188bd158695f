"""Receives signals in a thread, because Python's own handlers wait for the main thread, which may be in a collective.

Python runs a handler between two instructions of the main thread, so never while that thread waits inside gloo, NCCL or
a socket. The interpreter's C code, however, writes a byte into the "wakeup" file at once, and a thread can read that.
"""

import signal
import socket
import threading
from collections.abc import Callable, Collection
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

# SIGUSR2 is what Slurm sends before a time limit (NCCL catches SIGUSR1); SIGTERM is what everyone else sends.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_NO_SIGNAL = b"\0"


class SignalListener:
    """Calls a function, in a thread of its own, for every signal of some kinds; a context manager of the main thread.

    Processes that are started within have these signals blocked: Slurm sends them to every process of a job, and the
    warning for a rank must not end its data workers. Workers end when their rank ends.
    """

    def __init__(
        self, on_signal: Callable[[signal.Signals], None], numbers: Collection[signal.Signals] = STOP_SIGNALS
    ) -> None:
        self._on_signal = on_signal
        self._numbers = frozenset(numbers)
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "SignalListener":
        self._receiving, self._sending = socket.socketpair()
        self._sending.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signal listener", daemon=True)
        # Without a handler the signal would end the process; the handler does nothing, the wakeup file is read.
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        self._previous_file = signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
        self._previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        # Started here and not by the first worker: the tracker must inherit the blocked signals. Starting it unblocks
        # SIGTERM in this thread.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._previous_file, warn_on_full_buffer=False)
        self._sending.send(_NO_SIGNAL)
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        self._receiving.close()
        self._sending.close()

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        while (received := self._receiving.recv(1)) not in (_NO_SIGNAL, b""):
            if received[0] in self._numbers:  # every signal that Python handles arrives here, also SIGINT
                self._on_signal(signal.Signals(received[0]))
