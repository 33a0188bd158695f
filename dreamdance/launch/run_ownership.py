"""Keeps two starts of one run apart: a rank that Slurm lost sight of must not write beside the one that replaced it.

When a node's slurmd dies, Slurm gives the node up and starts the job elsewhere; the ranks on that node know nothing of
it and go on. The last to begin has the run folder; a start that finds itself replaced ends at once.
"""

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from dreamdance.runs.files import write_atomically
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE, exit_process

logger = logging.getLogger(__name__)

# Of all ranks' codes `srun` reports the highest; a rank that is killed along with this one has up to 128 + 64.
REPLACED_EXIT_CODE = 200
LOOK_EVERY_SECONDS = 2.0
GONE_LOOKS = 30
"""A run folder that is not there for so many looks was removed, or its storage was: nothing can be saved any more."""


class RunOwnership:
    """Claims a run folder for this start, and ends the process when another one claims it; a context manager."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder, self._file = run_folder, run_folder / "logs" / "owner.txt"
        self._own = f"{socket.gethostname()} process {os.getpid()} since {time.time():.3f} {uuid.uuid4().hex}\n"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run ownership", daemon=True)

    def __enter__(self) -> "RunOwnership":
        write_atomically(self._file, self._own)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()  # not waited for: storage that hangs must not keep a job from ending

    def _watch(self) -> None:
        looks_left = GONE_LOOKS
        while not self._over.wait(LOOK_EVERY_SECONDS):
            try:
                owner = self._file.read_text(encoding="utf-8")
            except OSError:  # a file system that stumbles says nothing about who owns the run
                looks_left = looks_left - 1 if _is_gone(self._run_folder) else GONE_LOOKS
                if not looks_left:
                    text = "the run folder %s is gone (removed, or its storage is away): ending here"
                    exit_process(logger, text, self._run_folder, exit_code=TRY_AGAIN_EXIT_CODE)
                continue
            looks_left = GONE_LOOKS
            if owner != self._own and not self._over.is_set():
                text = "this run goes on elsewhere (%s): ending here, without saving"
                exit_process(logger, text, owner.strip(), exit_code=REPLACED_EXIT_CODE)


def _is_gone(folder: Path) -> bool:
    """Whether the file system says that there is no such folder, and not that it cannot tell."""
    try:
        folder.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False
