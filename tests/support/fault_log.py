"""Lines for the table of faults: how a test injected a fault, what the software promised, and what happened."""

import json
import os
from pathlib import Path

FAULT_LOG = "DREAMDANCE_FAULT_LOG"


def record_fault(
    fault: str,
    *,
    how: str,
    promised: str,
    happened: str,
    detected_seconds: float | None = None,
    resumed_seconds: float | None = None,
    steps_lost: int | None = None,
) -> None:
    """Appends a line of JSON to the file that `DREAMDANCE_FAULT_LOG` names; without the variable, does nothing.

    Call it after the assertions of the test.

    Args:
        fault: name of the fault.
        how: how the test injected it.
        promised: the behaviour that the software promises.
        happened: the behaviour that the test observed.
        detected_seconds: time from the fault to the error or the end; None if there is nothing to detect.
        resumed_seconds: time from the fault to the first step after it.
        steps_lost: number of steps done again.
    """
    path = os.environ.get(FAULT_LOG)
    if path is None:
        return
    line = {
        "fault": fault,
        "how": how,
        "promised": promised,
        "happened": happened,
        "detected_seconds": None if detected_seconds is None else round(detected_seconds, 3),
        "resumed_seconds": None if resumed_seconds is None else round(resumed_seconds, 3),
        "steps_lost": steps_lost,
    }
    with Path(path).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
