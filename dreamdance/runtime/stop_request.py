"""The wish to stop: heard at any moment, read once per step, acted upon where all ranks agree.

What hears it does nothing but remember, because a save is a collective and a signal arrives anywhere. Only when the
step's end is not reached in time, because some rank hangs, does it end the process, so that the job can start again.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable

from dreamdance.runtime.exits import LAST_WORDS_SECONDS, TRY_AGAIN_EXIT_CODE, exit_process
from dreamdance.runtime.signals import SignalListener

logger = logging.getLogger(__name__)


class StopRequest:
    """Remembers that this process was asked to stop; a context manager around the training loop.

    Attributes:
        received: the first signal that asked.
    """

    def __init__(
        self,
        *,
        patience_seconds: float | None = None,
        on_signal: Callable[[signal.Signals], None] | None = None,
    ) -> None:
        """Prepares, but does not listen yet.

        Args:
            patience_seconds: how long after the first signal this process ends itself, with all its stacks on stderr,
                if the run has not been saved by then; None waits for ever.
            on_signal: also called for the first signal, in the listener's thread.
        """
        self.received: signal.Signals | None = None
        self._patience_seconds = patience_seconds
        self._on_signal = on_signal
        self._listener = SignalListener(self._remember)
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        self._listener.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.__exit__(*exception)
        if self._timer is not None:
            self._timer.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __bool__(self) -> bool:
        return self.received is not None

    def _remember(self, number: signal.Signals) -> None:
        if self.received is not None:
            return
        self.received = number
        # The timers first: what follows writes to disks, and one that hangs may be why the run is not saved in time.
        if self._patience_seconds is not None:
            # The kernel's own, for the case that not even another thread of this process gets to run.
            signal.setitimer(signal.ITIMER_REAL, self._patience_seconds + LAST_WORDS_SECONDS)
            self._timer = threading.Timer(self._patience_seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        logger.warning("%s: saving and stopping after this step", number.name)
        if self._on_signal is not None:
            with contextlib.suppress(OSError):  # a disk that stumbles must not end this thread
                self._on_signal(number)

    def _give_up(self) -> None:
        exit_process(
            logger,
            "not saved %.0f s after %s: ending now, to go on from the newest checkpoint; every thread's stack follows",
            self._patience_seconds,
            self.received.name if self.received else "a signal",
            exit_code=TRY_AGAIN_EXIT_CODE,
            with_stacks=True,
        )
