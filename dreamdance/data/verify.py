"""Checks a folder of shards before anything is read from it, so that damage is an error that names the shard.

The library itself ends an epoch early or hangs on a damaged shard, and never looks again at one that lies on the local
disk (FACTS.md).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from dreamdance.data.shard_cache import check_bytes, check_samples, open_index, samples_table_bytes
from dreamdance.data.shard_index import ShardEntry, ShardFile, ShardIndex
from dreamdance.errors import ShardError
from dreamdance.ranks import Ranks
from dreamdance.recipe.sections import Shards

logger = logging.getLogger(__name__)

REPORT_EVERY_SECONDS = 10.0


def open_shards(
    shards: Shards,
    *,
    how: Literal["size", "hash"] = "hash",
    ranks: Ranks | None = None,
    before_shard: Callable[[str], None] | None = None,
) -> ShardIndex:
    """Fetches and checks the index on every rank; the files themselves are checked by one rank of each node.

    Args:
        shards: where they are read, and where they come from.
        how: compare the sizes of the files, or their hashes too (reads all that is on the local disk).
        ranks: this process; by default from the environment.
        before_shard: called with each shard's number in words, before it is checked.

    Raises:
        ShardError: naming the file and what is wrong with it.
    """
    index = open_index(shards)
    if (ranks or Ranks.from_environment()).local_rank == 0:
        verify_shards(index, how=how, remote=shards.remote, before_shard=before_shard)
    return index


def verify_shards(
    index: ShardIndex,
    *,
    how: Literal["size", "hash"] = "hash",
    remote: str | None = None,
    before_shard: Callable[[str], None] | None = None,
) -> None:
    """Checks the files that lie in the index's folder.

    Without a remote folder every shard must be there and whole. What can be fetched or unpacked again (a download, or
    the unpacked form of a compressed shard) is removed with a warning instead, and made anew when it is read.

    Raises:
        ShardError: a shard is missing or damaged.
    """
    next_report = time.monotonic() + REPORT_EVERY_SECONDS
    for number, entry in enumerate(index.shards):
        if before_shard is not None:
            before_shard(f"shard {number + 1} of {len(index.shards)} in {index.folder}")
        stored = _check_file(index.folder, entry, entry.stored, how=how, replaceable=remote is not None)
        if not stored and remote is None:
            raise ShardError(f"shard {index.folder / entry.stored.name} is missing; prepare it again or copy it there")
        if entry.compressed is not None:
            _check_file(index.folder, entry, entry.raw, how=how, replaceable=True)
        if time.monotonic() > next_report:
            logger.info("checked %d of %d shards in %s", number + 1, len(index.shards), index.folder)
            next_report = time.monotonic() + REPORT_EVERY_SECONDS


def _check_file(folder: Path, entry: ShardEntry, file: ShardFile, *, how: str, replaceable: bool) -> bool:
    """Whether the file is there and sound; a damaged one is removed if it is replaceable, else an error."""
    path = folder / file.name
    try:
        if not path.is_file():
            return False
        _compare(path, entry, file, how=how)
    except FileNotFoundError:  # another process that shares the folder has just removed it
        return False
    except ShardError as error:
        if not replaceable:
            raise
        logger.warning("%s; removed, it will be made anew", error)
        path.unlink(missing_ok=True)
        return False
    return True


def _compare(path: Path, entry: ShardEntry, file: ShardFile, *, how: str) -> None:
    num_bytes = path.stat().st_size
    if num_bytes != file.num_bytes:
        raise ShardError(f"shard {path} is damaged: {num_bytes} bytes, the index says {file.num_bytes}")
    if how == "hash":
        check_bytes(path.read_bytes(), file, where=str(path))
    if file is entry.raw:
        with path.open("rb") as shard:
            check_samples(shard.read(samples_table_bytes(entry)), num_bytes, entry, where=str(path))
