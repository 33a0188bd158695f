"""Prevents two starts of one run from writing into its folder at the same time.

When a node's slurmd dies, Slurm gives the node up and starts the job on other nodes, but the ranks on the lost node
continue. The start that began last owns the run folder; a start that finds another owner ends at once. The members of
one array own the folder together, and each excludes earlier starts of itself.
"""

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from dreamdance.runs.array_member import array_member, sharing
from dreamdance.runs.files import write_atomically
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE, exit_process

logger = logging.getLogger(__name__)

# `srun` reports the highest exit code of all ranks; a rank that is killed together with this one has up to 128 + 64.
REPLACED_EXIT_CODE = 200
LOOK_EVERY_SECONDS = 2.0
# After so many checks without a run folder, the folder or its storage was removed: nothing can be saved any more.
NUM_CHECKS_WITHOUT_FOLDER = 30


class RunOwnership:
    """Makes this start the owner of a run folder, and ends the process when another start becomes the owner."""

    def __init__(self, run_folder: Path) -> None:
        own = f"{socket.gethostname()} process {os.getpid()} since {time.time():.3f} {uuid.uuid4().hex}\n"
        logs, member = run_folder / "logs", array_member()
        self._run_folder, self._texts = run_folder, {logs / "owner.txt": own}
        if member is not None:
            self._texts = {logs / "owner.txt": f"{sharing(run_folder)}\n", logs / f"owner_{member.number}.txt": own}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="run ownership", daemon=True)

    def __enter__(self) -> "RunOwnership":
        for file, text in self._texts.items():
            write_atomically(file, text)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()  # without joining the thread: storage that hangs must not keep a job from ending

    def _watch(self) -> None:
        checks_left = NUM_CHECKS_WITHOUT_FOLDER
        while not self._over.wait(LOOK_EVERY_SECONDS):
            try:
                owners = {file: file.read_text(encoding="utf-8") for file in self._texts}
            except OSError:  # an I/O error does not tell who owns the run
                checks_left = checks_left - 1 if _is_gone(self._run_folder) else NUM_CHECKS_WITHOUT_FOLDER
                if not checks_left:
                    text = "the run folder %s is gone (removed, or its storage is away): this process ends"
                    exit_process(logger, text, self._run_folder, exit_code=TRY_AGAIN_EXIT_CODE)
                continue
            checks_left = NUM_CHECKS_WITHOUT_FOLDER
            other = next((owner for file, owner in owners.items() if owner != self._texts[file]), None)
            if other is not None and not self._over.is_set():
                text = "another start owns this run now (%s): this process ends without saving"
                exit_process(logger, text, other.strip(), exit_code=REPLACED_EXIT_CODE)


def _is_gone(folder: Path) -> bool:
    """Whether the folder does not exist; False where an I/O error leaves that open."""
    try:
        folder.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False
