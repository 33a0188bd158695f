"""Lines for the table of faults: what was done to the software in a test, what it promised, and what it did."""

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
    """Appends a line of JSON to the file that the environment names; without that, does nothing.

    Args:
        fault: what broke.
        how: it was injected.
        promised: what must hold.
        happened: what did; call this after the test's own assertions.
        detected_seconds: from the fault to the error or the end, None where that means nothing.
        resumed_seconds: from the fault to the first step after it.
        steps_lost: steps done again.
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
