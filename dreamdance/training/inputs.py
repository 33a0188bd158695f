"""Prepares the inputs of a training step while the step before it is computed."""

import time
from collections.abc import Iterator

import torch

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.errors import UserError
from dreamdance.training.objectives.output import Objective, PreparedBatch


class PreparedInputs:
    """The micro batches of each step, on the device, one micro batch ahead.

    On a GPU, draws and copies of the next micro batch take place while the GPU computes the present one: its work is
    queued by then, and copies have a stream of their own. On a CPU the same calls come in the same order.

    Attributes:
        steps_ahead: 1 while a step has been read whose training has not begun, else 0.
    """

    def __init__(self, steps: Iterator[list[ClipBatch]], objective: Objective, device: torch.device) -> None:
        """Reads nothing yet.

        Args:
            steps: the micro batches of each optimizer step.
            objective: prepares them.
            device: of the objective's networks.
        """
        self._steps, self._objective = steps, objective
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: list[ClipBatch] = []
        self._ready: PreparedBatch | None = None
        self._error: UserError | OSError | None = None
        self._waited_seconds = 0.0
        self.steps_ahead = 0

    def micro_batches(self, *, is_last_step: bool) -> Iterator[PreparedBatch]:
        """Yields the micro batches of the next step; the caller queues the work of one before it asks for the next.

        Args:
            is_last_step: whether no step follows, so that none is read ahead.

        Raises:
            ShardError, LostWorkerError: reading failed. An error while reading ahead is raised with the step that
                lacks its data, and not before.
        """
        if self._error is not None:
            raise self._error
        if self._ready is None:
            self._read_step()
        self.steps_ahead = 0
        while self._ready is not None:
            ready, self._ready = self._ready, None
            yield self._hand_over(ready)
            if self._waiting:
                self._prepare_first()
            elif not is_last_step:
                try:
                    self._read_step()
                except (UserError, OSError) as error:  # the present step has its data, and is finished
                    self._error = error
                return

    def take_waited_seconds(self) -> float:
        """How long reading has made the caller wait since the last call."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _read_step(self) -> None:
        started = time.perf_counter()
        self._waiting = next(self._steps)
        self._waited_seconds += time.perf_counter() - started
        self.steps_ahead = 1
        self._prepare_first()

    def _prepare_first(self) -> None:
        batch, *self._waiting = self._waiting
        if self._stream is None:
            self._ready = self._objective.prepare(batch)
            return
        with torch.cuda.stream(self._stream):
            self._ready = self._objective.prepare(batch, non_blocking=True)

    def _hand_over(self, prepared: PreparedBatch) -> PreparedBatch:
        """Makes the computing stream wait for the copies, and keeps their memory until it has used them."""
        if self._stream is not None:
            computing = torch.cuda.current_stream()
            computing.wait_stream(self._stream)
            for values in prepared.tensors():
                values.record_stream(computing)
        return prepared
