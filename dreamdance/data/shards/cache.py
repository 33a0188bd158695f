"""Downloads and unpacks shards into the local folder; a file gets its final name only after it was checked.

The library writes downloads directly under their final names, where the next reader finds a damaged file. It
coordinates processes through shared memory; a process that fails leaves the state "being prepared" there for ever. This
module checks files under a temporary name and then renames them. A lock of the operating system, which is released when
its holder ends, keeps two processes from downloading the same shard. Transient errors are retried a few times.
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamdance.data.shards.index import ShardEntry, ShardFile, ShardIndex, read_index
from dreamdance.data.shards.mds import INDEX_FILE, CloudDownloader, decompress
from dreamdance.data.shards.notes import ShardNotes
from dreamdance.data.shards.shard_files import check_bytes, check_samples, check_size, compare_file
from dreamdance.errors import USER_FIXABLE_ERRNOS, LostWorkerError, ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import NUM_ATTEMPTS, replace_atomically, retry_transient
from dreamdance.runs.locks import HeldLockError, locked_file

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_SECONDS = 300.0
LOCK_TIMEOUT_SECONDS = 600.0
# One damaged download may be a transmission error; after this number the remote file itself counts as damaged.
DAMAGED_DOWNLOADS = 2
_ZSTD_MAGIC = 0xFD2FB528


def open_index(shards: Shards) -> ShardIndex:
    """Returns the checked index of `shards`; downloads it first if there is a remote folder.

    Raises:
        ShardError: the index is missing or refused, or the local folder caches another dataset than the remote one.
    """
    folder = Path(shards.local)
    if shards.remote is None:
        return read_index(folder / INDEX_FILE)
    index = folder / INDEX_FILE
    with _locked(folder, INDEX_FILE), replace_atomically(index, is_only_writer=True) as temporary:
        _download(shards.remote, INDEX_FILE, temporary)
        read_index(temporary)
        if index.exists():
            if index.read_bytes() != temporary.read_bytes():
                raise ShardError(
                    f"{folder} caches other shards than {shards.remote} contains now; delete that folder or set "
                    "another `local` folder"
                )
            temporary.unlink()  # keeps the old file: ranks compare its state to find out whether they share a folder
    return read_index(index)


def fetch_shard(
    index: ShardIndex, entry: ShardEntry, remote: str | None, notes: ShardNotes, *, damaged: FileStamp | None = None
) -> FileStamp:
    """Puts a shard's MDS file into the local folder: downloads it if necessary, checks its hash and decompresses it.

    Args:
        index: the index of the local folder.
        entry: the shard.
        remote: the folder or URL to download from, or None.
        notes: the notes of the local folder; the function adds a note about the file.
        damaged: the state of a damaged file of that name, which is replaced. A file in another state was written by
            another process and is kept.

    Returns:
        The state of the file, whose hash matched the index.

    Raises:
        ShardError: the shard is missing or damaged, or the local folder cannot be written.
    """
    target = index.folder / entry.raw.name
    stored = index.folder / entry.stored.name
    if remote is None and not stored.is_file():
        raise ShardError(f"shard {stored} is missing; run `prepare` again or copy the file there")
    with _locked(index.folder, entry.raw.name):
        if target.is_file() and (state := FileStamp.of(target)) != damaged:  # another process was faster
            state = compare_file(target, entry, entry.raw, by_hash=not notes.has(entry.raw, state))
            notes.write(entry.raw, state)
            return state
        label = f"'{entry.stored.name}' of {remote or index.folder}"
        with replace_atomically(target, is_only_writer=True) as temporary:
            data = None if entry.compressed is None else _read_stored(stored, entry.stored, remote, where=label)
            if data is None and remote is not None:
                data = _download_checked(remote, entry.stored, temporary, where=label)
            if data is None:
                raise ShardError(f"shard {stored} is missing; run `prepare` again or copy the file there")
            if entry.compressed is not None:
                data = _decompress(entry, data, where=label)
            check_samples(data, len(data), entry, where=label)
            temporary.unlink(missing_ok=True)  # a download may have the remote file's mode, and be read-only
            temporary.write_bytes(data)
        state = FileStamp.of(target)
        notes.write(entry.raw, state)
        return state


def is_gone(folder: Path | str) -> bool:
    """Whether a folder of shards whose index was read before has no index now, for example because of a lost mount."""
    try:
        return not (Path(folder) / INDEX_FILE).is_file()
    except OSError:
        return True


def _read_checked(path: Path, file: ShardFile, *, where: str) -> bytes:
    check_size(path.stat().st_size, file, where=where)
    data = path.read_bytes()
    check_bytes(data, file, where=where)
    return data


def _read_stored(stored: Path, file: ShardFile, remote: str | None, *, where: str) -> bytes | None:
    """Reads the compressed file in the local folder; None if it must be downloaded."""
    if not stored.is_file():
        return None
    try:
        return _read_checked(stored, file, where=where)
    except ShardError as error:
        if remote is None:
            raise
        logger.warning("%s; this process removes the file and downloads it again", error)
        stored.unlink(missing_ok=True)
        return None


def _download_checked(remote: str, file: ShardFile, destination: Path, *, where: str) -> bytes:
    """Downloads a file and compares it with the index; downloads a damaged file again."""
    for _ in range(DAMAGED_DOWNLOADS - 1):
        _download(remote, file.name, destination)
        try:
            return _read_checked(destination, file, where=where)
        except ShardError as error:
            logger.warning("%s; this process downloads the file again", error)
    _download(remote, file.name, destination)
    return _read_checked(destination, file, where=f"{where}, downloaded {DAMAGED_DOWNLOADS} times,")


def _download(remote: str, name: str, destination: Path) -> None:
    """Downloads a file; retries if the connection or the storage fails, but not if only that file is missing."""
    source = f"{remote.rstrip('/')}/{name}"

    unfinished = destination.with_name(f"{destination.name}.tmp")  # the library's temporary file

    def download() -> None:
        for path in (destination, unfinished):  # the library treats an existing file as a finished download
            path.unlink(missing_ok=True)
        CloudDownloader.direct_download(source, str(destination), DOWNLOAD_TIMEOUT_SECONDS)

    def is_remote_gone() -> bool:
        return name != INDEX_FILE and "://" not in remote and is_gone(remote)

    def should_retry(error: Exception) -> bool:
        """Whether the error may be transient. Connection and timeout errors are OSErrors, often without an errno."""
        is_final = isinstance(error, PermissionError) or (isinstance(error, FileNotFoundError) and not is_remote_gone())
        return isinstance(error, OSError) and not is_final

    try:
        retry_transient(download, f"downloading {source}", should_retry=should_retry)
    except (OSError, ValueError, ImportError) as error:
        if not should_retry(error):
            raise ShardError(f"{source} cannot be downloaded: {error}; see `remote`") from error
        is_user_fixable = getattr(error, "errno", None) in USER_FIXABLE_ERRNOS and not is_remote_gone()
        kind = ShardError if is_user_fixable else LostWorkerError
        raise kind(f"{source} cannot be downloaded, {NUM_ATTEMPTS} attempts failed: {error}") from error
    except Exception as error:  # the cloud libraries raise their own errors, after their own retries
        error.add_note(f"while downloading {source}")
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _decompress(entry: ShardEntry, data: bytes, *, where: str) -> bytes:
    """Decompresses one zstd frame, if the size in its header is the size in the index."""
    claimed = zstd_content_size(data)
    if claimed != entry.raw.num_bytes:
        raise ShardError(f"shard {where} would decompress to {claimed} bytes, the index lists {entry.raw.num_bytes}")
    raw = decompress("zstd", data)
    check_bytes(raw, entry.raw, where=f"{where}, decompressed,")
    return raw


def zstd_content_size(data: bytes) -> int | None:
    """The decompressed size in a zstd frame's header (RFC 8878); None if it has no size or more frames follow.

    The library allocates the sum of the sizes that all frames of a file claim, before the result can be hashed.
    """
    if len(data) < 6 or struct.unpack_from("<I", data)[0] != _ZSTD_MAGIC:
        return None
    descriptor = data[4]
    single_segment, checksum, dictionary = (descriptor >> 5) & 1, (descriptor >> 2) & 1, descriptor & 3
    size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    position = 5 + (1 - single_segment) + (0, 1, 2, 4)[dictionary]
    content_size = int.from_bytes(data[position : position + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    position += size_bytes
    while position + 3 <= len(data):
        block = int.from_bytes(data[position : position + 3], "little")
        last, kind, block_bytes = block & 1, (block >> 1) & 3, block >> 3
        position += 3 + (1 if kind == 1 else block_bytes)  # kind 1 repeats a single byte
        if last:
            whole = position + 4 * checksum == len(data)
            return content_size if whole and size_bytes else None
    return None


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Locks a file of the folder against other processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked_file(folder / f".{name}.lock", wait_seconds=LOCK_TIMEOUT_SECONDS):
            yield
    except HeldLockError as error:
        raise LostWorkerError(
            f"waited {LOCK_TIMEOUT_SECONDS:.0f} s for another process to download '{name}' to {folder}; it may be "
            f"stopped. `fuser {folder / f'.{name}.lock'}` shows its process id; or set another `local` folder"
        ) from error
    except OSError as error:
        raise ShardError(
            f"'{name}' cannot be downloaded or unpacked into {folder}: {error}. Is the disk full? If that folder is "
            "read-only, name it as `remote` and set a `local` folder that can be written"
        ) from error
