"""Times calls: medians and quartiles; on a GPU with CUDA events and a full queue."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CYCLES_PER_MS = 2e6  # a GPU's clock runs at most at 2 GHz
MIN_REPETITIONS, MAX_REPETITIONS = 12, 200
MIN_CPU_REPETITIONS = 2  # a CPU only tests the path
CALLS_PER_QUEUE = 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and quartiles on the device, and the host's median to issue it."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    host_ms: float


def time_calls(calls: Sequence[Callable[[], object]], *, device: torch.device, seconds: float) -> Timing:
    """Time the calls in turn, repeatedly. Each has its own data, so that together they exceed the cache.

    Args:
        calls: the calls to time; all do the same work.
        device: the device that computes.
        seconds: how long to measure, roughly.
    """
    if device.type != "cuda":
        return _time_on_cpu(calls, seconds=seconds)
    for call in calls:  # compiles, loads, allocates; twice, as the second call may still allocate
        call()
        call()
    estimate = _time_queue([calls[i % len(calls)] for i in range(5)], host_ms=5.0)
    host_ms = max(host for _, host in estimate)
    device_ms = max(sorted(ms for ms, _ in estimate)[2], 1e-3)
    repetitions = min(max(int(seconds * 1e3 / device_ms), MIN_REPETITIONS), MAX_REPETITIONS)

    samples: list[tuple[float, float]] = []
    while len(samples) < repetitions:
        first, count = len(samples), min(CALLS_PER_QUEUE, repetitions - len(samples))
        samples += _time_queue([calls[(first + i) % len(calls)] for i in range(count)], host_ms=host_ms)
    return _summarise(samples)


def _time_queue(calls: Sequence[Callable[[], object]], *, host_ms: float) -> list[tuple[float, float]]:
    """(device, host) milliseconds of each call.

    The device first sleeps until the host has issued the calls, so that they run without waiting for the host.
    Otherwise a kernel of 20 microseconds would be measured as the 100 that Python takes to launch it.
    """
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    host = []
    torch.cuda._sleep(int(min(1.5 * host_ms * len(calls), 300.0) * CYCLES_PER_MS))
    for call, (start, end) in zip(calls, events, strict=True):
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host.append((time.perf_counter() - began) * 1e3)
    torch.cuda.synchronize()
    return [(start.elapsed_time(end), ms) for (start, end), ms in zip(events, host, strict=True)]


def _time_on_cpu(calls: Sequence[Callable[[], object]], *, seconds: float) -> Timing:
    samples: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(samples) < MIN_CPU_REPETITIONS or (
        time.perf_counter() - began < seconds and len(samples) < MAX_REPETITIONS
    ):
        started = time.perf_counter()
        calls[len(samples) % len(calls)]()
        elapsed = (time.perf_counter() - started) * 1e3
        samples.append((elapsed, elapsed))
    return _summarise(samples)


def _summarise(samples: Sequence[tuple[float, float]]) -> Timing:
    device, host = (torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True))
    lower, median, upper = device.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Timing(median_ms=median, lower_ms=lower, upper_ms=upper, host_ms=host.median().item())
