"""Checks shards before they are read, so that a damaged shard is an error that names it.

The library itself ends an epoch early or hangs on a damaged shard, and never checks shards on the local disk
(dreamdance/README.md, "The stack"). A start compares only the sizes of the files. The first process that opens a file
of schema 1 hashes it and writes a note that it matched; frames of schema 2 have checksums of their own instead.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dreamdance.data.shards.cache import fetch_shard, open_index
from dreamdance.data.shards.index import ShardEntry, ShardFile, ShardIndex
from dreamdance.data.shards.notes import ShardNotes
from dreamdance.data.shards.shard_files import check_size, compare_file
from dreamdance.errors import ShardError
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runs.file_states import FileStamp
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

REPORT_EVERY_SECONDS = 10.0
STAT_THREADS = 16  # on shared storage each size costs a round trip; the threads overlap them
MAX_NAMED_FILES = 10  # in one error


def open_shards(
    shards: Shards,
    *,
    how: Verify = "first_use",
    ranks: Ranks | None = None,
    before_shard: Callable[[str], None] | None = None,
) -> ShardIndex:
    """Downloads and checks the index on every rank; one rank of each node checks the files.

    Args:
        shards: the local folder, and the remote folder if there is one.
        how: see `verify_shards`.
        ranks: this process; by default from the environment.
        before_shard: see `verify_shards`.

    Raises:
        ShardError: a file is missing or damaged; the error names it and the problem.
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
    """Checks the files in the index's folder.

    Without a remote folder every shard must be present and undamaged. A damaged file that can be downloaded or
    unpacked again is removed with a warning; the process that reads the shard makes it again.

    Args:
        index: the index of the folder.
        how: `first_use` compares the sizes of the required files and reads none of them; `size` also reads each shard's
            table of samples; `hash` reads every file, also one that a note confirms, and writes a note.
        remote: the folder or URL from which the shards can be downloaded.
        before_shard: called with a text that names the next shard before each is read, and once before the sizes are
            compared.
        numbers: numbers of the shards to read; the function ignores all others. By default it reads all shards.

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
    """The shards of an index. Each file is compared with the index when it is opened; missing files are downloaded.

    Every reading process has its own object. Notes record which files any process of any run has already compared.
    """

    def __init__(self, index: ShardIndex, *, remote: str | None, by_hash: bool) -> None:
        """Stores the arguments; reads no file yet.

        Args:
            index: the index of the local folder.
            remote: the folder or URL to download from, or None.
            by_hash: whether to hash files of schema 1 without a note; of all others, only sizes and tables of samples
                are compared, because each frame of schema 2 has a checksum that is compared when it is read.
        """
        self.index, self.remote, self.by_hash = index, remote, by_hash
        self._notes = ShardNotes(index.folder)
        self._sound: dict[int, FileStamp] = {}

    def require(self, number: int) -> None:
        """Ensures that a shard's MDS file is present and is the one that the index describes.

        If the file has not changed since the last call, this costs one `stat`.

        Raises:
            ShardError: the file is missing or damaged, and so is the file that it would be made from.
            OSError: the file cannot be read.
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
                if not self.is_replaceable(number):
                    raise
                logger.warning("%s; this process makes it again", error)
                self.fetch(number, damaged=state)
        except FileNotFoundError:
            self.fetch(number)

    def is_replaceable(self, number: int) -> bool:
        """Whether a damaged MDS file can be downloaded or unpacked again."""
        return self.remote is not None or self.index.shards[number].compressed is not None

    def replace(self, number: int) -> None:
        """Downloads or unpacks again a shard's MDS file in which a damaged frame was found.

        Raises:
            ShardError: the file that it would be made from is missing or damaged.
        """
        self.fetch(number, damaged=self._sound.get(number))

    def fetch(self, number: int, *, damaged: FileStamp | None = None) -> None:
        """Downloads, unpacks and compares a shard's MDS file, unless another process has done so.

        Args:
            number: the number of the shard.
            damaged: the state of a damaged file of that name, which is replaced.

        Raises:
            ShardError: the file that it would be made from is missing or damaged.
        """
        entry = self.index.shards[number]
        self._sound[number] = fetch_shard(self.index, entry, self.remote, self._notes, damaged=damaged)

    def _compare(self, path: Path, entry: ShardEntry) -> FileStamp:
        state = compare_file(path, entry, entry.raw, by_hash=False)
        if self.by_hash and entry.schema_version == 1 and not self._notes.has(entry.raw, state):
            with self._notes.hashing(entry.raw, state):
                if not self._notes.has(entry.raw, state):
                    state = compare_file(path, entry, entry.raw, by_hash=True)
                    self._notes.write(entry.raw, state)
        return state


def _check_sizes(index: ShardIndex) -> None:
    """Raises one error that names all files that are missing or have another size; reads no file."""
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        problems = [
            problem for problem in threads.map(lambda entry: _size_problem(index, entry), index.shards) if problem
        ]
    if problems:
        more = f"; and {len(problems) - MAX_NAMED_FILES} more" if len(problems) > MAX_NAMED_FILES else ""
        raise ShardError("; ".join(problems[:MAX_NAMED_FILES]) + more)


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
    return ShardError(
        f"shard {index.folder / entry.stored.name} is missing; run `prepare` again or copy the file there"
    )


def _check_file(
    index: ShardIndex, entry: ShardEntry, file: ShardFile, notes: ShardNotes, *, how: Verify, replaceable: bool
) -> bool:
    """Whether the file is present and undamaged. A damaged file is removed if replaceable; else it is an error."""
    path = index.folder / file.name
    try:
        if not path.is_file():
            return False
        state = compare_file(path, entry, file, by_hash=how == "hash")
        if how == "hash" and file is entry.raw:
            notes.write(file, state)
    except FileNotFoundError:  # another process that shares the folder has just removed the file
        return False
    except ShardError as error:
        if not replaceable:
            raise
        logger.warning("%s; this process removes the file, and the process that reads the shard makes it again", error)
        path.unlink(missing_ok=True)
        return False
    return True
