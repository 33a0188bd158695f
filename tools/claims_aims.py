"""The demo's aims in numbers, and which of them the rows of tools/claims.py reach.

An aim is judged by the mean over at least three seeds, of equal steps, on at least twelve held-out clips; otherwise it
reads "not measured", as it does where it would be reached but a trivial answer was not measured. That more denoising
steps never make the frames worse is judged by the worst seed.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from claims_costs import demo_animation, demo_steps, denoising_steps
from claims_names import FACTORS, trivial_with
from claims_table import DIGITS, HIGHER_IS_BETTER, LEAST_SEEDS, Row, values_of

CLIPS = 12
REFERENCE = ("reference_repeated",)
MADE, TRUE = "maps_made", "maps_true"
DEMO = f"{MADE}_{demo_steps()}"


@dataclass(frozen=True)
class Aim:
    """What a row of the demo's table should reach.

    Attributes:
        says: the aim, at the head of its sentence.
        metric: a metric of the CSV file.
        needed: with `against` the share by which the row must be better, where 0 means better at all; otherwise the
            least value, or the most where less is better.
        against: trivial answers that have the metric, of which the best counts; none for the value itself.
        row: a variant.
    """

    says: str
    metric: str
    needed: float
    against: tuple[str, ...] = ()
    row: str = DEMO


@dataclass(frozen=True)
class StepsAim:
    """More denoising steps never make a metric worse.

    Attributes:
        maps: the variants' name without their number of steps.
        metric: a key of `table.json`.
        says: which maps these are.
    """

    maps: str
    metric: str
    says: str

    @property
    def tolerance(self) -> float:
        """What is not called worse: a difference of one in the last digit of the table."""
        return float(f"1e-{DIGITS[self.metric]}")


_NORMALS, _DEPTH, _BODY = ("angular_error_mean", "abs_rel", "l1_body")
AIMS = (
    Aim("Normals' mean angle at least 40 % below the best trivial answer's", _NORMALS, 0.40, trivial_with(_NORMALS)),
    Aim("Depth's AbsRel at least 55 % below the best trivial answer's", _DEPTH, 0.55, trivial_with(_DEPTH)),
    Aim("Whole frames' L1 below the repeated reference's", "l1", 0.0, REFERENCE),
    Aim("L1 inside the body at least 25 % below the best trivial answer's", _BODY, 0.25, trivial_with(_BODY)),
    Aim("PSNR inside the body at least 19 dB", "psnr_body", 19.0),
    Aim("LPIPS below the repeated reference's", "lpips_alex", 0.0, REFERENCE),
    Aim(
        "No grain: the background's detail within 20 % of the truth's, by each clip's own distance",
        "grain_distance",
        0.20,
    ),
)
STEPS_AIMS = tuple(
    StepsAim(maps, metric, says)
    for maps, says in ((MADE, "stage 1's maps"), (TRUE, "true maps"))
    for metric in ("l1", "l1_body", "lpips_alex")
)


@dataclass(frozen=True)
class Judged:
    """One aim: what it is, whether it is reached, the numbers that say so, and how people differ in them."""

    says: str
    verdict: str
    numbers: str = ""
    people: str = ""

    @property
    def sentence(self) -> str:
        numbers = "; ".join(part for part in (self.numbers, self.people) if part)
        return f"{self.says}: {self.verdict}.{f' {numbers}.' if numbers else ''}"


# Below the aims, where their sentences say how people differ.
PEOPLE_RULE = (
    "Over people: a person is one clip and counts with the mean over the seeds, paired with the same clip of the same "
    "trivial answer. It decides no aim. An aim that is reached by less than about two standard errors over people may "
    "be missed on others."
)


def aims_text(rows: Sequence[Row], people: Mapping[str, str]) -> str:
    """How many aims are reached, then a sentence for each.

    Args:
        rows: of the CSV file.
        people: an aim's text -> its spread over people (tools/claims_people.py).
    """
    judged = [judge(rows, aim) for aim in AIMS]
    judged = [replace(one, people=people.get(one.says, "")) for one in judged]
    judged += [judge_steps(rows, aim) for aim in STEPS_AIMS]
    reached = sum(one.verdict == "reached" for one in judged)
    recipe = demo_animation()
    head = (
        f"**{reached} of {len(judged)} aims are reached** at {recipe.width}x{recipe.height}. The demo's own row is "
        f"{DEMO}: with the maps of its stage 1, in {demo_steps()} denoising steps."
    )
    return "\n\n".join([head, "\n".join(f"- {one.sentence}" for one in judged), *[PEOPLE_RULE] * bool(people)])


def curve_text(rows: Sequence[Row]) -> str:
    """A sentence for each aim: its metric after more steps of all trainings, and the value that it takes."""
    times = ", ".join(f"{factor}" for factor in FACTORS)
    seeds = len({row.seed for row in rows if row.claim == "curve"})
    lines = [
        f"Each training of the demo has {times} times its steps; {seeds} seed{'' if seeds == 1 else 's'}, so that "
        "differences as small as those between the demo's seeds mean nothing.",
        "",
    ]
    for aim in AIMS:
        found = partial(values_of, rows, "curve", metric=aim.metric)
        values = [[*found(variant=f"{MADE}_x{factor}").values()] for factor in FACTORS]
        shown = ", ".join(f"{_mean(of_factor):.{DIGITS[aim.metric]}f}" if of_factor else "not measured"
                          for of_factor in values)  # fmt: skip
        rivals = [_mean([*of_answer.values()]) for name in aim.against if (of_answer := found(variant=name))]
        lines.append(f"- {aim.says}: {aim.metric} {shown} after {times} times the steps{_aimed_at(aim, rivals)}.")
    return "\n".join(lines)


def _aimed_at(aim: Aim, rivals: Sequence[float]) -> str:
    """The value that an aim takes, in words; empty if its trivial answers are not measured."""
    digits, is_higher = DIGITS[aim.metric], HIGHER_IS_BETTER[aim.metric]
    if not aim.against:
        return f"; the aim is {aim.needed:.{digits}f}"
    if not rivals:
        return ""
    value = max(rivals) * (1 + aim.needed) if is_higher else min(rivals) * (1 - aim.needed)
    return f"; the aim is {value:.{digits}f}"


def judge(rows: Sequence[Row], aim: Aim) -> Judged:
    """One aim, by the mean over the seeds."""
    own, digits = _by_seed(rows, aim.row, aim.metric), DIGITS[aim.metric]
    if not aim.against:
        values = [row.value for row in own.values()]
        is_reached = _mean(values) >= aim.needed if HIGHER_IS_BETTER[aim.metric] else _mean(values) <= aim.needed
        text = f"{aim.metric} {_mean(values):.{digits}f}, by seed {_listed(values, f'.{digits}f')}" if own else ""
        return Judged(aim.says, _verdict(own, is_reached), text)
    best = best_rivals(rows, aim)
    own = {seed: own[seed] for seed in best}
    sign = 1 if HIGHER_IS_BETTER[aim.metric] else -1
    gains = [100 * sign * (own[seed].value / rival.value - 1) for seed, rival in best.items()]
    is_reached = _mean(gains) >= 100 * aim.needed if aim.needed else _mean(gains) > 0
    mean, rival = (_mean([row.value for row in found.values()]) for found in (own, best))
    rivals = {name: _by_seed(rows, name, aim.metric) for name in aim.against}
    absent = [name for name, found in rivals.items()
              if not all(_is_same_work(found.get(seed), row) for seed, row in own.items())]  # fmt: skip
    named = f"{', '.join(dict.fromkeys(row.variant for row in best.values()))}"
    named += f"; {', '.join(absent)} not measured" if absent else ""
    verdict = _verdict(own, is_reached)
    if absent and verdict == "reached":  # the answer that is absent could be the best; a failure stays one
        verdict = f"not measured (without {', '.join(absent)})"
    text = (
        f"{aim.metric} {mean:.{digits}f} against {rival:.{digits}f} ({named}); {abs(_mean(gains)):.1f} % "
        f"{'better' if _mean(gains) >= 0 else 'worse'}, by seed {_listed(gains, '+.1f')}"
    )
    return Judged(aim.says, verdict, text if own else "")


def judge_steps(rows: Sequence[Row], aim: StepsAim) -> Judged:
    """Each number of steps against each smaller one, by the worst seed of those that have all of them."""
    says = f"More denoising steps never make {aim.metric} worse, on {aim.says}"
    steps, digits, sign = denoising_steps(), DIGITS[aim.metric], -1 if HIGHER_IS_BETTER[aim.metric] else 1
    found = [_by_seed(rows, f"{aim.maps}_{number}", aim.metric) for number in steps]
    own = {seed: row for seed, row in found[0].items() if all(_is_same_work(one.get(seed), row) for one in found)}
    if not own:
        return Judged(says, _verdict(own, False))
    values = {number: [one[seed].value for seed in own] for number, one in zip(steps, found, strict=True)}
    means = [f"{_mean(of_steps):.{digits}f} at {number}" for number, of_steps in values.items()]
    worse = {
        f"{more} against {fewer}": [sign * (b - a) for a, b in zip(values[fewer], values[more], strict=True)]
        for fewer, more in combinations(steps, 2)
    }
    changes = "; ".join(f"{pair} {_listed(found, f'+.{digits + 1}f')}" for pair, found in worse.items())
    is_reached = max(change for found in worse.values() for change in found) <= aim.tolerance
    text = f"{aim.metric} {', '.join(means)} steps; by seed, {changes} (worse above {aim.tolerance:g})"
    return Judged(says, _verdict(own, is_reached), text)


def _by_seed(rows: Sequence[Row], variant: str, metric: str) -> dict[int, Row]:
    return {row.seed: row for row in rows if (row.claim, row.variant, row.metric) == ("demo", variant, metric)}


def _is_same_work(one: Row | None, other: Row) -> bool:
    """Whether two rows may be compared: they have the same clips and commit."""
    return one is not None and (one.clips, one.commit) == (other.clips, other.commit)


def best_rivals(rows: Sequence[Row], aim: Aim) -> dict[int, Row]:
    """Seed -> the best of the trivial answers, where one was measured beside the demo's row."""
    found = dict[int, Row]()
    choose = max if HIGHER_IS_BETTER[aim.metric] else min
    for seed, own in _by_seed(rows, aim.row, aim.metric).items():
        answers = [_by_seed(rows, variant, aim.metric).get(seed) for variant in aim.against]
        rivals = [row for row in answers if row is not None and _is_same_work(row, own)]
        if rivals:
            found[seed] = choose(rivals, key=lambda row: row.value)
    return found


def _verdict(own: Mapping[int, Row], is_reached: bool) -> str:
    """The rule at the head of this file; `own` are the demo's rows by seed."""
    if not own:
        return "not measured"
    if len({(row.clips, row.steps) for row in own.values()}) > 1:
        return "not measured (its seeds differ in clips or steps of training)"
    clips = min(row.clips for row in own.values())
    if len(own) < LEAST_SEEDS or clips < CLIPS:
        return f"not measured ({len(own)} of {LEAST_SEEDS} seeds, {clips} of {CLIPS} clips)"
    return "reached" if is_reached else "not reached"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def _listed(values: Sequence[float], form: str) -> str:
    return " ".join(f"{value:{form}}" for value in values)
