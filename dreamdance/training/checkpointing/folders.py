"""The checkpoint folders of a run: which count, which are kept, and how one goes without ever counting by half.

Pure file work, on the main process alone: knows nothing of tensors, of ranks, or of what the files hold.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from dreamdance.errors import CheckpointError
from dreamdance.recipe.schema import Checkpoint
from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder, step_folders, step_of
from dreamdance.training.checkpointing import complete_file

logger = logging.getLogger(__name__)


class CheckpointFolders:
    """All checkpoints of one run.

    Attributes:
        damaged: names of complete folders that were found damaged; they are never counted among those to keep.
        resumed: the name of the one that this start went on from: proved to load, so it stays as long as this start.
    """

    def __init__(self, run: Path, section: Checkpoint) -> None:
        """Looks at nothing yet.

        Args:
            run: the run folder.
            section: what to keep.
        """
        self.run, self.section = run, section
        self.parent = run / "checkpoints"
        self.damaged: set[str] = set()
        self.resumed: str | None = None

    def check_writable(self) -> None:
        """Finds out before the first step, not at the first save.

        Raises:
            CheckpointError: nothing can be written there.
        """
        probe = self.parent / ".writable"
        with _naming_what_fails():
            self.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()

    def make(self, step: int) -> None:
        """Makes an empty folder for a step; what an earlier save of it left, cut short or damaged, goes.

        Raises:
            CheckpointError: that cannot be done.
        """
        folder = checkpoint_folder(self.run, step)
        with _naming_what_fails():
            _delete(folder)
            folder.mkdir()  # without its parents: a run folder that was removed does not come back
        self.damaged.discard(folder.name)

    def newest(self) -> str:
        """The name of what a next start would go on from, as far as can be told without reading all of it."""
        sound = [folder for folder in self._complete() if self._looks_sound(folder)]
        return sound[-1].name if sound else "step 0"

    def candidates(self) -> list[Path]:
        """All folders that count, newest first, after deleting those cut short in the making.

        Raises:
            CheckpointError: there are several, of which none counts; no kill leaves that behind.
        """
        complete = self._complete()
        cut_short = [folder for folder in step_folders(self.parent) if folder not in complete]
        if not complete and len(cut_short) > 1:
            raise CheckpointError(
                f"none of the {len(cut_short)} checkpoints in {self.parent} has its {COMPLETE_FILE}: a run that is "
                "killed never leaves that. Bring those files back, or delete that folder to start over from step 0"
            )
        for folder in cut_short:
            logger.warning("deleting %s: it was being written or deleted when the run was killed", folder)
            _delete_if_possible(folder)
        return complete[::-1]

    def delete_old(self) -> None:
        """Keeps the last few sound ones, every n-th step and the one resumed from.

        To be called only after a new one has been read back and is complete. Damaged ones go when they are older than
        all of the last few: until then, they may still be mended.
        """
        folders = self._complete()
        last = list(islice(filter(self._looks_sound, reversed(folders)), self.section.keep_last))
        if len(last) < self.section.keep_last:
            return
        every = self.section.keep_every_steps
        for folder in folders[: folders.index(last[-1])]:
            step = step_of(folder) or 0
            if folder.name != self.resumed and (every is None or step % every):
                _delete_if_possible(folder)

    def _complete(self) -> list[Path]:
        return [folder for folder in step_folders(self.parent) if (folder / COMPLETE_FILE).is_file()]

    def _looks_sound(self, folder: Path) -> bool:
        """Whether all files are there in their sizes; their content was verified when they were written."""
        if folder.name in self.damaged:
            return False
        try:
            return not complete_file.damage(folder, complete_file.read_manifest(folder).files, by_size_alone=True)
        except CheckpointError:
            return False


def _delete_if_possible(folder: Path) -> None:
    """What remains of it only takes room: that is no reason to end a run."""
    try:
        _delete(folder)
    except OSError as error:
        logger.warning("%s is not needed any more, but cannot be deleted: %s", folder, error)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint so that, cut short, what remains does not count.

    Raises:
        OSError: that is not permitted.
    """
    if folder.is_symlink():  # what it leads to belongs to another run
        folder.unlink()
        return
    (folder / COMPLETE_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _naming_what_fails() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be saved: {error}. Make that folder writable, or give another --runs"
        ) from error
