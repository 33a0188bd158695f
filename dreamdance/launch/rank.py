"""The program of every process of a job: python -P -m dreamdance.launch.rank LOGS, the folder `logs` of the run."""

import signal
import sys
from pathlib import Path

from dreamdance.launch.job import Job

# How long a process may take to exit; then the kernel ends it, e.g. because a thread is stuck in I/O.
ENDING_SECONDS = 60.0

if __name__ == "__main__":
    try:
        # In an array, the folder is a link to the run's own `logs`.
        Job(Path(sys.argv[1]).resolve().parent)()
    finally:
        signal.setitimer(signal.ITIMER_REAL, ENDING_SECONDS)
