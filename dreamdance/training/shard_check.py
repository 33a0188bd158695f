"""`data.verify: hash`: the ranks of a run share the work of hashing every shard at its start, without a collective.

Hashing a large set may take an hour, but a collective times out after half an hour. Therefore ranks take shards one by
one from a common counter. A rank that finds no shard left polls until the others finish.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from torch.distributed import DistError, PrefixStore, Store

from dreamdance.data.shards.verify import open_shards, verify_shards
from dreamdance.errors import LostWorkerError, ShardError, is_transient
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runs.file_states import FileStamp
from dreamdance.runtime.ranks import Ranks

POLL_SECONDS = 0.2
LEAVE_SECONDS = 5.0
_CHECKED, _FAILED, _IS_TRANSIENT = "checked", "failed", "transient"
_rounds = count()  # equal on all ranks, because every rank takes part in every round


def verify_at_opening(verify: Verify) -> Verify:
    """The check to use when a data set is opened: `verify_by_hash` has done `hash` already."""
    return "first_use" if verify == "hash" else verify


def verify_by_hash(
    folders: Sequence[Shards], ranks: Ranks, store: Store, *, on_progress: Callable[[str], None]
) -> None:
    """Hashes all shards again, ignoring earlier notes; returns when all ranks have finished. All ranks must call it.

    Ranks that see the same folder share its shards. A folder local to a node is read by that node's ranks.

    Args:
        folders: folders of the shards.
        ranks: this process among all processes.
        store: the key-value store that all ranks share.
        on_progress: called with a text before each shard, and while this rank waits, each time that another rank has
            checked a shard: a watchdog sees progress.

    Raises:
        ShardError: a shard is missing or damaged; raised on all ranks.
        LostWorkerError: the main rank has ended, or another rank failed with a transient error.
    """
    place = PrefixStore(f"shard check {next(_rounds)}", store)
    try:
        _share(place, folders, ranks, on_progress)
        _await_others(place, ranks, on_progress)
    except DistError as error:
        raise LostWorkerError(f"the main rank ended while shards were checked ({error})") from error


def _share(place: Store, folders: Sequence[Shards], ranks: Ranks, on_progress: Callable[[str], None]) -> None:
    """Hashes the shards that no other rank has taken; an error is written to the store for the other ranks."""
    try:
        for number, shards in enumerate(folders):
            index = open_shards(shards, ranks=ranks, before_shard=on_progress)
            # Ranks that see the same file see the same stamp; a copy on another disk has another stamp.
            key = f"{number} of {FileStamp.of(index.path)}"
            taken = _take(place, key, len(index.shards))
            verify_shards(index, how="hash", remote=shards.remote, before_shard=on_progress, numbers=taken)
    except DistError:
        raise
    except Exception as error:
        if not place.check([_FAILED]):
            place.set(_IS_TRANSIENT, str(int(is_transient(error))))
            place.set(_FAILED, f"rank {ranks.rank}: {error}")
        _leave(place, ranks)
        raise
    place.set(f"through {ranks.rank}", "")


def _await_others(place: Store, ranks: Ranks, on_progress: Callable[[str], None]) -> None:
    everybody, seen = [f"through {rank}" for rank in range(ranks.world_size)], 0
    while not place.check(everybody):
        try:
            _raise_if_failed(place)
        except ShardError:
            _leave(place, ranks)
            raise
        if (checked := place.add(_CHECKED, 0)) != seen:
            on_progress(f"waiting for the other ranks, {checked} shards are checked")
            seen = checked
        time.sleep(POLL_SECONDS)


def _take(place: Store, key: str, num_shards: int) -> Iterator[int]:
    """Numbers of shards that no other rank has taken."""
    while (number := place.add(key, 1) - 1) < num_shards:
        yield number
        place.add(_CHECKED, 1)
        _raise_if_failed(place)


def _raise_if_failed(place: Store) -> None:
    if place.check([_FAILED]):
        kind = LostWorkerError if place.get(_IS_TRANSIENT) == b"1" else ShardError
        raise kind(f"a shard failed its check: {place.get(_FAILED).decode()}")


def _leave(place: Store, ranks: Ranks) -> None:
    """Waits so that other ranks can read the error: the store ends with the main rank."""
    place.set(f"left {ranks.rank}", "")
    everybody, end = [f"left {rank}" for rank in range(ranks.world_size)], time.monotonic() + LEAVE_SECONDS
    while not place.check(everybody) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
