"""The measurements as rows of a CSV, and their results: ratios, the table of targets, the dispatch table."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from contestants import CONCAT, OURS
from workloads import Workload

from dreamdance_kernels.dispatch_table import MeasuredCase

# Contestant to backend, for the contestants that are backends of the library.
DISPATCHED = {"triton": "triton", "sdpa": "sdpa", "flash_attn_2": "flash"}
DISPATCHED_FUNCTIONS = ("geometry", "reference", "temporal")
BOTH = ("forward", "backward")
WRONG_FACTOR = 2.0  # an error this many times the largest rival's is no rounding error


@dataclass(frozen=True)
class Environment:
    """Where a measurement was made."""

    date: str
    commit: str
    gpu: str
    capability: str
    driver: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Measurement:
    """One contestant at one workload in one direction; if it did not run, the reason instead of times.

    Args:
        date, commit, gpu, capability, driver, torch, triton: as in `Environment`.
        workload: the workload's name.
        function: `geometry`, `reference`, `temporal` or `group_norm_silu`.
        head_width: d; the channels of a group.
        num_heads: heads; groups.
        num_queries: number of queries of one softmax; likewise `num_keys`.
        batch: `outer x inner` of the workload.
        direction: `forward` or `backward`.
        backend: the contestant.
        ms: median time on the GPU; `lower_ms` and `upper_ms` are the quartiles.
        host_ms: median time that Python takes to issue one call.
        tflops: useful operations per second, in 10^12, without padding.
        gb_per_s: fewest bytes per second, in 10^9.
        saved_mib: MiB that the forward keeps for the backward.
        error: largest difference from float64, relative to the largest value; of several tensors the worst.
        times_faster_than_best_rival: the fastest rival's median over this one's.
        why_not: the reason why there is no time.
    """

    date: str
    commit: str
    gpu: str
    capability: str
    driver: str
    torch: str
    triton: str
    workload: str
    function: str
    head_width: int
    num_heads: int
    num_queries: int
    num_keys: int
    batch: str
    direction: str
    backend: str
    ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    host_ms: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    saved_mib: float | None = None
    error: float | None = None
    times_faster_than_best_rival: float | None = None
    why_not: str = ""


def describe(workload: Workload, *, backend: str, direction: str, environment: Environment) -> Measurement:
    """A row without results."""
    return Measurement(
        **asdict(environment),
        workload=workload.name,
        function=workload.function,
        head_width=workload.head_width,
        num_heads=workload.num_heads,
        num_queries=workload.num_queries,
        num_keys=workload.num_keys,
        batch=f"{workload.outer}x{workload.inner}",
        direction=direction,
        backend=backend,
    )


def read_rows(path: Path) -> list[Measurement]:
    kinds = {field.name: field.type for field in fields(Measurement)}

    def parse(name: str, text: str) -> Any:
        if kinds[name] is str:
            return text
        return int(text) if kinds[name] is int else (float(text) if text else None)

    with path.open(newline="", encoding="utf-8") as file:
        return [Measurement(**{name: parse(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def write_rows(rows: Sequence[Measurement], path: Path) -> None:
    """Write all rows with their current ratios; replace the file atomically, so that an interruption loses nothing."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Measurement)])
        for row in with_ratios(rows):
            values = asdict(row).values()
            writer.writerow(["" if x is None else f"{x:.5g}" if isinstance(x, float) else x for x in values])
    partial.replace(path)


def is_rival(backend: str) -> bool:
    return not backend.startswith(OURS)


def with_ratios(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows, each with the fastest rival's time over its own, for the same workload and direction."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.ms is not None and is_rival(row.backend):
            key = (row.workload, row.direction)
            best[key] = min(row.ms, best.get(key, row.ms))
    return [
        replace(row, times_faster_than_best_rival=best[row.workload, row.direction] / row.ms)
        if row.ms is not None and (row.workload, row.direction) in best
        else row
        for row in rows
    ]


def milliseconds(rows: Iterable[Measurement], workload: str, directions: Sequence[str]) -> dict[str, float]:
    """The sum of the directions' times, for each contestant that has a time for all of them."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.workload == workload and row.direction in directions and row.ms is not None:
            found.setdefault(row.backend, {})[row.direction] = row.ms
    return {backend: sum(times.values()) for backend, times in found.items() if len(times) == len(directions)}


def is_wrong(rows: Sequence[Measurement], workload: str, backend: str) -> bool:
    """Whether a contestant's error at a workload is larger than rounding explains."""
    here = [row for row in rows if row.workload == workload and row.error is not None]
    for direction in BOTH:
        errors = {row.backend: row.error for row in here if row.direction == direction and row.error is not None}
        rivals = [error for name, error in errors.items() if is_rival(name)]
        if backend in errors and rivals and not errors[backend] <= WRONG_FACTOR * max(rivals):  # NaN is wrong too
            return True
    return False


@dataclass(frozen=True)
class Target:
    """A target: at these workloads, this many times faster than the fastest rival.

    Args:
        label: the name in the table.
        workload_prefix: the target covers the workloads whose name starts so.
        directions: the directions whose times are added up.
        must: the required ratio.
        aim: the ratio that we aim at.
        rivals: part of the names of the rivals that count; empty for all.
    """

    label: str
    workload_prefix: str
    directions: tuple[str, ...]
    must: float
    aim: float
    rivals: str = ""


TARGETS = (
    Target("geometry d40 forward", "geometry d40", ("forward",), 1.10, 1.45),
    Target("geometry d40 backward", "geometry d40", ("backward",), 1.0, 1.2),
    Target("reference d40 with its projections", "reference d40", BOTH, 1.25, 1.5),
    Target("geometry d80", "geometry d80", BOTH, 1.0, 1.15),
    Target("geometry d160", "geometry d160", BOTH, 1.0, 1.3),
    Target("temporal T16", "temporal d40 T16", BOTH, 2.0, 3.0),
    Target("temporal T24", "temporal d40 T24", BOTH, 2.0, 3.0),
    Target("temporal against flash", "temporal d40", BOTH, 2.0, 5.0, rivals="flash"),
    Target("concat-and-repeat form d40", "geometry d40", BOTH, 1.3, 1.45, rivals=CONCAT),
    Target("GroupNorm+SiLU", "group_norm_silu", BOTH, 1.5, 3.0),
)


@dataclass(frozen=True)
class Outcome:
    """A target at one workload: the fastest rival, and whether the target is met."""

    target: Target
    workload: str
    ours_ms: float | None
    rival: str
    rival_ms: float | None
    verdict: str

    @property
    def ratio(self) -> float | None:
        return None if self.ours_ms is None or self.rival_ms is None else self.rival_ms / self.ours_ms


def outcomes(rows: Sequence[Measurement], workloads: Sequence[Workload]) -> list[Outcome]:
    """Each target at each workload that it covers, measured or not."""
    found = []
    for target in TARGETS:
        for workload in workloads:
            if not workload.name.startswith(target.workload_prefix):
                continue
            if target.rivals == CONCAT and not workload.with_concat:
                continue
            times = milliseconds(rows, workload.name, target.directions)
            ours = times.get("triton")
            rivals = {name: ms for name, ms in times.items() if is_rival(name) and target.rivals in name}
            rival = min(rivals, key=lambda name: rivals[name], default="")
            verdict = _verdict(target, ours, rivals.get(rival), wrong=is_wrong(rows, workload.name, "triton"))
            found.append(Outcome(target, workload.name, ours, rival, rivals.get(rival), verdict))
    return found


def _verdict(target: Target, ours: float | None, rival: float | None, *, wrong: bool) -> str:
    if ours is None or rival is None:
        return "not measured"
    if wrong:
        return "WRONG RESULT"
    ratio = rival / ours
    return "aim met" if ratio >= target.aim else "must met" if ratio >= target.must else "missed"


def dispatch_cases(rows: Sequence[Measurement]) -> list[MeasuredCase]:
    """The fastest of the library's backends for each attention measured, forward and backward together.

    Times of different batches with the same lengths are added up. A backend with a wrong result does not count.
    """
    keys: dict[tuple[str, int, int, int, str], set[str]] = {}
    for row in rows:
        if row.function in DISPATCHED_FUNCTIONS and row.capability:
            key = (row.function, row.head_width, row.num_queries, row.num_keys, row.capability)
            keys.setdefault(key, set()).add(row.workload)
    cases = []
    for key, names in keys.items():
        totals: dict[str, float] = {}
        for name in names:
            times = milliseconds(rows, name, BOTH)
            for contestant, backend in DISPATCHED.items():
                known = contestant in times and not is_wrong(rows, name, contestant)
                totals[backend] = totals.get(backend, 0.0) + (times[contestant] if known else float("inf"))
        ranked = sorted((ms, backend) for backend, ms in totals.items() if ms != float("inf"))
        if ranked:
            first = next(row for row in rows if row.workload in names)
            others = " and ".join(f"{backend}'s {ms:.3g} ms" for ms, backend in ranked[1:]) or "nothing else that ran"
            reason = f"{ranked[0][0]:.3g} ms forward and backward against {others} on {first.gpu}, torch {first.torch}"
            cases.append(MeasuredCase(*key, backend=ranked[0][1], reason=reason))
    return sorted(cases, key=lambda case: (case.function, case.head_width, case.num_queries, case.architecture))
