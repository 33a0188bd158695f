"""Worker processes that read micro batches ahead. If one dies, stops or hangs, the reader gets an error in time.

torch's workers send each tensor's file descriptor through a thread of the worker; if that worker is stopped, the
receiver waits without limit. These workers share memory with the reader from the start, and each message is so small
that the pipe takes it whole. This module does not know steps and epochs.
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
JOIN_SECONDS = 5.0  # a killed process ends at once, unless the kernel waits for a file system


class BatchWorkers:
    """Worker processes that read micro batches in turn. A context manager: it kills all of them at its end."""

    def __init__(self, dataset: ClipDataset, *, num_workers: int, ahead: int, copied_ahead: int) -> None:
        """Starts the workers, which then wait for keys.

        Args:
            dataset: the training windows; each worker gets a copy.
            num_workers: number of worker processes, at least 1.
            ahead: number of micro batches that each worker reads ahead.
            copied_ahead: number of micro batches that a thread of this process copies ahead.
        """
        self.capacity = num_workers * ahead
        self._copied_ahead, self._num_copies = copied_ahead, 0
        self._workers = [_Worker(dataset, num_slots=ahead) for _ in range(num_workers)]
        self._requested: deque[_Worker] = deque()
        self._to_copy: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._copied: queue.SimpleQueue[ClipBatch | Exception] = queue.SimpleQueue()
        # A daemon thread: this process must be able to end without it.
        self._thread = threading.Thread(target=self._copy_batches, name="batches", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BatchWorkers":
        return self

    def __exit__(self, *exception: object) -> None:
        """Kills the workers: a worker that is stopped or waits for storage reacts to no other signal."""
        for worker in self._workers:
            worker.process.kill()
        self._to_copy.put(None)
        self._thread.join(JOIN_SECONDS)
        for worker in self._workers:
            worker.close()

    def request(self, keys: Sequence[SampleKey]) -> None:
        """Sends the keys of a micro batch to the next worker; at most `capacity` requests may be open.

        Raises:
            OSError: the worker died.
        """
        worker = self._workers[0]
        self._workers = [*self._workers[1:], worker]
        worker.connection.send(keys)
        self._requested.append(worker)

    def take(self, *, timeout_seconds: float) -> ClipBatch:
        """The micro batch of the oldest open request, in page-locked memory if there is a GPU.

        Raises:
            TimeoutError: the micro batch did not arrive in time.
            EOFError, OSError: the worker that had to read it died.
            ShardError: a shard is missing or damaged.
            RuntimeError: another error in the worker; the text is its traceback.
        """
        self._copy_more()
        # Waits in short intervals: if this process itself is suspended, at most one interval of that time is counted.
        for _ in range(math.ceil(timeout_seconds / LOOK_EVERY_SECONDS)):
            with contextlib.suppress(queue.Empty):
                answer = self._copied.get(timeout=min(timeout_seconds, LOOK_EVERY_SECONDS))
                break
        else:
            raise TimeoutError(f"no micro batch arrived for {timeout_seconds:.0f} s")
        self._num_copies -= 1
        self._copy_more()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _copy_more(self) -> None:
        while self._requested and self._num_copies < self._copied_ahead:
            self._to_copy.put(self._requested.popleft())
            self._num_copies += 1

    def _copy_batches(self) -> None:
        """Runs in the thread: copies batches while the process trains. Only this thread may wait without limit."""
        pin = torch.cuda.is_available()
        for worker in iter(self._to_copy.get, None):
            try:
                packed = worker.connection.recv()
                self._copied.put(packed if isinstance(packed, Exception) else worker.slots.read(packed, pin=pin))
            except (EOFError, OSError) as error:
                self._copied.put(error)


class _Worker:
    """The reader's side of one worker process."""

    def __init__(self, dataset: ClipDataset, *, num_slots: int) -> None:
        self.slots = SharedSlots(num_slots)
        context = worker_context(__name__)
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=_read_batches, args=(dataset, worker_end, self.slots), daemon=True)
        self.process.start()
        worker_end.close()  # so that the pipe ends when the worker dies

    def close(self) -> None:
        """Frees the resources of a killed worker in this process."""
        self.process.join(JOIN_SECONDS)
        if self.process.exitcode is not None:
            self.process.close()
        self.connection.close()
        self.slots.close()


def _read_batches(dataset: ClipDataset, connection: Connection, slots: SharedSlots) -> None:
    """Runs in the worker: answers each list of keys with a packed batch or an error."""
    start_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the worker too; only the reader reacts to it
    slot = 0
    with contextlib.suppress(EOFError, OSError):  # the reader is gone
        while True:
            keys: Sequence[SampleKey] = connection.recv()
            try:
                connection.send(_answer(dataset, keys, slots, slot))
            except Exception:  # an exception that is not sent would look like a death of the worker
                connection.send(RuntimeError(f"in a process that reads data:\n{traceback.format_exc()}"))
                raise
            slot = (slot + 1) % slots.count


def _answer(dataset: ClipDataset, keys: Sequence[SampleKey], slots: SharedSlots, slot: int) -> PackedBatch | ShardError:
    try:
        return slots.write(collate_clips([dataset.stored_sample(key) for key in keys]), slot=slot)
    except ShardError as error:  # its cause is not sent, so the worker decides whether the error is transient
        return LostWorkerError(str(error)) if is_transient(error) else error
