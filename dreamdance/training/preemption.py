"""The wish to stop: set by a signal, read once per step, acted upon where all ranks agree.

The handler itself does nothing but remember, because a save is a collective and a signal arrives anywhere.
"""

import logging
import signal
from collections.abc import Callable
from types import FrameType

logger = logging.getLogger(__name__)

# SIGUSR2 is what Slurm sends before a time limit (NCCL catches SIGUSR1); SIGTERM is what everyone else sends.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """Remembers that this process was asked to stop; a context manager around the training loop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.received is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        logger.warning("%s: saving and stopping after this step", self.received.name)

    def hand_over(self) -> None:
        """Calls the handler that was there before ours, now that the run is saved: the launcher's requeues the job."""
        if self.received is None:
            return
        handler = self._previous.get(self.received)
        if callable(handler):
            handler(int(self.received), None)
