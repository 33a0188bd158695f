"""How the demo's aims stand person by person, from the clips' own scores in the tables of finished evaluations.

All seeds judge the same people, so that the spread over seeds says nothing of other people. Each clip shows one person.
It is paired with the same clip of the trivial answer that the aim is judged against, and stands for the mean over the
seeds. None of this changes an aim's verdict, and the CSV file has none of it.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from claims_aims import AIMS, Aim, best_rivals
from claims_table import DIGITS, HIGHER_IS_BETTER, Measured, Row, read_tables
from claims_tasks import Plan, Task


def people_of_aims(plan: Plan, is_done: Callable[[Task], bool], rows: Sequence[Row]) -> dict[str, str]:
    """An aim's text -> its spread over people in words, for the aims whose tables are there.

    Args:
        plan: what is measured.
        is_done: whether a task is done (`Runner.is_done`).
        rows: of the CSV file, which decide the best trivial answer of each seed.
    """
    measured = [one for one in read_tables(plan, is_done) if one.claim == "demo"]
    return {aim.says: text for aim in AIMS if (text := people_text(measured, rows, aim))}


def people_text(measured: Iterable[Measured], rows: Sequence[Row], aim: Aim) -> str:
    """One aim's spread over people; empty without tables, or with fewer than two people.

    Args:
        measured: the demo's rows of each seed, clip by clip.
        rows: of the CSV file.
        aim: of the demo.
    """
    tables = {(one.seed, one.variant.name): one.scores for one in measured}
    rivals = best_rivals(rows, aim)
    own, other = list[Mapping[str, float]](), list[Mapping[str, float]]()
    for seed in sorted({seed for seed, variant in tables if variant == aim.row}):
        found = tables.get((seed, rivals[seed].variant)) if seed in rivals else None
        if found is not None or not aim.against:
            own.append(_values(tables[seed, aim.row], aim.metric))
            other.append(_values(found or {}, aim.metric))
    people = sorted(set.intersection(*(set(one) for one in (*own, *(other if aim.against else [])))) if own else ())
    if len(people) < 2:
        return ""
    sign, digits = 1 if HIGHER_IS_BETTER[aim.metric] else -1, DIGITS[aim.metric] + 1
    seeds = f"mean over {len(own)} seed{'' if len(own) == 1 else 's'}"
    if not aim.against:
        values = [statistics.fmean(of_seed[person] for of_seed in own) for person in people]
        right = sum(sign * value >= sign * aim.needed for value in values)
        return f"within the aim in {right} of {len(people)} people ({seeds}), {_error(values, digits)}"
    gains = [statistics.fmean(sign * (one[person] - two[person]) for one, two in zip(own, other, strict=True))
             for person in people]  # fmt: skip
    rival = statistics.fmean(two[person] for two in other for person in people)
    error = _error(gains, digits)
    share = f", {100 * _standard_error(gains) / abs(rival):.1f} % of the trivial answer's value" if rival else ""
    better = sum(gain > 0 for gain in gains)
    mean = f"mean gain {statistics.fmean(gains):+.{digits}f}"
    return f"better in {better} of {len(people)} people ({seeds}), {mean}, {error}{share}"


def _values(scores: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    """Clip -> value, of the clips that have the metric."""
    return {clip: found[metric] for clip, found in scores.items() if metric in found}


def _standard_error(values: Sequence[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


def _error(values: Sequence[float], digits: int) -> str:
    return f"standard error over people {_standard_error(values):.{digits}f}"
