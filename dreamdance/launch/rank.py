"""The program of every process of a job: python -P -m dreamdance.launch.rank LOGS, the folder `logs` of the run."""

import sys
from pathlib import Path

from dreamdance.runtime.exits import process_without_teardown

ENDING_SECONDS = 60.0

if __name__ == "__main__":
    with process_without_teardown(ENDING_SECONDS):
        from dreamdance.launch.job import Job  # here, so that exit handlers of what it imports are run

        # In an array, the folder is a link to the run's own `logs`.
        Job(Path(sys.argv[1]).resolve().parent)()
