"""Checks shards before anything is read from them, so that damage is an error that names the shard.

The library itself ends an epoch early or hangs on a damaged shard, and never checks one that lies on the local disk
(dreamdance/README.md, "The stack"). A start compares only the files' sizes. The process that opens a file first hashes
it and notes that.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dreamdance.data.shards.cache import fetch_shard, open_index
from dreamdance.data.shards.files import check_size, compare_file
from dreamdance.data.shards.index import ShardEntry, ShardFile, ShardIndex
from dreamdance.data.shards.notes import ShardNotes
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runs.file_states import FileStamp
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

REPORT_EVERY_SECONDS = 10.0
STAT_THREADS = 16  # a file's size on shared storage is a round trip, of which many fit into one time
NAMED_FILES = 10


def open_shards(
    shards: Shards,
    *,
    how: Verify = "first_use",
    ranks: Ranks | None = None,
    before_shard: Callable[[str], None] | None = None,
) -> ShardIndex:
    """Fetches and checks the index on every rank; the files themselves are checked by one rank of each node.

    Args:
        shards: where they are read, and where they come from.
        how: see `verify_shards`.
        ranks: this process; by default from the environment.
        before_shard: see `verify_shards`.

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
    how: Verify = "hash",
    remote: str | None = None,
    before_shard: Callable[[str], None] | None = None,
    numbers: Iterable[int] | None = None,
) -> None:
    """Checks the files that lie in the index's folder.

    Without a remote folder every shard must be there and whole. What can be fetched or unpacked again (a download, or
    the unpacked form of a compressed shard) is removed with a warning instead, and made again when it is read.

    Args:
        index: of the folder.
        how: `first_use` asks for the sizes of what must be there, and reads nothing; `size` reads each shard's table
            of samples too; `hash` reads everything, whatever is noted, and notes it.
        remote: where the shards come from.
        before_shard: called with each shard's number in words before it is read, and once before sizes are compared.
        numbers: of the shards to read; then no others are looked at. All by default.

    Raises:
        ShardError: a shard is missing or damaged.
    """
    if remote is None and numbers is None:
        if before_shard is not None:
            before_shard(f"the sizes of {len(index.shards)} shards in {index.folder}")
        _check_sizes(index)
    if how == "first_use":
        return
    next_report = time.monotonic() + REPORT_EVERY_SECONDS
    notes = ShardNotes(index.folder)
    for number in range(len(index.shards)) if numbers is None else numbers:
        entry = index.shards[number]
        if before_shard is not None:
            before_shard(f"shard {number + 1} of {len(index.shards)} in {index.folder}")
        stored = _check_file(index, entry, entry.stored, notes, how=how, replaceable=remote is not None)
        if not stored and remote is None:
            raise _missing(index, entry)
        if entry.compressed is not None:
            _check_file(index, entry, entry.raw, notes, how=how, replaceable=True)
        if time.monotonic() > next_report:
            logger.info("checked shard %d of %d in %s", number + 1, len(index.shards), index.folder)
            next_report = time.monotonic() + REPORT_EVERY_SECONDS


class CheckedShards:
    """The shards of an index, each compared with it in the state in which it is opened; missing ones are fetched.

    Every process that reads has one. What was compared by any of them, in any run, is known by its note.
    """

    def __init__(self, index: ShardIndex, *, remote: str | None, by_hash: bool) -> None:
        """Looks at nothing yet.

        Args:
            index: of the local folder.
            remote: where the shards come from, if not from there.
            by_hash: whether files that are not noted are hashed; if not, only their sizes and tables are compared.
        """
        self.index, self.remote, self.by_hash = index, remote, by_hash
        self._notes = ShardNotes(index.folder)
        self._sound: dict[int, FileStamp] = {}

    def require(self, number: int) -> None:
        """Makes sure that a shard's MDS file is there, and that it is the one of the index.

        Costs a look at the file's state where that has not changed since the last time.

        Raises:
            ShardError: it is missing or damaged, and so is what it would be made from.
            OSError: it cannot be read.
        """
        entry = self.index.shards[number]
        path = self.index.folder / entry.raw.name
        try:
            state = FileStamp.of(path)
            if self._sound.get(number) == state:
                return
            try:
                self._sound[number] = self._compare(path, entry)
            except ShardError as error:
                if self.remote is None and entry.compressed is None:
                    raise
                logger.warning("%s; it is made again", error)
                self.fetch(number, damaged=state)
        except FileNotFoundError:
            self.fetch(number)

    def fetch(self, number: int, *, damaged: FileStamp | None = None) -> None:
        """Makes a shard's MDS file, unless another process has made it: downloaded, unpacked, compared.

        Args:
            number: of the shard.
            damaged: the state of a file under its name that is to be replaced.

        Raises:
            ShardError: what it would be made from is missing or damaged.
        """
        entry = self.index.shards[number]
        self._sound[number] = fetch_shard(self.index, entry, self.remote, self._notes, damaged=damaged)

    def _compare(self, path: Path, entry: ShardEntry) -> FileStamp:
        state = compare_file(path, entry, entry.raw, by_hash=False)
        if self.by_hash and not self._notes.has(entry.raw, state):
            with self._notes.hashing(entry.raw, state):
                if not self._notes.has(entry.raw, state):
                    state = compare_file(path, entry, entry.raw, by_hash=True)
                    self._notes.write(entry.raw, state)
        return state


def _check_sizes(index: ShardIndex) -> None:
    """Names all files at once that are missing or have another size; reads none of them."""
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        problems = [
            problem for problem in threads.map(lambda entry: _size_problem(index, entry), index.shards) if problem
        ]
    if problems:
        more = f"; and {len(problems) - NAMED_FILES} more" if len(problems) > NAMED_FILES else ""
        raise ShardError("; ".join(problems[:NAMED_FILES]) + more)


def _size_problem(index: ShardIndex, entry: ShardEntry) -> str:
    path = index.folder / entry.stored.name
    try:
        if not path.is_file():
            return str(_missing(index, entry))
        check_size(path.stat().st_size, entry.stored, where=str(path))
    except FileNotFoundError:
        return str(_missing(index, entry))
    except ShardError as error:
        return str(error)
    return ""


def _missing(index: ShardIndex, entry: ShardEntry) -> ShardError:
    return ShardError(f"shard {index.folder / entry.stored.name} is missing; prepare it again or copy it there")


def _check_file(
    index: ShardIndex, entry: ShardEntry, file: ShardFile, notes: ShardNotes, *, how: Verify, replaceable: bool
) -> bool:
    """Whether the file is there and sound; a damaged one is removed if it is replaceable, else an error."""
    path = index.folder / file.name
    try:
        if not path.is_file():
            return False
        state = compare_file(path, entry, file, by_hash=how == "hash")
        if how == "hash" and file is entry.raw:
            notes.write(file, state)
    except FileNotFoundError:  # another process that shares the folder has just removed it
        return False
    except ShardError as error:
        if not replaceable:
            raise
        logger.warning("%s; it is removed, and made again when it is read", error)
        path.unlink(missing_ok=True)
        return False
    return True
