"""The spread over people in `tools/claims.py`: which clips are paired, and its numbers, computed by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.tool_modules import load_tool

from dreamdance.evaluation.table import RESULT_ROW
from dreamdance.evaluation.trivial import REPEATED_REFERENCE

names, tasks, plans, tables, aims, people, texts = (
    load_tool(f"claims_{name}") for name in ("names", "tasks", "plan", "table", "aims", "people", "markdown")
)


def measured(variant: str, metric: str, by_seed: Mapping[int, Sequence[float]]) -> "list[tables.Measured]":
    """Seed -> a value for each clip; `demo` stands for the demo's own row."""
    name = aims.DEMO if variant == "demo" else variant
    row = tasks.Variant(name, "table", "row", "400", (metric,))
    return [tables.Measured("demo", seed, row, {f"clip_{number}": {metric: value} for number, value in
                            enumerate(values)}, "abc", "2026-11-30") for seed, values in by_seed.items()]  # fmt: skip


def text_of(metric: str, found: "Sequence[tables.Measured]") -> str:
    """What is said of an aim, with the means over the clips as the CSV file's rows."""
    (aim,) = (one for one in aims.AIMS if one.metric == metric)
    rows = []
    for one in found:
        values = [scores[metric] for scores in one.scores.values() if metric in scores]
        about = (len(one.scores), "400", one.commit, one.date)
        rows.append(tables.Row("demo", one.variant.name, one.seed, metric, sum(values) / len(values), *about))
    return people.people_text(found, rows, aim)


def test_a_person_counts_with_the_mean_over_the_seeds_beside_its_own_trivial_answer() -> None:
    # gains of the seeds' means: 0.05, -0.01 and 0.02; their mean is 0.02, their standard error 0.03 / sqrt(3)
    own = measured("demo", "l1", {0: (0.10, 0.30, 0.20), 1: (0.20, 0.32, 0.16)})
    repeated = measured("reference_repeated", "l1", {0: (0.20, 0.30, 0.20), 1: (0.20, 0.30, 0.20)})
    assert text_of("l1", own + repeated) == (
        "better in 2 of 3 people (mean over 2 seeds), mean gain +0.02000, standard error over people 0.01732, "
        "7.4 % of the trivial answer's value")  # fmt: skip
    assert text_of("l1", [*own[:1], *repeated]).startswith("better in 1 of 3 people (mean over 1 seed), mean gain +0.0")


def test_the_trivial_answer_is_the_one_that_the_aim_is_judged_against_in_each_seed() -> None:
    own = measured("demo", "l1_body", {0: (0.1, 0.2), 1: (0.1, 0.2)})
    rivals = [*measured("mean_colour", "l1_body", {0: (0.3, 0.1), 1: (0.9, 0.9)}),
              *measured("reference_repeated", "l1_body", {0: (0.8, 0.8), 1: (0.2, 0.2)})]  # fmt: skip
    # per person .2 and .1, -.1 and .0: means .15 and -.05
    said = text_of("l1_body", own + rivals)
    assert said.startswith("better in 1 of 2 people (mean over 2 seeds), mean gain +0.05000, ")


def test_an_aim_without_a_trivial_answer_counts_who_is_within_it() -> None:
    own = measured("demo", "grain_distance", {0: (0.1, 0.5, 0.3), 1: (0.1, 0.1, 0.3)})  # means .1, .3 and .3
    assert text_of("grain_distance", own) == (
        "within the aim in 1 of 3 people (mean over 2 seeds), standard error over people 0.0667")  # fmt: skip
    own = measured("demo", "psnr_body", {0: (19.0, 25.0, 18.0)})
    assert text_of("psnr_body", own).startswith("within the aim in 2 of 3 people (mean over 1 seed), ")


def test_one_person_and_tables_without_the_trivial_answer_say_nothing() -> None:
    own = measured("demo", "l1", {0: (0.1, 0.2)})
    assert text_of("l1", own) == ""
    assert text_of("l1", []) == ""
    one = [*measured("demo", "l1", {0: (0.1,)}), *measured("reference_repeated", "l1", {0: (0.2,)})]
    assert text_of("l1", one) == ""
    other = measured("reference_repeated", "l1", {0: (0.2, 0.3)})
    assert text_of("l1", [*own, *other]).startswith("better in 2 of 2 people")
    other[0].scores["clip_1"].clear()
    assert text_of("l1", [*own, *other]) == "", "one clip has both"


@pytest.fixture
def plan(tmp_path: Path) -> "tasks.Plan":
    """The demo with one finished table, whose two clips have L1 alone."""
    made = plans.make_plan(tasks.Settings(tmp_path), ["demo"], [0])
    note, table = tmp_path / "done/claims_demo_s0_evaluate.json", tmp_path / "runs/claims_demo_s0_evaluate/table.json"
    for path in (note, table):
        path.parent.mkdir(parents=True)
    note.write_text('{"commit": "abc", "date": "2026-11-30"}', encoding="utf-8")
    clips = {
        clip: {RESULT_ROW: {"l1": 0.1}, REPEATED_REFERENCE: {"l1": other}} for clip, other in (("a", 0.2), ("b", 0.05))
    }
    table.write_text(json.dumps({"clips": clips}), encoding="utf-8")
    return made


def test_the_aims_say_how_people_differ_and_keep_their_verdict(plan: "tasks.Plan") -> None:
    rows = tables.collect(plan, lambda task: True)
    found = people.people_of_aims(plan, lambda task: True, rows)
    assert [*found] == ["Whole frames' L1 below the repeated reference's"]
    text, without = (texts.markdown(rows, ["demo"], given) for given in (found, None))
    (line,) = (line for line in text.splitlines() if line.startswith("- Whole frames' L1"))
    (bare,) = (line for line in without.splitlines() if line.startswith("- Whole frames' L1"))
    assert line.startswith(bare.removesuffix("."))
    assert (
        "; better in 1 of 2 people (mean over 1 seed), mean gain +0.02500, standard error over people 0.07500" in line
    )
    assert text.index(line) < text.index("Over people: a person is one clip")
    assert "Over people" not in without
    assert people.people_of_aims(plan, lambda task: False, rows) == {}
