"""The numbers of tools/claims.py: from tables of `evaluate` to a CSV file, means, spread, and one sentence per claim.

The rule for a sentence, over the seeds' paired differences (positive where the claim is right): it holds if all are
positive and their mean is more than two standard errors above zero; it does not hold at this size if their mean is zero
or negative; otherwise, or with one seed, it is not decided. What has no numbers reads "not measured". A claim of
several comparisons holds if all of them hold; those marked "also" do not count.
"""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from claims_plan import CLAIMS, DOMAINS, MAP_ERRORS, SCALES, scaled
from claims_tasks import Plan, Variant

from dreamdance.evaluation.scores import METRICS

HIGHER_IS_BETTER = {metric.key: metric.higher_is_better for metric in METRICS}
DIGITS = {metric.key: metric.digits for metric in METRICS}
TITLES = {
    "c": "(c) pose, depth and normal, and each one left out (Table 3a)",
    "a": "(a) geometry attention: agreement of normals and depth (Fig. 8)",
    "b": "(b) multi-domain guidance (Eq. 6)",
    "d": "(d) the controller's geometry attention (Table 3b)",
    "f": "(f) temporal attention",
    "e": "(e) robust conditioning, by the maps' error",
    "g": "(g) reference first, training on stage 1's maps, fitted bones",
}
# What a table shows beside the metric of its comparisons.
SHOWN = {
    **dict.fromkeys("cdeg", ("l1_body", "psnr_body", "ssim_body", "l1", "lpips_alex")),
    **dict.fromkeys("ab", ("consistency_angle", "angular_error_mean", "abs_rel", "l1")),
    "f": ("flicker", "angular_error_mean", "abs_rel"),
}


@dataclass(frozen=True)
class Comparison:
    """A claim in numbers: `own` is better than `other` in `metric`. `says` completes the sentence."""

    claim: str
    own: str
    other: str
    metric: str
    says: str
    is_extra: bool = False


COMPARISONS = (
    *(
        Comparison("c", f"all_three{ending}", f"no_{left_out}{ending}", "l1_body",
                   f"stage 2 with pose, depth and normal beats stage 2 without {left_out}, on {maps}", bool(ending))
        for ending, maps in (("", "true maps"), ("_made", "stage 1's maps"))
        for left_out in ("pose", "depth", "normal")
    ),
    Comparison("a", "with_geometry", "without_geometry", "consistency_angle",
               "geometry attention brings normals and depth into agreement"),
    Comparison("a", "with_geometry", "without_geometry", "angular_error_mean",
               "geometry attention lowers the normals' error", True),
    Comparison("b", "own_scales", "best_one_scale", "angular_error_mean",
               "a guidance scale for each domain lowers the normals' error against the best one for all"),
    *(
        Comparison("b", "own_scales", "best_one_scale", metric,
                   f"a guidance scale for each domain lowers the {domain} error against the best one for all", True)
        for domain, metric in DOMAINS.items() if domain != "normal"
    ),
    *(
        Comparison("d", f"attention{ending}", f"sum{ending}", "l1_body",
                   f"the controller's geometry attention beats a sum of the maps' features, on {maps}", bool(ending))
        for ending, maps in (("", "true maps"), ("_made", "stage 1's maps"))
    ),
    Comparison("f", "with_temporal", "without_temporal", "flicker", "temporal attention lowers the flicker of stage 1"),
    *(
        Comparison("e", f"robust{ending}", f"plain{ending}", "l1_body",
                   f"robust conditioning helps with maps of {error:g} times stage 1's error", error != 1.0)
        for ending, error in MAP_ERRORS.items()
    ),
    Comparison("g", "reference_first", "as_demo", "l1_body", "the reference among the frames helps, on true maps"),
    Comparison("g", "trained_on_made_made", "as_demo_made", "l1_body",
               "training on stage 1's maps helps on stage 1's maps"),
    Comparison("g", "align_bones", "align_none", "l1_body",
               "fitting the driving bones to the reference's body helps when another person drives"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the CSV file."""

    claim: str
    variant: str
    seed: int
    metric: str
    value: float
    clips: int
    steps: str
    commit: str
    date: str


def collect(plan: Plan) -> list[Row]:
    """All numbers that the plan's finished evaluations have."""
    rows = []
    for (claim, seed), variants in plan.variants.items():
        for variant in variants:
            stamp, table = (
                plan.settings.out / name for name in (f"done/{variant.evaluation}.json", table_path(variant))
            )
            if not stamp.is_file() or not table.is_file():
                continue
            done, content = (json.loads(path.read_text(encoding="utf-8")) for path in (stamp, table))
            name, clips = variant.row, sorted(content["clips"])
            if variant.is_last_half:
                name, clips = name or best_scales(content)[1], last_half(clips)
            for metric in variant.metrics:
                value = mean_of(content, name, metric, clips)
                if value is not None:
                    about = (len(clips), variant.steps, done["commit"], done["date"])
                    rows.append(Row(claim, variant.name, seed, metric, value, *about))
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


def best_scales(table: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Each domain's own best guidance scale, and the row of the best scale for all, by the first half of the clips.

    A domain's own scale has its least error while the others are not guided; the one for all has the least mean over
    the domains of their errors, relative to no guidance.
    """
    clips = sorted(table["clips"])
    clips = clips[: len(clips) // 2] or clips

    def error(row: str, metric: str) -> float:
        value = mean_of(table, row, metric, clips)
        return float("inf") if value is None else value

    unguided = "this run"
    rows = {scale: scaled("one", scale) for scale in SCALES}
    rows[0.0] = unguided

    def own_error(domain: str, scale: float) -> float:
        return error(scaled(domain, scale) if scale else unguided, DOMAINS[domain])

    own = {domain: min(SCALES, key=partial(own_error, domain)) for domain in DOMAINS}
    relative = {
        scale: statistics.fmean(error(row, metric) / error(unguided, metric) for metric in DOMAINS.values())
        for scale, row in rows.items()
    }
    return own, rows[min(relative, key=lambda scale: relative[scale])]


def merge(path: Path, new: Iterable[Row]) -> list[Row]:
    """Rewrites the CSV file with new rows in place of those of the same claim, variant, seed and metric."""
    merged = {(row.claim, row.variant, row.seed, row.metric): row for row in [*read(path), *new]}
    rows = sorted(merged.values(), key=lambda row: CLAIMS.index(row.claim))  # stable: otherwise in the order of work
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), "value": f"{row.value:.6g}"} for row in rows)
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


def gains(rows: Sequence[Row], comparison: Comparison) -> dict[int, float]:
    """Seed -> difference, positive where the claim is right, for the seeds that have both."""
    own = values_of(rows, comparison.claim, comparison.own, comparison.metric)
    other = values_of(rows, comparison.claim, comparison.other, comparison.metric)
    sign = 1 if HIGHER_IS_BETTER[comparison.metric] else -1
    return {seed: sign * (own[seed] - other[seed]) for seed in sorted(own.keys() & other.keys())}


def verdict(differences: Sequence[float]) -> str:
    """By the rule at the head of this file."""
    if not differences:
        return "not measured"
    if len(differences) < 2:
        return "not decided"
    mean = statistics.fmean(differences)
    if mean <= 0:
        return "does not hold at this size"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return "holds" if min(differences) > 0 and mean > 2 * error else "not decided"


def overall(rows: Sequence[Row], claim: str) -> str:
    """The verdict on a claim: that of its comparisons if they agree; the weakest of them otherwise."""
    compared = [comparison for comparison in COMPARISONS if comparison.claim == claim and not comparison.is_extra]
    found = [verdict([*gains(rows, comparison).values()]) for comparison in compared]
    weakest = min(found, key=("does not hold at this size", "not measured", "not decided", "holds").index)
    count = f" ({found.count('holds')} of {len(found)} comparisons hold)" if len(found) > 1 else ""
    return f"**Claim ({claim}): {weakest}**{count}"


def sentence(rows: Sequence[Row], comparison: Comparison) -> str:
    """One comparison in words."""
    found = gains(rows, comparison)
    start = f"{comparison.says[0].upper()}{comparison.says[1:]}: {verdict([*found.values()])}"
    if not found:
        return f"{start}."
    own, other = (
        values_of(rows, comparison.claim, variant, comparison.metric) for variant in (comparison.own, comparison.other)
    )
    digits, mean = DIGITS[comparison.metric] + 1, statistics.fmean(found.values())
    base = statistics.fmean(other[seed] for seed in found)
    share = f", {100 * mean / abs(base):+.1f} %" if base else ""
    numbers = f"{statistics.fmean(own[seed] for seed in found):.{digits}f} against {base:.{digits}f}"
    seeds = " ".join(f"{gain:+.{digits}f}" for gain in found.values())
    right = sum(gain > 0 for gain in found.values())
    return (
        f"{start}. {comparison.metric} {numbers}; gain {mean:+.{digits}f}{share}, by seed {seeds}, "
        f"right in {right} of {len(found)}."
    )


def markdown(rows: Sequence[Row], claims: Sequence[str]) -> str:
    """A table and the sentences for each claim."""
    parts = []
    for claim in (name for name in CLAIMS if name in claims):
        variants = list(dict.fromkeys(row.variant for row in rows if row.claim == claim))
        compared = [comparison for comparison in COMPARISONS if comparison.claim == claim]
        lines = [f"- {'also: ' if comparison.is_extra else ''}{sentence(rows, comparison)}" for comparison in compared]
        table = _table(rows, claim, variants) if variants else ""
        parts.append(
            "\n\n".join(part for part in (f"## {TITLES[claim]}", table, overall(rows, claim), "\n".join(lines)) if part)
        )
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], claim: str, variants: Sequence[str]) -> str:
    """Mean and standard deviation over seeds; beside each the number of clips and steps."""
    metrics = [name for name in SHOWN[claim] if any(row.claim == claim and row.metric == name for row in rows)]
    arrows = [f"{name} {'↑' if HIGHER_IS_BETTER[name] else '↓'}" for name in metrics]
    lines = [["variant", *arrows, "seeds", "clips", "steps"]]
    for variant in variants:
        own = [row for row in rows if row.claim == claim and row.variant == variant]
        cells = [spread([*values_of(own, claim, variant, name).values()], DIGITS[name]) for name in metrics]
        clips, steps = (", ".join(sorted({str(getattr(row, name)) for row in own})) for name in ("clips", "steps"))
        lines.append([variant, *cells, str(len({row.seed for row in own})), clips, steps])
    lines.insert(1, ["---", *["--:"] * len(metrics), "--:", "--:", "---"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """`mean +- standard deviation`, the mean alone for one seed, `-` for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
