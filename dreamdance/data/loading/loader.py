"""The loader: delivers the micro batches of each optimizer step to a rank, in the run's order, from any step on."""

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping
from itertools import chain, count, islice
from typing import Any

import torch

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.data.loading.workers import BatchWorkers
from dreamdance.errors import LostWorkerError
from dreamdance.media.keypoint_regions import UNKNOWN
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


class ClipLoader:
    """Delivers the micro batches of each optimizer step to one rank.

    The iteration never ends: epoch follows epoch. The position is `step`, the number of steps delivered.

    Attributes:
        step: the number of the next optimizer step.
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
        """Checks that the batch divides evenly among the ranks.

        Args:
            dataset: the training windows.
            order: the samples of each step.
            micro_batch_size: number of clips in one `ClipBatch`.
            ranks: rank of this process and number of ranks; by default from the environment.
            num_workers: number of processes that read ahead; with 0 this process reads.
            timeout_seconds: longest time to wait for a batch of the workers (recipe: `data.batch_timeout_seconds`).

        Raises:
            RecipeError: `batch_size` is not micro batch x accumulation x ranks.
        """
        self.dataset, self.order = dataset, order
        self.ranks = ranks or Ranks.from_environment()
        self.micro_batch_size, self.num_workers, self.timeout_seconds = micro_batch_size, num_workers, timeout_seconds
        self.accumulation_steps = accumulation_steps(order.batch_size, micro_batch_size, self.ranks.world_size)
        self.step = 0
        self._has_noted = False

    def __iter__(self) -> Generator[list[ClipBatch]]:
        """Yields the micro batches of each step from `step` on. Close the generator: it keeps worker processes alive.

        Raises:
            ShardError: a shard is missing or damaged; the error names it.
            LostWorkerError: a worker died, or delivered no batch in time.
        """
        with contextlib.closing(self._read_ahead() if self.num_workers else self._read_here()) as batches:
            while True:
                micro_batches = list(islice(batches, self.accumulation_steps))
                self._note_unknown_regions(micro_batches)
                self.step += 1
                yield micro_batches

    def _note_unknown_regions(self, batches: list[ClipBatch]) -> None:
        """Says once, on the main rank, that a clip has no key points although the loss weighs face and hands."""
        if self._has_noted or not self.ranks.is_main:
            return
        for batch in batches:
            if batch.regions.numel() and (unknown := (batch.regions[:, 0, 0, 4] == UNKNOWN).tolist()).count(True):
                self._has_noted = True
                logger.warning(
                    "clip '%s' has no key points: objective.region_weights weighs neither its face and hands nor those "
                    "of other such clips",
                    batch.clip_ids[unknown.index(True)],
                )
                return

    def micro_batch_keys(self, step: int) -> list[list[SampleKey]]:
        """This rank's share of a step: a contiguous part of the batch, split into micro batches."""
        per_rank = self.order.batch_size // self.ranks.world_size
        share = self.order.batch(step)[self.ranks.rank * per_rank :][:per_rank]
        return [share[start : start + self.micro_batch_size] for start in range(0, per_rank, self.micro_batch_size)]

    def state_dict(self, *, steps_ahead: int = 0) -> dict[str, Any]:
        """The position, the same on every rank (JSON-able); `steps_ahead` steps were delivered and are not used yet."""
        return self.order.state_dict(self.step - steps_ahead)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved position; call this before iterating.

        Raises:
            ShardError: the training set or the order's settings differ from the saved ones.
        """
        self.step = self.order.resume(state)

    def _keys_from(self, step: int) -> Iterator[list[SampleKey]]:
        """The keys of this rank's micro batches from a step on, without end."""
        return chain.from_iterable(map(self.micro_batch_keys, count(step)))

    def _read_here(self) -> Generator[ClipBatch]:
        for keys in self._keys_from(self.step):
            batch = collate_clips([self.dataset.stored_sample(key) for key in keys])
            yield batch.pin_memory() if torch.cuda.is_available() else batch

    def _read_ahead(self) -> Generator[ClipBatch]:
        keys = self._keys_from(self.step)
        ahead = max(2, self.accumulation_steps)
        with BatchWorkers(
            self.dataset, num_workers=self.num_workers, ahead=ahead, copied_ahead=self.accumulation_steps
        ) as workers:
            try:
                for _ in range(workers.capacity):
                    workers.request(next(keys))
                while True:
                    yield workers.take(timeout_seconds=self.timeout_seconds)
                    workers.request(next(keys))
            except TimeoutError as error:
                raise LostWorkerError(self._timeout_text()) from error
            except (EOFError, OSError) as error:
                raise LostWorkerError(
                    f"a process that reads data died at step {self.step}, perhaps out of memory: {error!r}"
                ) from error

    def _timeout_text(self) -> str:
        first = self.micro_batch_keys(self.step)[0][0]
        return (
            f"no batch arrived for {self.timeout_seconds:.0f} s while waiting for step {self.step} "
            f"({self.dataset.describe(first.sample_id)} and others): the storage hangs or is too slow; "
            "raise `data.batch_timeout_seconds` or `data.num_workers`"
        )
