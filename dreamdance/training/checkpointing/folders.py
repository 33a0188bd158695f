"""The checkpoint folders of a run: finds those that count, creates new ones and deletes old ones.

A folder that is only partly deleted never counts. Only the main process uses this module; it does not know tensors,
ranks or the content of files.
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
        damaged: names of complete folders that were found to be damaged; they do not count as checkpoints to keep.
        resumed: name of the checkpoint from which this start resumed; it has been loaded, so this start keeps it.
    """

    def __init__(self, run: Path, section: Checkpoint) -> None:
        """Reads nothing yet.

        Args:
            run: the run folder.
            section: the recipe's `checkpoint` section.
        """
        self.run, self.section = run, section
        self.parent = run / "checkpoints"
        self.damaged: set[str] = set()
        self.resumed: str | None = None

    def check_writable(self) -> None:
        """Checks before the first step that checkpoints can be written.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        probe = self.parent / ".writable"
        with _as_checkpoint_error():
            self.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()

    def make(self, step: int) -> None:
        """Creates an empty folder for a step; deletes what an earlier save of this step left.

        Raises:
            CheckpointError: the folder cannot be created or emptied.
        """
        folder = checkpoint_folder(self.run, step)
        with _as_checkpoint_error():
            _delete(folder)
            folder.mkdir()  # without its parents: a run folder that was removed is not created again
        self.damaged.discard(folder.name)

    def newest(self) -> str:
        """Name of the checkpoint from which the next start would continue, judged by file sizes alone."""
        sound = [folder for folder in self._complete() if self._looks_sound(folder)]
        return sound[-1].name if sound else "step 0"

    def candidates(self) -> list[Path]:
        """All folders that count, newest first; deletes the folders of interrupted saves.

        Raises:
            CheckpointError: there are several folders and none counts; a run that is killed cannot leave this.
        """
        complete = self._complete()
        interrupted = [folder for folder in step_folders(self.parent) if folder not in complete]
        if not complete and len(interrupted) > 1:
            raise CheckpointError(
                f"none of the {len(interrupted)} checkpoints in {self.parent} has its {COMPLETE_FILE}: a run that is "
                "killed cannot leave this. Restore those files, or delete that folder to start over from step 0"
            )
        for folder in interrupted:
            logger.warning("deleting %s: it was being written or deleted when the run was killed", folder)
            _delete_if_possible(folder)
        return complete[::-1]

    def delete_old(self) -> None:
        """Deletes all but the last sound checkpoints, every n-th step and the one that this start resumed from.

        To be called only after a new checkpoint is complete and has been read back. A damaged checkpoint is deleted
        when it is older than all of the last sound ones: until then, the user may still repair it.
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
        """Whether all files exist with the right sizes; their content was verified when they were written."""
        if folder.name in self.damaged:
            return False
        try:
            return not complete_file.find_damage(folder, complete_file.read_manifest(folder).files, by_size_alone=True)
        except CheckpointError:
            return False


def _delete_if_possible(folder: Path) -> None:
    """Deletes a folder; an error is only logged, because a folder that remains does no harm but takes room."""
    try:
        _delete(folder)
    except OSError as error:
        logger.warning("%s is not needed any more, but cannot be deleted: %s", folder, error)


def _delete(folder: Path) -> None:
    """Deletes a checkpoint, COMPLETE first, so that a partly deleted one does not count.

    Raises:
        OSError: the folder cannot be deleted.
    """
    if folder.is_symlink():  # its target belongs to another run
        folder.unlink()
        return
    (folder / COMPLETE_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be saved: {error}. Make that folder writable, or choose another with --runs"
        ) from error
