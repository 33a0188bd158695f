"""Brings shards from where they live to where they are read, and gives a file its name only once it is checked.

The library writes downloads straight under their names, where the next reader finds a damaged one, and
coordinates processes through shared memory, in which one that failed leaves "being prepared" behind for ever. Here
files are checked under a temporary name and renamed; a lock of the operating system, which dies with its holder, keeps
two processes from fetching the same shard. What fails now and then is tried again, a few times.
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamdance.data.shards.files import check_bytes, check_samples, check_size, compare_file
from dreamdance.data.shards.index import ShardEntry, ShardFile, ShardIndex, read_index
from dreamdance.data.shards.mds import INDEX_FILE, CloudDownloader, decompress
from dreamdance.data.shards.notes import ShardNotes
from dreamdance.errors import USER_FIXABLE_ERRNOS, LostWorkerError, ShardError
from dreamdance.recipe.sections import Shards
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import NUM_ATTEMPTS, replace_atomically, retry_transient
from dreamdance.runs.locks import HeldLockError, locked_file

logger = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_SECONDS = 300.0
LOCK_TIMEOUT_SECONDS = 600.0
DAMAGED_DOWNLOADS = 2  # one may be torn on its way; two alike are damaged where they come from
_ZSTD_MAGIC = 0xFD2FB528


def open_index(shards: Shards) -> ShardIndex:
    """Returns the checked index of `shards`, fetched from its remote folder where there is one.

    Raises:
        ShardError: no index, a refused one, or a local folder that caches another dataset than the remote one.
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
                    f"{folder} caches other shards than {shards.remote} holds now; delete it or give another `local` "
                    "folder"
                )
            temporary.unlink()  # the index stays as it is: by its state, ranks see whether they share a folder
    return read_index(index)


def fetch_shard(
    index: ShardIndex, entry: ShardEntry, remote: str | None, notes: ShardNotes, *, damaged: FileStamp | None = None
) -> FileStamp:
    """Puts a shard's MDS file into the local folder: downloaded if need be, hash-checked, decompressed.

    Args:
        index: of the local folder.
        entry: which shard.
        remote: where it comes from, if not from there.
        notes: of the local folder; in the end the file is noted.
        damaged: the state of a file under its name that is to be replaced; one in another state is another process's.

    Returns:
        The state of the file, which was compared with the index by its hash.

    Raises:
        ShardError: it is nowhere, damaged, or its folder cannot be written.
    """
    target = index.folder / entry.raw.name
    stored = index.folder / entry.stored.name
    if remote is None and not stored.is_file():
        raise ShardError(f"shard {stored} is missing; prepare it again or copy it there")
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
                raise ShardError(f"shard {stored} is missing; prepare it again or copy it there")
            if entry.compressed is not None:
                data = _decompress(entry, data, where=label)
            check_samples(data, len(data), entry, where=label)
            temporary.unlink(missing_ok=True)  # a download may have the remote file's mode, and be read-only
            temporary.write_bytes(data)
        state = FileStamp.of(target)
        notes.write(entry.raw, state)
        return state


def is_gone(folder: Path | str) -> bool:
    """Whether a folder of shards does not show its index any more, once that was read: as if it were not mounted."""
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
    """The compressed form that lies in the local folder; None where it can be had from the remote one only."""
    if not stored.is_file():
        return None
    try:
        return _read_checked(stored, file, where=where)
    except ShardError as error:
        if remote is None:
            raise
        logger.warning("%s; removed, it is fetched again", error)
        stored.unlink(missing_ok=True)
        return None


def _download_checked(remote: str, file: ShardFile, destination: Path, *, where: str) -> bytes:
    """Downloads a file and compares it with the index; one that came damaged is fetched again."""
    for _ in range(DAMAGED_DOWNLOADS - 1):
        _download(remote, file.name, destination)
        try:
            return _read_checked(destination, file, where=where)
        except ShardError as error:
            logger.warning("%s; fetched again", error)
    _download(remote, file.name, destination)
    return _read_checked(destination, file, where=f"{where}, fetched {DAMAGED_DOWNLOADS} times,")


def _download(remote: str, name: str, destination: Path) -> None:
    """Downloads a file; tries again where connection or storage fail, but not where that file alone is missing."""
    source = f"{remote.rstrip('/')}/{name}"

    half = destination.with_name(f"{destination.name}.tmp")  # the library's own temporary name

    def download() -> None:
        for path in (destination, half):  # the library takes a file that exists for a finished download
            path.unlink(missing_ok=True)
        CloudDownloader.direct_download(source, str(destination), DOWNLOAD_TIMEOUT_SECONDS)

    def is_remote_gone() -> bool:
        return name != INDEX_FILE and "://" not in remote and is_gone(remote)

    def should_retry(error: Exception) -> bool:
        """Connection and time-out errors are OSErrors, often without a number."""
        is_final = isinstance(error, PermissionError) or (isinstance(error, FileNotFoundError) and not is_remote_gone())
        return isinstance(error, OSError) and not is_final

    try:
        retry_transient(download, f"fetching {source}", should_retry=should_retry)
    except (OSError, ValueError, ImportError) as error:
        if not should_retry(error):
            raise ShardError(f"{source} cannot be fetched: {error}; see `remote`") from error
        is_users = getattr(error, "errno", None) in USER_FIXABLE_ERRNOS and not is_remote_gone()
        kind = ShardError if is_users else LostWorkerError
        raise kind(f"{source} cannot be fetched, {NUM_ATTEMPTS} attempts failed: {error}") from error
    except Exception as error:  # every cloud's library has errors of its own, and has tried again by itself
        error.add_note(f"while {source} was fetched")
        raise
    finally:
        half.unlink(missing_ok=True)


def _decompress(entry: ShardEntry, data: bytes, *, where: str) -> bytes:
    """Decompresses one zstd frame whose own header announces no more than the index does."""
    announced = zstd_content_size(data)
    if announced != entry.raw.num_bytes:
        raise ShardError(f"shard {where} would decompress to {announced} bytes, the index says {entry.raw.num_bytes}")
    raw = decompress("zstd", data)
    check_bytes(raw, entry.raw, where=f"{where}, decompressed,")
    return raw


def zstd_content_size(data: bytes) -> int | None:
    """The size that a zstd frame decompresses to, by its header (RFC 8878); None if it has none or more frames follow.

    The library allocates what all frames of a file announce together, before any hash of the result can be compared.
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
            f"waited {LOCK_TIMEOUT_SECONDS:.0f} s for another process to fetch '{name}' to {folder}; is one stopped? "
            f"`fuser {folder / f'.{name}.lock'}` names it; or give another `local` folder"
        ) from error
    except OSError as error:
        raise ShardError(
            f"'{name}' cannot be fetched or unpacked into {folder}: {error}. Is the disk full? If that folder is not "
            "to be written, name it as `remote` and give a `local` folder that is"
        ) from error
