"""What every process of a job runs: python -P -m dreamdance.launch.rank LOGS, the folder `logs` of the run."""

import sys
from pathlib import Path

from dreamdance.launch.job import Job

if __name__ == "__main__":
    # Of an array, the folder is a link to the run's own.
    Job(Path(sys.argv[1]).resolve().parent)()
