"""The stored clips of a folder of shards, by number; `dataset` cuts training windows from them.

This module does not use the process group: ranks need no synchronisation, and a single rank may open a folder.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.shards import cache
from dreamdance.data.shards.columns import ColumnClip
from dreamdance.data.shards.generated_maps import GeneratedClip
from dreamdance.data.shards.latents import LatentClip
from dreamdance.data.shards.mds import Spanner, Stream, StreamingDataset, World
from dreamdance.data.shards.range_reads import SampleHead, check_sample, read_extents, read_sample_head
from dreamdance.data.shards.tracks import Extent, TrackClip
from dreamdance.data.shards.verify import CheckedShards, open_shards
from dreamdance.errors import LostWorkerError, ShardError, is_transient
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runs.files import NUM_ATTEMPTS, retry_transient
from dreamdance.runtime.ranks import Ranks

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)

_DAMAGED = (OSError, ValueError, RuntimeError, IndexError, KeyError)


class StoredClips(StreamingDataset):
    """The stored clips of a folder of shards, by number.

    This class uses the storage part of mosaicml-streaming's dataset: format, index, shard readers, remote folders and
    random access. A missing shard is downloaded; a damaged shard raises. The library's constructor is not called: it
    sets up shared memory, file locks, barriers and a process group for its `__iter__`, which ends an epoch early or
    hangs on a damaged shard, and the shared memory of a killed run can block the next start. `ClipOrder` gives the
    order instead.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        verify: Verify = "first_use",
        ranks: Ranks | None = None,
        cache_bytes: int = 0,
        size: tuple[int, int] | None = None,
        map_sizes: Mapping[str, tuple[int, int]] | None = None,
        before_shard: Callable[[str], None] | None = None,
    ) -> None:
        """Checks the sizes of the shards; reads no sample yet.

        Args:
            shards: the local folder, and the remote folder if there is one.
            verify: how to check the files now (`verify.verify_shards`). Unless it is `size`, each file of schema 1 is
                also compared with its hash when it is first opened.
            ranks: this process; by default from the environment.
            cache_bytes: size of the cache of decoded clips of schema 1, which are read whole, in each reading process.
                Clips are never evicted: every epoch reads all clips, so a cache of the latest ones would have few hits.
                Of schema 2 nothing is kept: a sample decodes the frames that it uses and no others.
            size: the width and height to which the caller brings frames. Of a set that was stored at several sizes,
                the smallest that is large enough is read; by default the largest.
            map_sizes: the same for the maps that the caller brings to another size.
            before_shard: see `verify.open_shards`.

        Raises:
            ShardError: shards are missing, damaged, of another format or hostile.
        """
        self.index = open_shards(shards, how=verify, ranks=ranks, before_shard=before_shard)
        self._checked = CheckedShards(self.index, remote=shards.remote, by_hash=verify != "size")
        stream = Stream(remote=shards.remote, local=str(self.index.folder), keep_zip=True, download_retry=1)
        self.streams = [stream]
        self.shards = stream.get_shards(World.detect(), allow_unsafe_types=False)
        self.num_samples = self.index.num_samples
        self.samples_per_shard = np.array(self.index.samples_per_shard, np.int64)
        self.spanner = Spanner(self.samples_per_shard)
        self.cache_limit = None
        self._shard_access_times: Any = np.zeros(len(self.shards), np.uint64)  # the base class writes to it
        self._size, self._map_sizes = size, dict(map_sizes or {})
        self._cached: dict[int, StoredClip] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields all stored samples in the order of the shards; raises at a damaged one."""
        return (self[sample_id] for sample_id in range(self.num_samples))

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Downloads and unpacks a shard; the base class calls this if the file is missing."""
        self._checked.fetch(shard_id)

    def get_item(self, sample_id: int, retry: int = 2) -> dict[str, Any]:
        """The stored columns of one sample.

        If the storage fails or the whole folder is gone, the read is retried for some seconds.

        Raises:
            IndexError: there is no such sample.
            ShardError: the sample's shard is missing or damaged.
            LostWorkerError: the storage failed at every attempt.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        where, read_item = self.describe(sample_id), super().get_item

        def read(path: Path) -> dict[str, Any]:
            item: dict[str, Any] = read_item(sample_id, retry)
            if item["schema_version"] != 1:  # shards of schema 1 are compared with their hash
                check_sample(item, where=where)
            return item

        return self._read_file(sample_id, read)

    def _retried(self, sample_id: int, read: Callable[[], _Result]) -> _Result:
        """Reads something of a sample; the errors are those of `get_item`."""
        where = self.describe(sample_id)

        def should_retry(error: Exception) -> bool:
            if isinstance(error, LostWorkerError) or not isinstance(error, _DAMAGED):
                return False  # a LostWorkerError comes after retries
            return is_transient(error) or cache.is_gone(self.index.folder)

        try:
            return retry_transient(read, f"reading {where}", should_retry=should_retry)
        except _DAMAGED as error:
            if should_retry(error):
                raise LostWorkerError(f"{where} cannot be read, {NUM_ATTEMPTS} attempts failed: {error}") from error
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{where} cannot be read: {error}") from error

    def _read_file(self, sample_id: int, read: Callable[[Path], _Result]) -> _Result:
        """Reads from a sample's file; a damaged file that can be made again is replaced once.

        Args:
            sample_id: the sample.
            read: reads from the file and compares what it read with its checksums.
        """
        shard_id = self.spanner[sample_id][0]
        path = self.index.folder / self.index.shards[shard_id].raw.name

        def read_checked() -> _Result:
            self._checked.require(shard_id)
            try:
                return read(path)
            except ShardError as error:
                if not self._checked.is_replaceable(shard_id):
                    raise
                logger.warning("%s; this process makes the file again", error)
                self._checked.replace(shard_id)
                return read(path)

        return self._retried(sample_id, read_checked)

    def describe(self, sample_id: int) -> str:
        """The place of a sample, for messages."""
        shard_id, position = self.spanner[sample_id]
        return f"sample {position} of shard {self.index.folder / self.index.shards[shard_id].raw.name}"

    def clip(self, sample_id: int) -> StoredClip:
        """One stored clip. If the cache has room, a clip of schema 1 is kept there with all its frames decoded.

        Raises:
            ShardError: the clip's shard is missing or damaged.
        """
        cached = self._cached.get(sample_id)
        if cached is not None:
            return cached
        stored = self._open(sample_id)
        clip = StoredClip(stored)
        if isinstance(stored, ColumnClip) and clip.decoded_bytes <= self._cache_left:
            clip.decode_all()
            self._cached[sample_id] = clip
            self._cache_left -= clip.decoded_bytes
        return clip

    def metadata(self, sample_id: int) -> dict[str, Any]:
        """The metadata of a clip; of its frames nothing is read, and nothing at all in schema 1, which is empty here.

        Raises:
            ShardError: the clip's shard is missing or damaged.
        """
        if self.index.shards[self.spanner[sample_id][0]].schema_version == 1:
            return {}
        return self._open(sample_id).metadata

    def _open(self, sample_id: int) -> TrackClip | ColumnClip:
        """A clip whose head, or whose whole sample in schema 1, was read and checked."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        where = self.describe(sample_id)
        shard_id, position = self.spanner[sample_id]
        if self.index.shards[shard_id].schema_version == 1:
            return ColumnClip(self[sample_id], where=where)
        head = self._read_file(sample_id, partial(read_sample_head, position=position, where=where))
        read = partial(self._read_extents, sample_id, head)
        return TrackClip(head.clip, read, size=self._size, map_sizes=self._map_sizes, where=where)

    def latents(self, sample_id: int) -> LatentClip:
        """The stored latents of one clip, if this is a folder of latents; reads their head.

        Raises:
            ShardError: the clip's shard is missing or damaged.
        """
        where, position = self.describe(sample_id), self.spanner[sample_id][1]
        head = self._read_file(sample_id, partial(read_sample_head, position=position, where=where))
        return LatentClip(head.clip, partial(self._read_extents, sample_id, head), where=where)

    def generated(self, sample_id: int) -> GeneratedClip:
        """The generated maps of one clip, if this is a folder of such maps; reads their head. See `latents`."""
        where, position = self.describe(sample_id), self.spanner[sample_id][1]
        head = self._read_file(sample_id, partial(read_sample_head, position=position, where=where))
        return GeneratedClip(head.clip, partial(self._read_extents, sample_id, head), where=where)

    def _read_extents(self, sample_id: int, head: SampleHead, extents: Sequence[Extent]) -> list[bytes]:
        where = f"{self.describe(sample_id)} (clip '{head.clip.clip_id}')"
        return self._read_file(sample_id, partial(read_extents, head=head, extents=extents, where=where))
