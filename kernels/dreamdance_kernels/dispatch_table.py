"""Reads `dispatch_table.csv`: which backend was the fastest for an attention, and what was measured.

`kernels/benchmarks/measure.py --write-dispatch` derives the rows from its measurements. Shapes that nobody measured go
to torch's fused attention. This module handles no tensors.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_name("dispatch_table.csv")
FALLBACK_BACKEND = "sdpa"
MAX_LENGTH_RATIO = 2.0  # a measured length counts for lengths from half to twice its own


@dataclass(frozen=True)
class Choice:
    """A backend, and the reason for it as the log shows it."""

    backend: str
    reason: str


@dataclass(frozen=True)
class MeasuredCase:
    """A row of the table: the fastest backend, forward plus backward, of one attention on one architecture.

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
        ValueError: a column is missing, or a value does not parse; the message names the file and the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected = [field.name for field in fields(MeasuredCase)]
        if reader.fieldnames != expected:
            raise ValueError(f"{path}: the columns must be {', '.join(expected)}; got {reader.fieldnames}")
        cases = []
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError(f"the line must have {len(expected)} values")
                case = MeasuredCase(
                    function=row["function"],
                    head_width=int(row["head_width"]),
                    num_queries=int(row["num_queries"]),
                    num_keys=int(row["num_keys"]),
                    architecture=row["architecture"],
                    backend=row["backend"],
                    reason=row["reason"],
                )
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{reader.line_num}: {error}; run measure.py --write-dispatch again") from error
            cases.append(case)
        return tuple(cases)


def write_table(cases: Sequence[MeasuredCase], path: Path = TABLE) -> None:
    """Write the whole table; without `cases` it states that nothing was measured."""
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
    """Return the fastest backend at the measured lengths nearest to these, if any are near enough.

    Args:
        function: `geometry`, `reference` or `temporal`; only rows of the same function count.
        head_width: d; only rows of the same width count.
        num_queries: length of the queries of one softmax.
        num_keys: length of that softmax.
        architecture: (major, minor) compute capability; only rows of the same capability count.
        table: rows to use instead of the package's table.

    Returns:
        The choice; `sdpa`, with that reason, where nothing near enough was measured.
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
    """The distance of a call's lengths from a row's: the logarithm of the larger of the two ratios."""
    pairs = ((case.num_queries, num_queries), (case.num_keys, num_keys))
    return max(abs(math.log(max(measured, 1) / max(asked, 1))) for measured, asked in pairs)


PACKAGED = read_table()
