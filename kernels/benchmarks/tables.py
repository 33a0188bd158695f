"""The results as text: a line during the measurement, the table of targets, a Markdown table."""

from collections.abc import Sequence

from records import BOTH, Measurement, is_rival, is_wrong, milliseconds, outcomes
from workloads import Workload


def one_line(rows: Sequence[Measurement]) -> str:
    """One contestant at one workload."""
    parts = [
        f"{row.direction} {row.ms:.4g} ms ({row.lower_ms:.4g} to {row.upper_ms:.4g}), host {row.host_ms:.3g} ms, "
        f"error {row.error:.2g}"
        for row in rows
        if row.ms is not None
    ]
    return f"{rows[0].workload:32} {rows[0].backend:22} {'; '.join(parts) or rows[0].why_not}"


def targets(rows: Sequence[Measurement], workloads: Sequence[Workload]) -> str:
    """Each target at each workload: our time, the fastest rival's, and whether the target is met."""
    lines = [
        f"{'target':38} {'workload':32} {'ours ms':>8} {'rival ms':>8} {'ratio':>6} {'must':>5} {'aim':>5}  verdict"
    ]
    for found in outcomes(rows, workloads):
        lines.append(
            f"{found.target.label:38} {found.workload:32} {_number(found.ours_ms):>8} {_number(found.rival_ms):>8} "
            f"{_number(found.ratio, '.2f'):>6} {found.target.must:5.2f} {found.target.aim:5.2f}  {found.verdict}"
            + (f" ({found.rival})" if found.rival else "")
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Measurement], workloads: Sequence[Workload]) -> str:
    """A Markdown table: the machine, then our time and the fastest rival's at each workload and direction."""
    measured = [row for row in rows if row.ms is not None]
    if not measured:
        return "Not measured."
    where = sorted({f"{x.gpu}, driver {x.driver}, torch {x.torch}, triton {x.triton}, {x.commit}" for x in measured})
    dates = sorted({x.date for x in measured})
    lines = [
        f"Measured {' and '.join(dates)} on {'; and on '.join(where)}. bfloat16; median and quartiles in milliseconds; "
        "rivals in the same process on the same inputs.",
        "",
        "| shape | direction | ours ms | fastest rival ms | times faster | useful TFLOP/s | GB/s | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in workloads:
        for direction in BOTH:
            lines.append(_markdown_line(rows, workload.name, direction))
    return "\n".join(lines)


def _markdown_line(rows: Sequence[Measurement], workload: str, direction: str) -> str:
    times = milliseconds(rows, workload, (direction,))
    here = {row.backend: row for row in rows if (row.workload, row.direction) == (workload, direction)}
    rival = min((name for name in times if is_rival(name)), key=lambda name: times[name], default=None)
    ours = here.get("triton")
    beside = "not measured" if rival is None else f"{_spread(here[rival])} {rival}"
    if ours is None or ours.ms is None:
        why = "not measured" if ours is None else f"not measured: {ours.why_not}"
        return f"| {workload} | {direction} | {why} | {beside} | | | | |"
    ratio = "" if rival is None else f"{times[rival] / ours.ms:.2f}"
    error = f"{_number(ours.error, '.1e')}{' WRONG' if is_wrong(rows, workload, 'triton') else ''}"
    rates = f"{_number(ours.tflops, '.0f')} | {_number(ours.gb_per_s, '.0f')}"
    return f"| {workload} | {direction} | {_spread(ours)} | {beside} | {ratio} | {rates} | {error} |"


def _spread(row: Measurement) -> str:
    return f"{_number(row.ms)} ({_number(row.lower_ms)} to {_number(row.upper_ms)})"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)
