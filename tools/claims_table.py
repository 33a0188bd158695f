"""The numbers of tools/claims.py: from tables of `evaluate` to a CSV file, means, spread, and one sentence per claim.

The rule for a sentence, over the seeds' paired differences (positive where the claim is right): it holds if all are
positive and Student's t says that their mean is above zero (one-sided, 5 %); it does not hold at this size if none is
positive and Student's t says that their mean is below zero, or if all are exactly zero; otherwise, or with fewer than
three seeds, it is not decided. What has no numbers reads "not measured". A claim of several comparisons has the weakest
of their verdicts, so that it holds if all of them hold; those marked "also" do not count.
"""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from claims_comparisons import COMPARISONS, DECIDES, Comparison
from claims_names import CLAIMS, DOMAINS, SCALES, SPOKEN
from claims_tasks import Plan, Task, Variant, scaled
from scipy.special import stdtrit  # type: ignore[import-untyped]

from dreamdance.evaluation.scores import METRICS
from dreamdance.evaluation.table import RESULT_ROW
from dreamdance.runs.files import write_atomically

HIGHER_IS_BETTER = {metric.key: metric.higher_is_better for metric in METRICS}
DIGITS = {metric.key: metric.digits for metric in METRICS}
LEAST_SEEDS, LEVEL = 3, 0.05


@dataclass(frozen=True)
class Row:
    """A line of the CSV file.

    Attributes:
        claim: its letter, or `demo`.
        variant: what was compared.
        seed: of training and sampling.
        metric: a key of `table.json`.
        value: the mean over the clips.
        clips: how many.
        steps: optimizer steps of the trainings that decide the metric, one after the other: of stage 1 for the maps
            that stage 2 was given.
        commit: the checkout's when the evaluation began, with `-dirty` if files differed from it; the trainings and
            clips that it shows may be of earlier commits, which `done/*.json` in the output folder name.
        date: of the evaluation.
    """

    claim: str
    variant: str
    seed: int
    metric: str
    value: float
    clips: int
    steps: str
    commit: str
    date: str


@dataclass(frozen=True)
class Measured:
    """What one variant scored in a finished evaluation.

    Attributes:
        claim, seed, variant: of the plan.
        scores: clip -> metric -> value, for the clips that count.
        commit, date: of the evaluation.
    """

    claim: str
    seed: int
    variant: Variant
    scores: Mapping[str, Mapping[str, float]]
    commit: str
    date: str


def read_tables(plan: Plan, is_done: Callable[[Task], bool]) -> Iterator[Measured]:
    """The rows of the plan's finished evaluations.

    Args:
        plan: what is measured.
        is_done: whether a task's note fits the plan (`Runner.is_done`): tables of other settings are left out.
    """
    for (claim, seed), variants in plan.variants.items():
        for variant in variants:
            stamp, table = (
                plan.settings.out / name for name in (f"done/{variant.evaluation}.json", table_path(variant))
            )
            if not is_done(plan.tasks[variant.evaluation]) or not table.is_file():
                continue
            done, content = (json.loads(path.read_text(encoding="utf-8")) for path in (stamp, table))
            name, clips = variant.row or getattr(best_scales(content), variant.name), sorted(content["clips"])
            if variant.is_last_half:
                clips = last_half(clips)
            scores = {clip: content["clips"][clip].get(name, {}) for clip in clips}
            yield Measured(claim, seed, variant, scores, done["commit"], done["date"])


def collect(plan: Plan, is_done: Callable[[Task], bool]) -> list[Row]:
    """All numbers that the plan's finished evaluations have; see `read_tables`."""
    rows = []
    for one in read_tables(plan, is_done):
        for metric in one.variant.metrics:
            values = [scores[metric] for scores in one.scores.values() if metric in scores]
            if values:
                about = (len(one.scores), one.variant.steps_of(metric), one.commit, one.date)
                rows.append(Row(one.claim, one.variant.name, one.seed, metric, statistics.fmean(values), *about))
    return rows


def table_path(variant: Variant) -> str:
    return f"runs/{variant.evaluation}/table.json"


def last_half(clips: Sequence[str]) -> list[str]:
    """The clips that do not choose the guidance scales."""
    return list(clips[len(clips) // 2 :])


def mean_of(table: Mapping[str, Any], row: str, metric: str, clips: Sequence[str]) -> float | None:
    """A row's mean over some clips of `table.json`; None if no clip has the metric."""
    found = [scores[row][metric] for clip in clips if metric in (scores := table["clips"][clip]).get(row, {})]
    return statistics.fmean(found) if found else None


@dataclass(frozen=True)
class BestScales:
    """The guidance scales that the first half of the clips chooses.

    Attributes:
        own: each domain's own: the one of its least error while the others are not guided.
        one_best_for_normals: the row of the one scale for all domains with the least error of normals.
        one_best_on_average: the row of the one with the least mean over the domains of their errors, relative to no
            guidance.
    """

    own: dict[str, float]
    one_best_for_normals: str
    one_best_on_average: str


def best_scales(table: Mapping[str, Any]) -> BestScales:
    """Chooses the scales from the table of the sweep."""
    clips = sorted(table["clips"])
    clips = clips[: len(clips) // 2] or clips

    def error(row: str, metric: str) -> float:
        value = mean_of(table, row, metric, clips)
        return float("inf") if value is None else value

    unguided = RESULT_ROW
    rows = {scale: scaled("one", scale) for scale in SCALES}
    rows[0.0] = unguided

    def own_error(domain: str, scale: float) -> float:
        return error(scaled(domain, scale) if scale else unguided, DOMAINS[domain])

    own = {domain: min(SCALES, key=partial(own_error, domain)) for domain in DOMAINS}

    def mean_error(row: str) -> float:
        return statistics.fmean(error(row, metric) / error(unguided, metric) for metric in DOMAINS.values())

    for_normals = min(rows.values(), key=lambda row: error(row, DOMAINS["normal"]))
    return BestScales(own, for_normals, min(rows.values(), key=mean_error))


def merge(path: Path, new: Iterable[Row]) -> list[Row]:
    """Replaces the CSV file by one with new rows in place of those of the same claim, variant, seed and metric."""
    merged = {(row.claim, row.variant, row.seed, row.metric): row for row in [*read(path), *new]}
    rows = sorted(merged.values(), key=lambda row: CLAIMS.index(row.claim))  # stable: otherwise in the order of work
    path.parent.mkdir(parents=True, exist_ok=True)
    text = StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "value": f"{row.value:.6g}"} for row in rows)
    write_atomically(path, text.getvalue())
    return rows


def read(path: Path) -> list[Row]:
    """The rows of the CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = [*csv.DictReader(file)]
    kinds = {"seed": int, "value": float, "clips": int}
    return [Row(**{name: kinds.get(name, str)(value) for name, value in line.items()}) for line in lines]


def values_of(rows: Iterable[Row], claim: str, variant: str, metric: str) -> dict[int, float]:
    """Seed -> value."""
    return {row.seed: row.value for row in rows if (row.claim, row.variant, row.metric) == (claim, variant, metric)}


@dataclass(frozen=True)
class Pairs:
    """The rows of a comparison, paired by seed.

    Attributes:
        values: seed -> the value of `own` and that of `other`.
        refused: seed -> why its two rows must not be compared.
    """

    values: dict[int, tuple[float, float]]
    refused: dict[int, str]


def pair(rows: Sequence[Row], comparison: Comparison) -> Pairs:
    """The seeds that have both rows; a pair of other clips, steps or commits is refused."""

    def by_seed(variant: str) -> dict[int, Row]:
        wanted = (comparison.claim, variant, comparison.metric)
        return {row.seed: row for row in rows if (row.claim, row.variant, row.metric) == wanted}

    own, other = by_seed(comparison.own), by_seed(comparison.other)
    pairs = Pairs({}, {})
    for seed in sorted(own.keys() & other.keys()):
        one, two = own[seed], other[seed]
        fits = {name: getattr(one, name) == getattr(two, name) for name in ("clips", "steps", "commit")}
        if comparison.goes_on:
            fits["steps"] = one.steps.startswith(f"{two.steps}+")
        reasons = [f"{name} {getattr(one, name)} and {getattr(two, name)}" for name, fit in fits.items() if not fit]
        if reasons:
            pairs.refused[seed] = f"its rows have {'; '.join(reasons)}"
        else:
            pairs.values[seed] = one.value, two.value
    return pairs


def gains(rows: Sequence[Row], comparison: Comparison) -> dict[int, float]:
    """Seed -> difference, positive where the claim is right, for the seeds whose rows may be compared."""
    sign = 1 if HIGHER_IS_BETTER[comparison.metric] else -1
    return {seed: sign * (own - other) for seed, (own, other) in pair(rows, comparison).values.items()}


def verdict(differences: Sequence[float]) -> str:
    """By the rule at the head of this file."""
    if not differences:
        return "not measured"
    if len(differences) < LEAST_SEEDS:
        return "not decided"
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    quantile = float(stdtrit(len(differences) - 1, 1 - LEVEL))  # of Student's t
    if min(differences) > 0 and mean > quantile * error:
        return "holds"
    if max(differences) <= 0 and (-mean > quantile * error or not any(differences)):
        return "does not hold at this size"
    return "not decided"


# From the weakest. One comparison that does not hold refutes a claim, whatever the others are; short of that, what was
# never measured says less than what the seeds left open.
VERDICTS = ("does not hold at this size", "not measured", "not decided", "holds")


def overall(rows: Sequence[Row], claim: str) -> str:
    """The verdict on a claim, that of its weakest comparison, and which of its comparisons decide."""
    compared = [comparison for comparison in COMPARISONS if comparison.claim == claim and not comparison.is_extra]
    found = [verdict([*gains(rows, comparison).values()]) for comparison in compared]
    weakest = min(found, key=VERDICTS.index)
    count = f" ({found.count('holds')} of {len(found)} comparisons hold)" if len(found) > 1 else ""
    return f"**Claim ({claim}): {weakest}**{count}; {DECIDES[claim]}."


def sentence(rows: Sequence[Row], comparison: Comparison) -> str:
    """One comparison in words."""
    found, pairs = gains(rows, comparison), pair(rows, comparison)
    start = f"{comparison.says[0].upper()}{comparison.says[1:]}: {verdict([*found.values()])}"
    refused = "".join(f" Seed {seed} is left out: {reason}." for seed, reason in pairs.refused.items())
    if not found:
        return f"{start}.{refused}"
    digits, mean = DIGITS[comparison.metric] + 1, statistics.fmean(found.values())
    own, base = (statistics.fmean(values) for values in zip(*pairs.values.values(), strict=True))
    share = f", {100 * mean / abs(base):+.1f} %" if base else ""
    numbers = f"{own:.{digits}f} against {base:.{digits}f}"
    seeds = " ".join(f"{gain:+.{digits}f}" for gain in found.values())
    right = sum(gain > 0 for gain in found.values())
    return (
        f"{start}. {comparison.metric} {numbers}; gain {mean:+.{digits}f}{share}, by seed {seeds}, "
        f"right in {right} of {len(found)}.{refused}{_beside(rows, comparison, pairs)}"
    )


def _beside(rows: Sequence[Row], comparison: Comparison, pairs: Pairs) -> str:
    """Where the better of both stands beside the truth and the trivial answers of its own tables, from the best on.

    A comparison says which of two is better, and not whether any of them is good.
    """
    if not comparison.beside:
        return ""
    metric, digits = comparison.metric, DIGITS[comparison.metric] + 1
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    means = [statistics.fmean(values) for values in zip(*pairs.values.values(), strict=True)]
    value, name = max(zip(means, (comparison.own, comparison.other), strict=True), key=lambda one: sign * one[0])
    work = {row.seed: (row.clips, row.commit) for row in rows
            if (row.claim, row.variant, row.metric) == (comparison.claim, comparison.own, metric)}  # fmt: skip
    found = dict[str, float]()
    for variant in comparison.beside:
        values = {row.seed: row.value for row in rows
                  if (row.claim, row.variant, row.metric) == (comparison.claim, variant, metric)
                  and (row.clips, row.commit) == work.get(row.seed)}  # fmt: skip
        if pairs.values.keys() <= values.keys():
            found[variant] = statistics.fmean(values[seed] for seed in pairs.values)
    places = []
    for variant in sorted(found, key=lambda one: -sign * found[one]):
        other = found[variant]
        order = comparison.order[0 if sign * value > sign * other else 1]
        share = f", {100 * (value / other - 1):+.1f} %" if other else ""
        places.append(f"{order} {SPOKEN[variant]} ({other:.{digits}f}{share})")
    places += [f"{SPOKEN[variant]}: not measured" for variant in comparison.beside if variant not in found]
    return f" The better of both, {name} with {value:.{digits}f}, {'; '.join(places)}."
