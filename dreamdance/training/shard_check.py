"""`data.verify: hash`: every shard of a run is hashed at its start, divided over all ranks, outside any collective.

Hashing a large set may take an hour, and a collective waits for half of one at most. So ranks take shards one by one
from a common count, and who finds none left waits by looking, as long as the others get on.
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
_CHECKED, _FAILED, _PASSES = "checked", "failed", "fault that may pass"
_rounds = count()  # the same on all ranks, for all take part in each


def verify_at_opening(verify: Verify) -> Verify:
    """How data sets are to be opened once `verify_by_hash` is through with them, if the recipe wants it at all."""
    return "first_use" if verify == "hash" else verify


def verify_by_hash(
    folders: Sequence[Shards], ranks: Ranks, store: Store, *, on_progress: Callable[[str], None]
) -> None:
    """Hashes all shards of some folders, whatever is noted. All ranks must call it; returns when all are through.

    Ranks that see one folder share its shards; a folder that each node has for itself is read by the ranks of each.

    Args:
        folders: where the shards are.
        ranks: this process among all.
        store: common to all ranks.
        on_progress: called with what comes, before each shard, and while others are waited for whenever one of their
            shards is through: a watchdog sees that it gets on.

    Raises:
        ShardError: a shard is missing or damaged; on all ranks.
        LostWorkerError: the main rank is gone.
    """
    place = PrefixStore(f"shard check {next(_rounds)}", store)
    try:
        _share(place, folders, ranks, on_progress)
        _await_others(place, ranks, on_progress)
    except DistError as error:
        raise LostWorkerError(f"the main rank is gone while shards are checked ({error})") from error


def _share(place: Store, folders: Sequence[Shards], ranks: Ranks, on_progress: Callable[[str], None]) -> None:
    """Hashes what no other rank has taken, and lets the others know where something is wrong."""
    try:
        for number, shards in enumerate(folders):
            index = open_shards(shards, ranks=ranks, before_shard=on_progress)
            # On one file system it is the same file, with the same times; copies have their own.
            key = f"{number} of {FileStamp.of(index.path)}"
            taken = _take(place, key, len(index.shards))
            verify_shards(index, how="hash", remote=shards.remote, before_shard=on_progress, numbers=taken)
    except DistError:
        raise
    except Exception as error:
        if not place.check([_FAILED]):
            place.set(_PASSES, str(int(is_transient(error))))
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
            on_progress(f"waiting for the other ranks, {checked} are through")
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
        kind = LostWorkerError if place.get(_PASSES) == b"1" else ShardError
        raise kind(f"shards are not sound: {place.get(_FAILED).decode()}")


def _leave(place: Store, ranks: Ranks) -> None:
    """Gives the others time to read what went wrong: the place ends with the main rank."""
    place.set(f"left {ranks.rank}", "")
    everybody, end = [f"left {rank}" for rank in range(ranks.world_size)], time.monotonic() + LEAVE_SECONDS
    while not place.check(everybody) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
