"""Opens the process group, exchanges small values between ranks, and makes arithmetic repeatable.

This module does not know models, DeepSpeed or the meaning of the values.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d

from dreamdance.errors import UserError, is_transient
from dreamdance.runtime.ranks import Ranks

Result = TypeVar("Result")


@contextmanager
def process_group(ranks: Ranks, *, timeout_seconds: int) -> Iterator[None]:
    """Holds the process group open: NCCL where there are GPUs, gloo otherwise.

    A single process needs no address. Its group stays open, so that one process can run several recipes in turn (the
    `debug` cluster). A group of several processes ends here, after every rank has arrived.

    Args:
        ranks: this process.
        timeout_seconds: how long a collective may wait for another rank before it raises.
    """
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        ranks.take_gpu()
    if dist.is_initialized():
        yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.HashStore() if ranks.world_size == 1 else _meeting_place(ranks, timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
        # With a device, NCCL connects at once: errors appear at the start, and a barrier need not guess the GPU.
        device_id=ranks.device if on_gpu else None,
    )
    yield
    if ranks.world_size > 1:
        dist.barrier()  # protects slower ranks, still in their last collective, from a peer that has left
        dist.destroy_process_group()


def _meeting_place(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """The store at rank 0 through which ranks exchange addresses, under a name that no other job's ranks use.

    Two jobs may have drawn the same port of one node. Rank 0 of the later job finds the port taken and ends. Its other
    ranks may have connected to the earlier job's rank 0 by then; that job must not count them as its own ranks.

    Raises:
        UserError: MASTER_PORT is taken; another start draws another port.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # `wait_for_workers` would count every connection as a rank; the group itself waits for each rank by name.
        store = dist.TCPStore(host, port, is_master=ranks.is_main, timeout=timeout, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        taken = f"port {port} of {socket.gethostname()} (MASTER_PORT) is taken by another program"
        raise UserError(f"{taken}; the next start takes another port") from OSError(
            errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)
        )
    return dist.PrefixStore(ranks.start, store)


def common_store() -> dist.Store:
    """The store through which ranks of the process group exchange small values without a collective."""
    return distributed_c10d._get_default_store()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Returns the sum over all ranks of a small tensor, in float64 so that counts stay exact."""
    total = values.to(torch.float64)
    dist.all_reduce(total)
    return total


def gather_from_ranks(value: Any) -> list[Any]:
    """Returns every rank's `value` (a small plain object), in the order of ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any] | None:
    """Returns every rank's `value`, in the order of ranks, on the main process, and None on the others. Collective."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def from_main(value: Any) -> Any:
    """Returns the main process's `value` (a small plain object) on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a call: its value, or the error's text and whether a user can fix it."""

    value: Any = None
    error: str | None = None
    is_user_error: bool = False


def on_main(function: Callable[[], Result]) -> Result:
    """Calls `function` on the main process alone and returns its value (a small plain object) on every rank.

    Collective: no rank continues before the call has returned. If the call raises, every rank raises; otherwise the
    other ranks would wait for the main process until the time-out.

    Raises:
        UserError: the call raised one; on the main process it is the error itself.
        RuntimeError: the call raised any other error; on the main process it is the error itself.
    """
    if dist.get_rank() == 0:
        try:
            outcome = _Outcome(function())
        except Exception as error:
            is_users = isinstance(error, UserError) and not is_transient(error)
            from_main(_Outcome(error=f"{type(error).__name__}: {error}", is_user_error=is_users))
            raise
        from_main(outcome)
    else:
        outcome = from_main(None)
        if outcome.error is not None:
            kind = UserError if outcome.is_user_error else RuntimeError
            raise kind(f"the main process failed: {outcome.error}")
    value: Result = outcome.value
    return value


def is_deterministic(setting: bool | None, ranks: Ranks) -> bool:
    """The recipe's `deterministic`. If unset: on for the CPU, off for GPUs, where it costs speed."""
    return ranks.device.type == "cpu" if setting is None else setting


@contextmanager
def repeatable_arithmetic(enabled: bool) -> Iterator[None]:
    """Within the block, the same inputs give the same bits, or an operation that cannot guarantee that raises.

    If not enabled, cuDNN measures which of its convolutions is the fastest: shapes in training are constant.
    """
    settings: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    measures = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not enabled
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling every fresh buffer with NaN finds bugs, but DeepSpeed allocates its reduction buckets at each step.
        settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = measures
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
