"""Writing a rank's files of a checkpoint: in a thread, hashed on the way, read back, tried again before it is given up.

Knows nothing of what the files hold, or of other ranks.
"""

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch

from dreamdance.training.checkpointing.complete_file import RETRY_AFTER_SECONDS, FileRecord, HashedFile, write_file

logger = logging.getLogger(__name__)


def write_files(folder: Path, files: Mapping[Path, Any]) -> list[FileRecord]:
    """Writes files of a checkpoint and makes sure that they lie on the disk as they were meant.

    Args:
        folder: the checkpoint's.
        files: path -> a text, or anything for `torch.save`.

    Raises:
        OSError: a file could not be written, in spite of further attempts.
    """
    return [_write(path, folder, content) for path, content in files.items()]


def _write(path: Path, folder: Path, content: Any) -> FileRecord:
    write = partial(_write_text if isinstance(content, str) else _write_tensors, content)
    for pause in RETRY_AFTER_SECONDS:
        try:
            return write_file(path, folder, write)
        except OSError as error:
            logger.warning("writing %s failed, trying again in %g s: %s", path, pause, error)
            time.sleep(pause)
    return write_file(path, folder, write)


def _write_text(text: str, file: HashedFile) -> None:
    file.write(text.encode())


def _write_tensors(content: Any, file: HashedFile) -> None:
    """`torch.save` without its own checksums: ours is better, and they took longer than all the rest."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, cast(IO[bytes], file))
    except RuntimeError as error:
        raise file.error or error from None
    finally:
        torch.serialization.set_crc32_options(checksums)
