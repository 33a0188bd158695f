"""What every process of a job runs: python -P -m dreamdance.launch.rank LOGS, the folder `logs` of the run."""

import signal
import sys
from pathlib import Path

from dreamdance.launch.job import Job

ENDING_SECONDS = 60.0

if __name__ == "__main__":
    try:
        # Of an array, the folder is a link to the run's own.
        Job(Path(sys.argv[1]).resolve().parent)()
    finally:
        # Whatever is still there then, a thread in a disk that hangs, must not keep the other ranks waiting.
        signal.setitimer(signal.ITIMER_REAL, ENDING_SECONDS)
