"""Stop signals: recorded on arrival, read once per step, acted on when all ranks agree.

A save is a collective and a signal may arrive anywhere, so the signal is only recorded. If the run is not saved in time
because some rank hangs, the process ends itself, so that the job can start again.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable

from dreamdance.runtime.exits import LAST_LINE_SECONDS, TRY_AGAIN_EXIT_CODE, exit_process
from dreamdance.runtime.signals import SignalListener

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether this process was asked to stop; a context manager around the training loop.

    Attributes:
        received: the first stop signal, or None.
    """

    def __init__(
        self,
        *,
        save_limit_seconds: float | None = None,
        on_signal: Callable[[signal.Signals], None] | None = None,
    ) -> None:
        """Prepares; signals are received within the `with` block.

        Args:
            save_limit_seconds: how long after the first signal the process waits for the run to be saved. Then it ends
                itself and writes all stacks to stderr. None waits without limit.
            on_signal: called with the first signal, in the listener's thread.
        """
        self.received: signal.Signals | None = None
        self._save_limit_seconds = save_limit_seconds
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
        # The timers first: the lines below write to disks, and a disk that hangs may be why the run is not saved.
        if self._save_limit_seconds is not None:
            # The kernel's timer, for the case that no other thread of this process gets to run.
            signal.setitimer(signal.ITIMER_REAL, self._save_limit_seconds + LAST_LINE_SECONDS)
            self._timer = threading.Timer(self._save_limit_seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        logger.warning("%s: saving and stopping after this step", number.name)
        if self._on_signal is not None:
            with contextlib.suppress(OSError):  # an I/O error must not end this thread
                self._on_signal(number)

    def _give_up(self) -> None:
        exit_process(
            logger,
            "the run was not saved within %.0f s of %s: this process ends, the next start resumes from the newest "
            "checkpoint; every thread's stack follows",
            self._save_limit_seconds,
            self.received.name if self.received else "a signal",
            exit_code=TRY_AGAIN_EXIT_CODE,
            with_stacks=True,
        )
