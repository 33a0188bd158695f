"""Ends of processes that neither hang nor abort: at once after a last line, or as usual without Python's teardown."""

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator

TRY_AGAIN_EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: a temporary failure
# How long logging may take before the kernel ends the process.
LAST_LINE_SECONDS = 15.0


_before_good_exit: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_good_exit(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, `exit_process` calls `action` before it ends this process with exit code 0."""
    _before_good_exit.append(action)
    try:
        yield
    finally:
        _before_good_exit.remove(action)


def exit_process(
    logger: logging.Logger,
    text: str,
    *values: object,
    exit_code: int,
    level: int = logging.CRITICAL,
    with_stacks: bool = False,
) -> None:
    """Logs a line and ends the process; no `finally` block and no exit handler runs.

    A hanging thread may hold the log's lock, or the log's disk may hang. A timer is therefore set first: if logging
    takes too long, the kernel ends the process by SIGALRM, which needs no lock.

    Args:
        logger: logs the line.
        text: the line, with `%` placeholders for `values`.
        exit_code: the process's exit code; 128 + SIGALRM if the line could not be logged in time.
        level: the line's level.
        with_stacks: whether every thread's stack is written to stderr, too.
    """
    signal.setitimer(signal.ITIMER_REAL, LAST_LINE_SECONDS)
    logger.log(level, text, *values)
    for action in _before_good_exit if exit_code == 0 else ():
        with contextlib.suppress(Exception):  # whatever it is, this process ends
            action()
    logging.shutdown()
    if with_stacks:
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(exit_code)


@contextlib.contextmanager
def process_without_teardown(ending_seconds: float) -> Iterator[None]:
    """After the block, this process ends as usual, with all exit handlers, but the interpreter is not torn down.

    During the teardown, a thread that needs the interpreter aborts the process after all its work: one of gloo's that
    releases a tensor ("terminate called without an active exception"). The exit code is that which Python gives:
    0, that of SystemExit, 1 after another error; 130 after Ctrl-C; 120 if the output could not be written.

    Exit handlers run in the reverse order of their registration. So what registers one must be imported within the
    block; a handler from before it does not run (that of `logging` alone is made up for).

    Args:
        ending_seconds: how long the end may take; then the kernel ends the process by SIGALRM, e.g. because a thread
            is stuck in I/O.
    """
    exit_code = 1

    def end() -> None:
        logging.shutdown()
        lost = False
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None and not stream.closed:  # None: it was closed when the process began
                    stream.flush()
            except OSError:
                lost = True
        os._exit(120 if lost else exit_code)

    atexit.register(end)
    try:
        yield
        exit_code = 0
    except SystemExit as ending:
        exit_code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
    except KeyboardInterrupt:
        exit_code = 128 + signal.SIGINT
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, ending_seconds)
