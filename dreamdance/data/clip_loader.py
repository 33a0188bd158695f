"""The loader: brings each optimizer step's micro batches to a rank, in the run's order, from any step on."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dreamdance.data.clip_order import ClipOrder, SampleKey
from dreamdance.data.clips import ClipDataset
from dreamdance.data.collate import ClipBatch, collate_clips
from dreamdance.data.worker_processes import start_worker, worker_context
from dreamdance.errors import LostWorkerError, ShardError
from dreamdance.ranks import Ranks

WORKER_CHECK_SECONDS = 5.0  # torch looks whether its workers live only when a wait of this length is over


class ClipLoader:
    """Brings each optimizer step's micro batches to one rank.

    Iterating never ends by itself: epoch follows epoch. The position is `step`, the number of steps handed out.

    Attributes:
        step: the optimizer step that comes next.
        wait_seconds: how long the latest step's data was waited for.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        order: ClipOrder,
        *,
        micro_batch_size: int,
        ranks: Ranks | None = None,
        num_workers: int = 0,
        timeout_seconds: float = 300.0,
    ) -> None:
        """Checks that the ranks' shares come out even.

        Args:
            dataset: what to read.
            order: which samples, by step.
            micro_batch_size: clips in one `ClipBatch`.
            ranks: which rank of how many this is; by default from the environment.
            num_workers: processes that read ahead; 0 reads in this one.
            timeout_seconds: how long to wait for workers before it is an error (recipe: `data.batch_timeout_seconds`).

        Raises:
            ShardError: `batch_size` is not micro batch x accumulation x ranks.
        """
        self.dataset, self.order = dataset, order
        self.ranks = ranks or Ranks.from_environment()
        self.micro_batch_size, self.num_workers, self.timeout_seconds = micro_batch_size, num_workers, timeout_seconds
        self.accumulation_steps, rest = divmod(order.batch_size, micro_batch_size * self.ranks.world_size)
        if rest or not self.accumulation_steps:
            raise ShardError(
                f"batch_size {order.batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"{self.ranks.world_size} ranks"
            )
        self.step = 0
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[list[ClipBatch]]:
        """Yields the micro batches of each step, from `step` on.

        Raises:
            ShardError: a bad shard, by name; workers that died, or gave nothing within the time.
        """
        batches = iter(self._make_loader())
        try:
            while True:
                start = time.monotonic()
                micro_batches = [self._next(batches) for _ in range(self.accumulation_steps)]
                self.wait_seconds = time.monotonic() - start
                self.step += 1
                yield micro_batches
        finally:
            # torch ends its workers when it is freed, which the traceback of an error puts off.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                for worker in batches._workers:
                    if worker.is_alive():  # stopped, or waiting for its storage: the end of this process would wait too
                        worker.kill()

    def micro_batch_keys(self, step: int) -> list[list[SampleKey]]:
        """This rank's share of a step: a contiguous part of the batch, cut into micro batches."""
        per_rank = self.order.batch_size // self.ranks.world_size
        share = self.order.batch(step)[self.ranks.rank * per_rank :][:per_rank]
        return [share[start : start + self.micro_batch_size] for start in range(0, per_rank, self.micro_batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank (JSON-able)."""
        return self.order.state_dict(self.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a saved position was; call it before iterating.

        Raises:
            ShardError: the training set or the order's settings are not those of the saved position.
        """
        self.step = self.order.resume(state)

    def _make_loader(self) -> DataLoader:
        """A loader of this rank's micro batches from `step` on."""
        options: dict[str, Any] = {}
        if self.num_workers:
            options = {
                "timeout": min(self.timeout_seconds, WORKER_CHECK_SECONDS),
                "multiprocessing_context": worker_context(__name__),
                "worker_init_fn": start_worker,
                "prefetch_factor": max(2, self.accumulation_steps),
            }
        return DataLoader(
            _KeyedReader(self.dataset),
            batch_sampler=_MicroBatches(self, self.step),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each start draws the workers' seeds from the global one, which is saved
            **options,
        )

    def _next(self, batches: Iterator[ClipBatch | ShardError]) -> ClipBatch:
        deadline = time.monotonic() + self.timeout_seconds
        while True:
            try:
                batch = next(batches)
                break
            except (RuntimeError, EOFError, OSError) as error:
                if "DataLoader timed out" in str(error):
                    if time.monotonic() < deadline:
                        continue
                    raise LostWorkerError(self._describe_wait()) from error
                # A worker that dies while it hands over a batch shows as a lost connection.
                if "DataLoader worker" in str(error) or (self.num_workers and not isinstance(error, RuntimeError)):
                    raise LostWorkerError(
                        f"a process that reads data died at step {self.step}, out of memory? {error!r}"
                    ) from error
                raise
        if isinstance(batch, ShardError):
            raise batch
        return batch

    def _describe_wait(self) -> str:
        first = self.micro_batch_keys(self.step)[0][0]
        return (
            f"no batch for {self.timeout_seconds:.0f} s while waiting for step {self.step} "
            f"({self.dataset.describe(first.sample_id)} and others): the storage hangs or is too slow; "
            "see `data.batch_timeout_seconds`, `data.num_workers`"
        )


class _KeyedReader(Dataset):
    """The dataset as torch's loader wants it: a whole micro batch by its keys, errors handed over as values.

    An exception that crosses from a worker would arrive as the text of a traceback.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[SampleKey]) -> ClipBatch | ShardError:
        try:
            return collate_clips([self.dataset.training_sample(key) for key in keys])
        except ShardError as error:
            return ShardError(str(error))


class _MicroBatches:
    """The keys of this rank's micro batches, step after step, without end."""

    def __init__(self, loader: ClipLoader, first_step: int) -> None:
        self.loader, self.first_step = loader, first_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.first_step
        while True:
            yield from self.loader.micro_batch_keys(step)
            step += 1


def _as_it_is(batch: Any) -> Any:
    return batch
