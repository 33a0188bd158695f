"""The demo's aims in `tools/claims.py`: what they are judged by, against values computed by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.tool_modules import load_tool

from dreamdance.evaluation.table import RESULT_ROW, compare_with_trivial

names, tasks, costs, plans, tables, aims = (
    load_tool(f"claims_{name}") for name in ("names", "tasks", "costs", "plan", "table", "aims")
)


@pytest.fixture(scope="module")
def plan() -> "tasks.Plan":
    """The demo's part and that of claim c; tests do not change it."""
    return plans.make_plan(tasks.Settings(Path("runs/claims")), ["demo", "c"], (0,))


def rows_of(metric: str, values: Mapping[str, Sequence[float]], clips: int = 12) -> "list[tables.Row]":
    """Variant -> a value for each seed."""
    return [tables.Row("demo", variant, seed, metric, value, clips, "400", "abc", "2026-11-30")
            for variant, found in values.items() for seed, value in enumerate(found)]  # fmt: skip


def aim_of(metric: str) -> "aims.Aim":
    (found,) = (one for one in aims.AIMS if one.metric == metric)
    return found


def judge(metric: str, values: Mapping[str, Sequence[float]], clips: int = 12) -> "aims.Judged":
    """`demo` stands for the demo's own row."""
    named = {aims.DEMO if name == "demo" else name: found for name, found in values.items()}
    return aims.judge(rows_of(metric, named, clips), aim_of(metric))


def test_the_demo_is_measured_at_all_steps_with_both_maps_and_costs_claim_c_nothing(plan: "tasks.Plan") -> None:
    variants = {variant.name: variant for variant in plan.variants["demo", 0]}
    named = {f"maps_{maps}_{steps}" for maps in ("made", "true") for steps in costs.denoising_steps()}
    assert variants.keys() == named | {"reference_repeated", "mean_colour", "training_mean", "facing_camera"}
    assert {3, 10, 25} <= {*costs.denoising_steps()}
    own, alone = (plans.make_plan(plan.settings, claims, (0,)) for claims in (["demo"], ["c"]))
    trainings = {name for name, task in own.tasks.items() if task.steps}
    assert trainings == {f"claims_s0_{label}" for label in ("domains", "geometry", "temporal", "stage2")}
    assert trainings <= alone.tasks.keys(), "the demo's trainings are those of claim c"
    jobs = set(own.tasks["claims_demo_s0_clips"].jobs)
    assert len(jobs) == len({job.recipe.output for job in jobs}) == len(named)
    shared = {job.recipe.animation.num_inference_steps for job in jobs & {*alone.tasks["claims_c_s0_clips"].jobs}}
    assert shared == {costs.demo_steps()}
    assert plan.tasks["claims_c_s0_clips"].seconds < alone.tasks["claims_c_s0_clips"].seconds
    assert {job.map_error for job in jobs} == {0.0, 1.0}
    evaluation = own.tasks["claims_demo_s0_evaluate"].recipe
    assert evaluation.training_set.local == "runs/claims/claims_dancers/train"
    assert evaluation.metrics.networks == ["lpips_alex"]


def test_every_aim_has_its_rows_in_the_plan_and_fits_its_metric(plan: "tasks.Plan") -> None:
    variants = {variant.name: variant for variant in plan.variants["demo", 0]}
    for aim in aims.AIMS:
        assert all(aim.metric in variants[name].metrics for name in (aim.row, *aim.against)), aim
        assert aim.against or aim.metric in ("psnr_body", "grain_distance"), aim
    for aim in aims.STEPS_AIMS:
        assert aim.metric in variants[f"{aim.maps}_25"].metrics
    assert "abs_rel" not in variants["maps_true_3"].metrics, "true maps are no result"


def test_a_metric_of_maps_has_the_steps_of_the_trainings_that_made_them(plan: "tasks.Plan") -> None:
    stage1, stage2 = (plan.tasks[f"claims_s0_{name}"].steps for name in ("temporal", "stage2"))
    assert stage1.count("+") == 2
    variants = {variant.name: variant for variant in plan.variants["demo", 0]}
    steps = {metric: variants[aims.DEMO].steps_of(metric) for metric in names.DEMO_METRICS}
    assert {metric for metric, found in steps.items() if found == stage1} == {"angular_error_mean", "abs_rel"}
    assert {*steps.values()} == {stage1, stage2}
    assert variants["training_mean"].steps_of("abs_rel") == ""
    alone = plans.make_plan(plan.settings, ["a", "pairs"], (0,))
    found = {variant.name: variant.steps_of("angular_error_mean") for variants in alone.variants.values()
             for variant in variants}  # fmt: skip
    assert found["align_bones"] == stage1
    assert found["with_geometry"] == alone.tasks["claims_s0_geometry"].steps
    longer = plans.make_plan(plan.settings, ["curve"], (0,))
    doubled = next(variant for variant in longer.variants["curve", 0] if variant.name == "maps_made_x2")
    assert doubled.steps_of("abs_rel") == longer.tasks["claims_s0_temporal_x2"].steps


def test_detail_is_judged_clip_by_clip(tmp_path: Path) -> None:
    """A clip without a background has no detail to judge."""
    made = plans.make_plan(tasks.Settings(tmp_path), ["demo"], [0])
    folder, note = tmp_path / "runs/claims_demo_s0_evaluate", tmp_path / "done/claims_demo_s0_evaluate.json"
    for path in (folder, note.parent):
        path.mkdir(parents=True)
    note.write_text('{"commit": "abc", "date": "2026-11-30"}', encoding="utf-8")
    clips = {clip: {RESULT_ROW: {"grain_distance": distance}} for clip, distance in {"a": 0.25, "b": 0.75}.items()}
    clips["c"] = {RESULT_ROW: {"l1": 0.1}}
    (folder / "table.json").write_text(json.dumps({"clips": clips}), encoding="utf-8")
    found = {row.metric: row for row in tables.collect(made, lambda task: True)}
    assert found["grain_distance"].value == 0.5
    assert found["grain_distance"].clips == 3
    assert "psnr" not in found


def test_the_curve_lengthens_every_training_of_one_seed(plan: "tasks.Plan") -> None:
    curve = plans.make_plan(plan.settings, ["curve"], (1, 2))
    assert [*curve.units] == [("curve", 1)]
    for label, recipe in (("domains", "stage1_domains"), ("geometry", "stage1_geometry"),
                          ("temporal", "stage1_temporal"), ("stage2", "stage2")):  # fmt: skip
        steps = costs.training_recipe(recipe).max_steps
        longer = {times: curve.tasks[f"claims_s1_{label}{ending}"].recipe
                  for times, ending in ((1, ""), (2, "_x2"), (4, "_x4"))}  # fmt: skip
        assert {times: one.max_steps for times, one in longer.items()} == {1: steps, 2: 2 * steps, 4: 4 * steps}
        if label in ("geometry", "temporal"):
            assert longer[4].init_from.endswith("_x4"), "each goes on from the step before, of equal length"
    rows = {variant.name: variant for variant in curve.variants["curve", 1]}
    assert rows.keys() == {f"maps_{maps}_x{times}" for maps in ("made", "true") for times in (1, 2, 4)} | {
        *names.TRIVIAL
    }
    assert rows["maps_made_x4"].steps == curve.tasks["claims_s1_stage2_x4"].steps
    outputs = [job.recipe.output for job in curve.jobs]
    assert len(outputs) == len({*outputs}) == 9, "of each length maps, frames from them, and frames from true maps"
    assert {job.maps for job in curve.jobs if job.map_error} == {
        f"runs/claims/results/s1_temporal{ending}" for ending in ("", "_x2", "_x4")}  # fmt: skip


def test_the_curve_says_what_each_aim_takes() -> None:
    values = {"maps_made_x1": (0.12,), "maps_made_x2": (0.11,), "mean_colour": (0.16,), "training_mean": (0.2,)}
    rows = [replace(row, claim="curve") for row in rows_of("l1_body", values)]
    text = aims.curve_text(rows)
    assert "l1_body 0.1200, 0.1100, not measured after 1, 2, 4 times the steps; the aim is 0.1200." in text  # 25 % off
    assert "psnr_body not measured, not measured, not measured after 1, 2, 4 times the steps; the aim is 19.00." in text
    assert "grain_distance not measured, " in text
    assert "the aim is 0.200." in text


def test_shares_are_against_the_best_trivial_answer_of_each_seed_or_the_named_one() -> None:
    # 1 - 24/40, 1 - 23/40, 1 - 22/38 are 40.0, 42.5 and 42.1 %
    trivial = {"reference_repeated": (50.0, 40.0, 38.0), "training_mean": (40.0, 44.0, 44.0),
               "facing_camera": (45.0, 45.0, 45.0)}  # fmt: skip
    found = judge("angular_error_mean", {"demo": (24.0, 23.0, 22.0), **trivial})
    assert found.verdict == "reached"
    assert found.numbers == (
        "angular_error_mean 23.00 against 39.33 (training_mean, reference_repeated); 41.5 % better, by seed "
        "+40.0 +42.5 +42.1")  # fmt: skip
    assert judge("angular_error_mean", {"demo": (24.0, 24.5, 23.0), **trivial}).verdict == "not reached"  # 39.4 %
    rows = {RESULT_ROW: {"angular_error_mean": 24.0},
            **{name: {"angular_error_mean": values[0]} for name, values in trivial.items()}}  # fmt: skip
    known = compare_with_trivial(rows)["angular_error_mean"]
    assert (known.answer, round(100 * known.relative, 1)) == ("training_mean", 40.0), "as evaluate says"

    # better than the repeated reference is enough, however good the others are; as good is not
    others = {"reference_repeated": (0.25,) * 3, "training_mean": (0.01,) * 3}
    assert judge("l1", {"demo": (0.24, 0.25, 0.25), **others}).verdict == "reached"
    assert judge("l1", {"demo": (0.25,) * 3, **others}).verdict == "not reached"
    worse = judge("l1", {"demo": (0.30, 0.375, 0.24), **others})
    assert worse.sentence.endswith("(reference_repeated); 22.0 % worse, by seed -20.0 -50.0 +4.0.")


def test_a_trivial_answer_counts_where_it_has_the_metric_and_must_be_measured_there() -> None:
    """Normals that face the camera have neither depth nor frames; a colour has no maps."""
    assert names.trivial_with("angular_error_mean") == ("reference_repeated", "training_mean", "facing_camera")
    assert names.trivial_with("abs_rel") == names.trivial_with("consistency_angle") == (
        "reference_repeated", "training_mean")  # fmt: skip
    assert names.trivial_with("l1_body") == ("reference_repeated", "mean_colour", "training_mean")
    repeated = {"reference_repeated": (40.0,) * 3, "training_mean": (44.0,) * 3}
    facing = {"facing_camera": (38.0,) * 3}
    found = judge("angular_error_mean", {"demo": (23.5,) * 3, **repeated, **facing})
    assert found.verdict == "not reached", "41 % better than the repeated reference, 38 % than the new answer"
    assert found.numbers.startswith("angular_error_mean 23.50 against 38.00 (facing_camera); 38.2 % better")
    without = judge("angular_error_mean", {"demo": (23.5,) * 3, **repeated})
    assert without.verdict == "not measured (without facing_camera)"
    assert "against 40.00 (reference_repeated; facing_camera not measured)" in without.numbers
    rows = rows_of("angular_error_mean", {aims.DEMO: (23.0,) * 3, **repeated, **facing})
    rows = [replace(row, commit="def") if row.variant == "facing_camera" and row.seed == 2 else row for row in rows]
    mixed = aims.judge(rows, aim_of("angular_error_mean"))
    assert mixed.verdict == without.verdict, "39.5, 39.5 and 42.5 % better, the last against the weaker answer"
    failed = judge("angular_error_mean", {"demo": (30.0,) * 3, **repeated})
    assert failed.verdict == "not reached", "a further answer cannot change that"
    depth = {"reference_repeated": (0.4,) * 3, "training_mean": (0.5,) * 3}
    assert judge("abs_rel", {"demo": (0.1,) * 3, **depth}).verdict == "reached"


@pytest.mark.parametrize(
    ("metric", "values", "verdict"),
    [
        ("psnr_body", (18.5, 19.0, 19.5), "reached"),
        ("psnr_body", (18.5, 19.0, 19.4), "not reached"),
        ("grain_distance", (0.25, 0.15, 0.15), "reached"),
        ("grain_distance", (0.25, 0.25, 0.15), "not reached"),
        ("grain_distance", (44.0, 44.0, 44.0), "not reached"),
    ],
)
def test_values_of_their_own(metric: str, values: Sequence[float], verdict: str) -> None:
    assert judge(metric, {"demo": values}).verdict == verdict


def test_too_few_seeds_or_clips_and_rivals_of_other_work_decide_nothing() -> None:
    assert judge("psnr_body", {}).sentence == "PSNR inside the body at least 19 dB: not measured."
    assert judge("psnr_body", {"demo": (30.0, 30.0)}).verdict == "not measured (2 of 3 seeds, 12 of 12 clips)"
    few = judge("psnr_body", {"demo": (30.0, 30.0, 31.0)}, clips=2)
    assert few.sentence == (
        "PSNR inside the body at least 19 dB: not measured (3 of 3 seeds, 2 of 12 clips). psnr_body 30.33, by seed "
        "30.00 30.00 31.00.")  # fmt: skip
    assert judge("l1_body", {"demo": (0.1, 0.1, 0.1)}).sentence.endswith("best trivial answer's: not measured.")
    rows = rows_of("psnr_body", {aims.DEMO: (30.0,) * 3})
    rows[1] = replace(rows[1], steps="2")
    assert (
        aims.judge(rows, aim_of("psnr_body")).verdict == "not measured (its seeds differ in clips or steps of training)"
    )
    rows = rows_of("l1_body", dict.fromkeys(names.trivial_with("l1_body"), (0.2,) * 3) | {aims.DEMO: (0.1,) * 3})
    assert aims.judge(rows, aim_of("l1_body")).verdict == "reached"
    rows = [replace(row, commit="def") if row.variant == aims.DEMO and row.seed == 1 else row for row in rows]
    assert aims.judge(rows, aim_of("l1_body")).verdict == "not measured (2 of 3 seeds, 12 of 12 clips)"


def test_more_steps_are_judged_by_the_worst_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aims, "denoising_steps", lambda: [3, 10, 25])
    aim = next(one for one in aims.STEPS_AIMS if (one.maps, one.metric) == (aims.MADE, "l1"))
    values = {"maps_made_3": (0.05, 0.05, 0.06), "maps_made_10": (0.04, 0.05, 0.05)}
    within = rows_of("l1", {**values, "maps_made_25": (0.03, 0.05009, 0.05)})
    assert aims.judge_steps(within, aim).sentence == (
        "More denoising steps never make l1 worse, on stage 1's maps: reached. l1 0.0533 at 3, 0.0467 at 10, 0.0434 at "
        "25 steps; by seed, 10 against 3 -0.01000 +0.00000 -0.01000; 25 against 3 -0.02000 +0.00009 -0.01000; "
        "25 against 10 -0.01000 +0.00009 +0.00000 (worse above 0.0001).")  # fmt: skip
    assert (
        aims.judge_steps(rows_of("l1", {**values, "maps_made_25": (0.03, 0.0502, 0.05)}), aim).verdict == "not reached"
    )
    slowly = {"maps_made_3": (0.05,) * 3, "maps_made_10": (0.05009,) * 3, "maps_made_25": (0.05018,) * 3}
    assert aims.judge_steps(rows_of("l1", slowly), aim).verdict == "not reached", "twice within the tolerance"
    assert aims.judge_steps(rows_of("l1", values), aim).verdict == "not measured"
    one_seed = [row for row in within if row.seed == 0]
    assert aims.judge_steps(one_seed, aim).verdict.startswith("not measured (1 of 3 seeds")


def test_the_text_counts_what_is_reached() -> None:
    rows = rows_of("psnr_body", {aims.DEMO: (20.0, 20.0, 20.0)})
    text = aims.aims_text(rows, {})
    assert text.startswith("**1 of 13 aims are reached** at ")
    assert text.count(": not measured.") == 12
