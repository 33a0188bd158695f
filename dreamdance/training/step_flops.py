"""Counts the floating-point operations of a training step, once in each start of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from dreamdance.training.planning.operator_count import OperatorCount, count_model_flops


class StepFlops:
    """The operations of products, convolutions and attention, forward and backward, without repeated ones.

    Gradient checkpointing repeats operations; a training that repeats fewer has the same count and is faster.
    """

    def __init__(self, *, enabled: bool, per_micro_batch: int | None = None) -> None:
        """Prepares the count of the first micro batch that this process computes; all others have the same shapes.

        Args:
            enabled: whether to count.
            per_micro_batch: the count, if it is known. Parts that torch has compiled must not run while this counts:
                torch would run them without the compiled code.
        """
        self._counter = OperatorCount() if enabled and per_micro_batch is None else None
        self._per_micro_batch = per_micro_batch if enabled else None

    def of_micro_batches(self, number: int) -> int | None:
        """The operations of so many micro batches; None before the first one is computed, or if nothing is counted."""
        return None if self._per_micro_batch is None else number * self._per_micro_batch

    @contextmanager
    def counting(self, phase: Literal["forward", "backward"]) -> Iterator[None]:
        """Counts the block, if it is of the first micro batch; its backward pass follows its forward pass."""
        if self._counter is None:
            yield
            return
        self._counter.phase = phase
        with self._counter:
            yield
        if phase == "backward":
            self._per_micro_batch, self._counter = count_model_flops(self._counter.work), None
