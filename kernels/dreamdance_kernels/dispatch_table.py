"""Which backend was measured to be the fastest for an attention, and how we know: the package's own table.

The rows of `dispatch_table.csv` are derived from measurements by `kernels/benchmarks/measure.py --write-dispatch`. What
nobody measured is computed by torch's own fused attention. This module decides nothing else; it knows no tensors.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_name("dispatch_table.csv")
FALLBACK_BACKEND = "sdpa"
MAX_LENGTH_RATIO = 2.0  # a measured length speaks for lengths up to twice and down to half of its own


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason in words, as it is logged."""

    backend: str
    reason: str


@dataclass(frozen=True)
class MeasuredCase:
    """A row of the table: the fastest backend, forward and backward together, of one attention on one architecture.

    Args:
        function: `geometry`, `reference` or `temporal`.
        head_width: d.
        num_queries: length of the queries that share one softmax's keys.
        num_keys: length of that softmax.
        architecture: such as `sm_90`.
        backend: a name of `available_backends()`.
        reason: what was measured, such as `3.10 ms against sdpa's 4.02 ms on NVIDIA H200`.
    """

    function: str
    head_width: int
    num_queries: int
    num_keys: int
    architecture: str
    backend: str
    reason: str


def read_table(path: Path = TABLE) -> tuple[MeasuredCase, ...]:
    """The rows of a table.

    Raises:
        ValueError: a column is missing or is not what it should be; the text names the file and the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected = [field.name for field in fields(MeasuredCase)]
        if reader.fieldnames != expected:
            raise ValueError(f"{path}: the columns must be {', '.join(expected)}; got {reader.fieldnames}")
        cases = []
        for row in reader:
            try:
                numbers = {name: int(row[name]) for name in ("head_width", "num_queries", "num_keys")}
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}; run measure.py --write-dispatch again") from error
            cases.append(MeasuredCase(**{**row, **numbers}))
        return tuple(cases)


def write_table(cases: Sequence[MeasuredCase], path: Path = TABLE) -> None:
    """Write the table anew; `cases` may be empty: then nothing has been measured."""
    columns = [field.name for field in fields(MeasuredCase)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([getattr(case, name) for name in columns] for case in cases)


def fastest(
    function: str,
    head_width: int,
    num_queries: int,
    num_keys: int,
    architecture: tuple[int, int],
    *,
    table: Sequence[MeasuredCase] | None = None,
) -> Choice:
    """The backend that was the fastest at the measured lengths nearest to these, if any are near.

    Args:
        function: `geometry`, `reference` or `temporal`; must be one that was measured.
        head_width: d; must be one that was measured.
        num_queries: length of the queries of one softmax.
        num_keys: length of that softmax.
        architecture: (major, minor) compute capability; must be one that was measured.
        table: rows to read instead of the package's own.

    Returns:
        The choice; `sdpa` where nothing near enough was measured, and then the reason says so.
    """
    name = "sm_{}{}".format(*architecture)
    on_architecture = [case for case in (PACKAGED if table is None else table) if case.architecture == name]
    if not on_architecture:
        return Choice(FALLBACK_BACKEND, f"not measured on {name}")
    distances = {
        case: _distance(case, num_queries, num_keys)
        for case in on_architecture
        if case.function == function and case.head_width == head_width
    }
    nearest = min(distances, key=lambda case: distances[case], default=None)
    if nearest is None or distances[nearest] > math.log(MAX_LENGTH_RATIO) + 1e-9:
        lengths = f"{num_queries} queries and {num_keys} keys"
        return Choice(FALLBACK_BACKEND, f"{function} with heads of {head_width}, {lengths}: not measured on {name}")
    return Choice(nearest.backend, nearest.reason)


def _distance(case: MeasuredCase, num_queries: int, num_keys: int) -> float:
    """How far lengths are apart, as the logarithm of the larger of the two ratios."""
    pairs = ((case.num_queries, num_queries), (case.num_keys, num_keys))
    return max(abs(math.log(max(measured, 1) / max(asked, 1))) for measured, asked in pairs)


PACKAGED = read_table()
