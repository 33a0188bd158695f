"""The table of scores and of improvements over the best trivial answer, as JSON and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamdance.evaluation.frechet import min_windows
from dreamdance.evaluation.paired_differences import PAIR_HEADER, pair_lines, pairs_as_json
from dreamdance.evaluation.scores import (
    IMPROVEMENT_KEYS,
    METRICS,
    TABLES,
    Metric,
    Scores,
)

RESULT_ROW = "this run"
TRUTH_ROW = "truth itself"
NOT_MEASURED = "-"
MAX_NAMES = 10  # of clips, in a sentence
MAX_CLIPS_SHOWN = 12  # above this number, the Markdown has no table of single clips


@dataclass(frozen=True)
class Improvement:
    """One score of the result, and the same score of the best trivial answer.

    Attributes:
        value: the result's score.
        trivial: the best trivial answer's score.
        answer: name of that answer.
        relative: improvement over the best trivial answer as a fraction of its score; negative if the result is worse,
            NaN if that score is zero. The Markdown compares decibels by their difference instead.
    """

    value: float
    trivial: float
    answer: str
    relative: float


@dataclass(frozen=True)
class Table:
    """All scores of an evaluation.

    Attributes:
        rows: row name -> mean scores; the first row is the result's, those of `compared` follow.
        clips: clip id -> row name -> scores.
        protocol: how the scores were measured: title -> text or values.
        missing: ids of the clips that `animate` was asked for, and that have no result.
        compared: names of the rows of the recipe's further results.
        windows: number of windows of the distances between sets of videos.
    """

    rows: Mapping[str, Scores]
    clips: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
    compared: Sequence[str] = ()
    windows: Mapping[str, int] = field(default_factory=dict)

    def improvements(self) -> dict[str, Improvement]:
        """The result's improvement over the best trivial answer, for each of `IMPROVEMENT_KEYS`."""
        return compare_with_trivial(self.rows, self.compared)

    def as_json(self) -> dict[str, Any]:
        """JSON values; scores that could not be measured are absent."""
        improvements = {
            key: {
                "value": entry.value,
                "best_trivial": entry.trivial,
                "best_trivial_answer": entry.answer,
                **_without_nan({"relative_improvement": entry.relative}),
            }
            for key, entry in self.improvements().items()
        }
        return {
            "missing": list(self.missing),
            "protocol": dict(self.protocol),
            "windows": dict(self.windows),
            "rows": {name: _without_nan(scores) for name, scores in self.rows.items()},
            "improvements": improvements,
            "compared": {name: pairs_as_json(self.clips, RESULT_ROW, name) for name in self.compared},
            "clips": {
                clip: {name: _without_nan(scores) for name, scores in rows.items()} for clip, rows in self.clips.items()
            },
        }

    def as_markdown(self) -> str:
        """Missing clips, tables (geometry, frames inside the body, whole frames), improvements, clips, protocol."""
        parts = [describe_missing(self.missing, len(self.clips))] if self.missing else []
        for title, metrics in TABLES.items():
            shown = [metric for metric in metrics if any(metric.key in scores for scores in self.rows.values())]
            if shown:
                parts.append(f"## {title}\n\n{self._rows_as_markdown(shown)}")
        improvements = self.improvements()
        if improvements:
            parts.append(f"## Against the best trivial answer\n\n{_improvements_as_markdown(improvements)}")
        if pairs := [line for name in self.compared for line in pair_lines(self.clips, RESULT_ROW, name)]:
            parts.append(f"## Against the other results, clip by clip\n\n{_markdown(PAIR_HEADER, pairs)}")
        if 1 < len(self.clips) <= MAX_CLIPS_SHOWN:
            parts.append(f"## Clip by clip\n\n{self._clips_as_markdown()}")
        notes = "\n".join(f"* {name}: {_plain(value)}" for name, value in self.protocol.items())
        return "\n\n".join([*parts, f"## How it was measured\n\n{notes}"]) + "\n"

    def _rows_as_markdown(self, metrics: list[Metric]) -> str:
        lines = [[name, *(self._cell(scores, metric) for metric in metrics)] for name, scores in
                 self.rows.items() if any(metric.key in scores for metric in metrics)]  # fmt: skip
        return _markdown(["", *(_arrowed(metric) for metric in metrics)], lines)

    def _cell(self, scores: Scores, metric: Metric) -> str:
        least = min_windows(metric.key)
        is_few = metric.key in scores and self.windows.get(metric.key, least) < least
        return _formatted(scores.get(metric.key), metric) + " (too few)" * is_few

    def _clips_as_markdown(self) -> str:
        """L1 and PSNR of each clip and of its best trivial answer; inside the body if there are masks."""
        keys = ("l1_body", "psnr_body") if "l1_body" in self.rows[RESULT_ROW] else ("l1", "psnr")
        metrics = [metric for metric in METRICS if metric.key in keys]
        header, lines = [""], []
        for metric in metrics:
            header += [_arrowed(metric), "best trivial answer"]
        for clip, rows in self.clips.items():
            found, line = compare_with_trivial(rows, self.compared), [clip]
            for metric in metrics:
                entry = found.get(metric.key)
                line.append(_formatted(entry.value if entry else None, metric))
                line.append(f"{_formatted(entry.trivial, metric)} ({entry.answer})" if entry else NOT_MEASURED)
            lines.append(line)
        return _markdown(header, lines)


def describe_missing(missing: Sequence[str], num_clips: int) -> str:
    """One sentence for people: which clips a partial table lacks, and how to get the whole one."""
    return (
        f"This table is partial: {len(missing)} of {len(missing) + num_clips} clips have no result yet "
        f"({listed(missing)}); when animate has made them (if it does not run now, give its command again), the same "
        "evaluate command makes the whole table."
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = [f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*(f"'{name}'" for name in names[:MAX_NAMES]), *more])


def compare_with_trivial(rows: Mapping[str, Scores], compared: Sequence[str] = ()) -> dict[str, Improvement]:
    """Compares the result with the best trivial answer, for each of `IMPROVEMENT_KEYS`.

    Args:
        rows: row name -> scores of one clip, or means over clips.
        compared: the rows of further results, which are no trivial answers.
    """
    trivial = {name: scores for name, scores in rows.items() if name not in (RESULT_ROW, TRUTH_ROW, *compared)}
    metrics = {metric.key: metric for metric in METRICS}
    found = {}
    for key in IMPROVEMENT_KEYS:
        rivals = {name: scores[key] for name, scores in trivial.items() if key in scores}
        value = rows[RESULT_ROW].get(key)
        if value is None or not rivals:
            continue
        higher_is_better = metrics[key].higher_is_better
        answer = (max if higher_is_better else min)(rivals, key=lambda name: rivals[name])
        best = rivals[answer]
        gain = value - best if higher_is_better else best - value
        found[key] = Improvement(value, best, answer, gain / best if best else float("nan"))
    return found


def _improvements_as_markdown(improvements: Mapping[str, Improvement]) -> str:
    metrics = {metric.key: metric for metric in METRICS}
    lines = []
    for key, entry in improvements.items():
        metric = metrics[key]
        gain = abs(entry.value - entry.trivial) if "psnr" in key else abs(100 * entry.relative)
        difference = f"{gain:.{2 if 'psnr' in key else 1}f} {'dB' if 'psnr' in key else '%'}"
        direction = "better" if entry.relative >= 0 else "worse"
        shown = NOT_MEASURED if gain != gain else f"{difference} {direction}"
        numbers = [_formatted(number, metric) for number in (entry.value, entry.trivial)]
        lines.append([key, *numbers, entry.answer, shown])
    return _markdown(["", RESULT_ROW, "best trivial answer", "which", "difference"], lines)


def _markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text."""
    cells = [header, *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _arrowed(metric: Metric) -> str:
    return f"{metric.title} {metric.arrow}"


def _formatted(value: float | None, metric: Metric) -> str:
    if value is None or value != value:
        return NOT_MEASURED
    return f"{value:.{metric.digits}{'e' if metric.scientific else 'f'}}"


def _without_nan(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if value == value}


def _plain(value: Any) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
