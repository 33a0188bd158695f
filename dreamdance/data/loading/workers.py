"""Processes that read micro batches ahead; one that dies, stops or hangs costs their reader no more than a time-out.

torch's workers send each tensor's descriptor through a thread of their own, for which the receiver waits without limit
where that worker is stopped. Here they share memory with their reader from the start, and what travels is so small that
it travels whole or not at all. Knows nothing of steps and epochs.
"""

import contextlib
import math
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.shared_memory import PackedBatch, SharedSlots
from dreamdance.errors import LostWorkerError, ShardError, is_transient
from dreamdance.runtime.worker_processes import start_worker, worker_context

LOOK_EVERY_SECONDS = 1.0
JOIN_SECONDS = 5.0  # who is killed is gone at once, unless the kernel itself waits for a file system


class BatchWorkers:
    """Some processes that each read a micro batch in turn; a context manager, which leaves none of them behind."""

    def __init__(self, dataset: ClipDataset, *, num_workers: int, ahead: int, copied_ahead: int) -> None:
        """Starts them; they wait for keys.

        Args:
            dataset: what to read; each of them gets a copy.
            num_workers: how many, at least 1.
            ahead: how many micro batches each has read before the first of them is taken.
            copied_ahead: how many a thread of this process has taken over before they are asked for.
        """
        self.capacity = num_workers * ahead
        self._copied_ahead, self._num_wanted = copied_ahead, 0
        self._workers = [_Worker(dataset, num_slots=ahead) for _ in range(num_workers)]
        self._asked: deque[_Worker] = deque()
        self._wanted: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[ClipBatch | Exception] = queue.SimpleQueue()
        # A daemon: the end of this process must not wait for it.
        self._thread = threading.Thread(target=self._take_over, name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BatchWorkers":
        return self

    def __exit__(self, *exception: object) -> None:
        """Kills them: one that is stopped, or waits for its storage, would hear nothing else."""
        for worker in self._workers:
            worker.process.kill()
        self._wanted.put(None)
        self._thread.join(JOIN_SECONDS)
        for worker in self._workers:
            worker.close()

    def ask(self, keys: Sequence[SampleKey]) -> None:
        """Has the worker whose turn it is read a micro batch; `capacity` may be asked for and not yet taken.

        Raises:
            OSError: it died.
        """
        worker = self._workers[0]
        self._workers = [*self._workers[1:], worker]
        worker.connection.send(keys)
        self._asked.append(worker)

    def take(self, *, timeout_seconds: float) -> ClipBatch:
        """The first micro batch that was asked for and not yet taken, in page-locked memory where there is a GPU.

        Raises:
            TimeoutError: it did not come within the time.
            EOFError, OSError: the process that was to read it died.
            ShardError: what is wrong with its shard.
            RuntimeError: what else went wrong in that process.
        """
        self._want_more()
        # In pieces: time in which this very process was suspended counts as one of them at most.
        for _ in range(math.ceil(timeout_seconds / LOOK_EVERY_SECONDS)):
            with contextlib.suppress(queue.Empty):
                answer = self._taken.get(timeout=min(timeout_seconds, LOOK_EVERY_SECONDS))
                break
        else:
            raise TimeoutError(f"no micro batch for {timeout_seconds:.0f} s")
        self._num_wanted -= 1
        self._want_more()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _want_more(self) -> None:
        while self._asked and self._num_wanted < self._copied_ahead:
            self._wanted.put(self._asked.popleft())
            self._num_wanted += 1

    def _take_over(self) -> None:
        """The thread: copies while the process trains, and is the one who waits for ever if anybody does."""
        pin = torch.cuda.is_available()
        for worker in iter(self._wanted.get, None):
            try:
                packed = worker.connection.recv()
                self._taken.put(packed if isinstance(packed, Exception) else worker.slots.read(packed, pin=pin))
            except (EOFError, OSError) as error:
                self._taken.put(error)


class _Worker:
    """One process, seen from the one that it reads for."""

    def __init__(self, dataset: ClipDataset, *, num_slots: int) -> None:
        self.slots = SharedSlots(num_slots)
        context = worker_context(__name__)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_read_batches, args=(dataset, theirs, self.slots), daemon=True)
        self.process.start()
        theirs.close()  # else its death would not show as the end of what comes from it

    def close(self) -> None:
        """Frees what it held here; it has been killed."""
        self.process.join(JOIN_SECONDS)
        if self.process.exitcode is not None:
            self.process.close()
        self.connection.close()
        self.slots.close()


def _read_batches(dataset: ClipDataset, connection: Connection, slots: SharedSlots) -> None:
    """The process: answers each list of keys with a packed batch, or with what is wrong."""
    start_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the process that it reads for decides
    slot = 0
    with contextlib.suppress(EOFError, OSError):  # that process is gone
        while True:
            keys: Sequence[SampleKey] = connection.recv()
            try:
                connection.send(_answer(dataset, keys, slots, slot))
            except Exception:  # an exception that just left the process would arrive as its death
                connection.send(RuntimeError(f"in a process that reads data:\n{traceback.format_exc()}"))
                raise
            slot = (slot + 1) % slots.count


def _answer(dataset: ClipDataset, keys: Sequence[SampleKey], slots: SharedSlots, slot: int) -> PackedBatch | ShardError:
    try:
        return slots.write(collate_clips([dataset.training_sample(key) for key in keys]), slot=slot)
    except ShardError as error:  # what it follows from stays here, so that is judged here
        return LostWorkerError(str(error)) if is_transient(error) else error
