"""Ends this process now, whatever its other threads hold or wait for: said as a last word, if it can be said at all."""

import faulthandler
import logging
import os
import signal
import sys

TRY_AGAIN_EXIT_CODE = 75
"""sysexits.h: a temporary failure, try again."""
LAST_WORDS_SECONDS = 15.0


def exit_process(
    logger: logging.Logger,
    text: str,
    *values: object,
    exit_code: int,
    level: int = logging.CRITICAL,
    with_stacks: bool = False,
) -> None:
    """Logs a line and ends the process, without returning to anyone.

    A thread that hangs may hold the log's lock, and the disk that the log lies on may be what hangs. Hence the kernel
    is asked first to end the process (by SIGALRM, for which no lock is needed) should the last words not get through.

    Args:
        logger: whose line it is.
        text: with `values` put in as logging does.
        exit_code: of the process; 128 + SIGALRM where the last words did not get through.
        level: of the line.
        with_stacks: also shows, on stderr, where every thread is.
    """
    signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_SECONDS)
    logger.log(level, text, *values)
    logging.shutdown()
    if with_stacks:
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(exit_code)
