"""What tools/claims.py prints of its numbers: a table and sentences for the demo's aims and for each claim."""

import statistics
from collections.abc import Mapping, Sequence

from claims_aims import CLIPS, aims_text, curve_text
from claims_comparisons import COMPARISONS, SHOWN, TITLES
from claims_names import CLAIMS, METRICS_OF_MAPS
from claims_table import DIGITS, LEAST_SEEDS, Row, overall, sentence, values_of

from dreamdance.evaluation.scores import METRICS

ARROWS = {metric.key: metric.arrow for metric in METRICS}
RULE = (
    "Tables show mean +- standard deviation over seeds. A comparison holds if every seed's difference is right and "
    "their mean is above zero by Student's t (one-sided, 5 %; all seeds judge the same {clips}clips, so the spread is "
    "that of training and sampling, not of people). It does not hold at this size if no seed's difference is right and "
    "their mean is below zero by the same test, or if all are exactly equal. Otherwise, and with fewer than three "
    "seeds, it is not decided. The demo's aims are judged by the mean over at least "
    f"{LEAST_SEEDS} seeds on at least {CLIPS} clips; that more steps never harm, by the worst seed."
)


def markdown(rows: Sequence[Row], claims: Sequence[str], people: Mapping[str, str] | None = None) -> str:
    """The rule, then a table and the sentences for each claim.

    Args:
        rows: of the CSV file.
        claims: what is printed.
        people: an aim's text -> its spread over people (tools/claims_people.py).
    """
    most = max((row.clips for row in rows), default=0)
    parts = [RULE.format(clips=f"{most} " if most else "")]
    for claim in (name for name in CLAIMS if name in claims):
        compared = [comparison for comparison in COMPARISONS if comparison.claim == claim]
        lines = [f"- {'also: ' if comparison.is_extra else ''}{sentence(rows, comparison)}" for comparison in compared]
        table = _tables([row for row in rows if row.claim == claim])
        if claim == "demo":
            said = [aims_text(rows, people or {})]
        else:
            said = [curve_text(rows)] if claim == "curve" else [overall(rows, claim), "\n".join(lines)]
        parts.append("\n\n".join(part for part in (f"## {TITLES[claim]}", table, *said) if part))
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> str:
    """A table of the rows of one claim, or one for each number of clips, which then stands above it."""
    numbers = sorted({row.clips for row in rows}, reverse=True)
    if len(numbers) < 2:
        return _table(rows) if rows else ""
    tables = {number: _table([row for row in rows if row.clips == number]) for number in numbers}
    return "\n\n".join(
        f"Of {number} clips, not to be compared with rows of other clips:\n\n{table}"
        for number, table in tables.items()
    )


def _table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over seeds; beside each the number of clips and steps."""
    claim, variants = rows[0].claim, dict.fromkeys(row.variant for row in rows)
    metrics = [name for name in SHOWN[claim] if any(row.metric == name for row in rows)]
    arrows = [f"{name} {ARROWS[name]}" for name in metrics]
    lines = [["variant", *arrows, "seeds", "clips", "steps"]]
    for variant in variants:
        own = [row for row in rows if row.variant == variant]
        cells = [spread([*values_of(own, claim, variant, name).values()], DIGITS[name]) for name in metrics]
        clips = ", ".join(sorted({str(row.clips) for row in own}))
        lines.append([variant, *cells, str(len({row.seed for row in own})), clips, _steps(own)])
    lines.insert(1, ["---", *["--:"] * len(metrics), "--:", "--:", "---"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _steps(rows: Sequence[Row]) -> str:
    """The steps of training behind some rows; those of their maps apart, if another model made them."""
    maps, others = (sorted({row.steps for row in rows if (row.metric in METRICS_OF_MAPS) == is_map})
                    for is_map in (True, False))  # fmt: skip
    if not others or not maps or maps == others:
        return ", ".join(others or maps)
    return f"{', '.join(others)}; maps {', '.join(maps)}"


def spread(values: Sequence[float], digits: int) -> str:
    """`mean +- standard deviation`, the mean alone for one seed, `-` for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
