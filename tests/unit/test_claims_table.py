"""What `tools/claims.py` says: which tables it reads, what it compares, its rule, its tables and its picture."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.tool_modules import load_tool

names, tasks, plans, compared, tables, provenance, texts, plots, tool = (
    load_tool(f"claims{name}")
    for name in ("_names", "_tasks", "_plan", "_comparisons", "_table", "_provenance", "_markdown", "_plot", "")
)


@pytest.fixture(scope="module")
def plan() -> "tasks.Plan":
    """The whole plan; tests do not change it."""
    return plans.make_plan(tasks.Settings(Path("runs/claims")), names.CLAIMS, (0,))


def row(variant: str, seed: int, value: float, *, claim: str = "d", metric: str = "l1_body") -> "tables.Row":
    return tables.Row(claim, variant, seed, metric, value, 12, "600", "abc", "2026-11-29")


def comparison_of(claim: str, **fields: object) -> "compared.Comparison":
    """The first comparison of a claim with these fields."""
    return next(one for one in compared.COMPARISONS if one.claim == claim
                and all(getattr(one, name) == value for name, value in fields.items()))  # fmt: skip


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([], "not measured"),
        ([0.1], "not decided"),
        ([0.10, 0.11], "not decided"),  # fewer than three seeds
        ([-0.10, -0.11], "not decided"),
        ([0.10, 0.11, 0.12], "holds"),
        # all positive, t = mean / standard error: 2.887 and 2.935; a table of Student's t has 2.920 for 2 degrees
        ([0.020, 0.050, 0.080], "not decided"),
        ([0.0205, 0.050, 0.0795], "holds"),
        # t = 2.327 and 2.379; 2.353 for 3 degrees
        ([0.0220, 0.0220, 0.150, 0.150], "not decided"),
        ([0.0236, 0.0236, 0.150, 0.150], "holds"),
        ([-0.01, 0.2, 0.2], "not decided"),
        ([0.0, 0.0, 0.0], "does not hold at this size"),  # equal rows
        # the same t on the other side
        ([-0.10, -0.11, -0.12], "does not hold at this size"),
        ([-0.020, -0.050, -0.080], "not decided"),
        ([-0.0205, -0.050, -0.0795], "does not hold at this size"),
        ([0.0, -0.11, -0.11], "not decided"),  # t = 2
        ([0.0, -0.11, -0.11, -0.11], "does not hold at this size"),  # t = 3
        ([0.0, 0.11, 0.11, 0.11], "not decided"),  # no seed may be without a gain
        ([-0.1, -0.2, 0.1], "not decided"),
        ([-0.1, -0.1, 0.001, -0.1], "not decided"),  # t = 2.96, one seed is right
        ([-0.1], "not decided"),
    ],
)
def test_the_rule_of_a_sentence(differences: list[float], said: str) -> None:
    assert tables.verdict(differences) == said


def test_a_sentence_pairs_seeds_and_knows_which_way_is_better() -> None:
    lower = comparison_of("d")
    rows = [row(name, seed, value) for name, values in
            {"attention": (0.10, 0.20, 0.30), "mean": (0.11, 0.212, 0.311)}.items()
            for seed, value in enumerate(values)]  # fmt: skip
    rows.append(row("mean", 3, 0.5))  # whose partner is not measured
    assert tables.gains(rows, lower) == pytest.approx({0: 0.01, 1: 0.012, 2: 0.011})
    said = tables.sentence(rows, lower)
    assert "on true maps: holds. l1_body 0.20000 against 0.21100; gain +0.01100, +5.2 %" in said
    assert said.endswith("right in 3 of 3.")
    higher = replace(lower, metric="psnr_body")
    swapped = [replace(one, metric="psnr_body") for one in rows]
    assert tables.gains(swapped, higher) == pytest.approx({0: -0.01, 1: -0.012, 2: -0.011})
    assert tables.sentence(rows, replace(lower, own="absent")).endswith(": not measured.")


@pytest.mark.parametrize(("name", "value"), [("clips", 6), ("steps", "600+3"), ("commit", "abc-dirty")])
def test_rows_of_other_clips_steps_or_commits_are_not_paired(name: str, value: object) -> None:
    rows = [row(variant, seed, 0.1 + seed) for variant in ("attention", "mean") for seed in range(2)]
    rows[1] = replace(rows[1], **{name: value})
    assert tables.gains(rows, comparison_of("d")) == {0: 0.0}
    said = tables.sentence(rows, comparison_of("d"))
    assert said.endswith(f" Seed 1 is left out: its rows have {name} {value} and {getattr(rows[0], name)}.")
    assert "right in 0 of 1." in said
    rows[0] = replace(rows[0], **{name: value})
    assert ": not measured. Seed 0 is left out" in tables.sentence(rows, comparison_of("d"))


def test_a_model_without_temporal_attention_is_the_one_before_step_3() -> None:
    flicker = comparison_of("f")
    rows = [replace(row(variant, 0, 1.0, claim="f", metric="flicker"), steps=steps)
            for variant, steps in (("with_temporal", "1800+300+200"), ("without_temporal", "1800+300"))]  # fmt: skip
    assert tables.gains(rows, flicker) == {0: 0.0}
    assert tables.gains([rows[0], replace(rows[1], steps="1800+30")], flicker) == {}
    assert tables.gains([replace(rows[0], steps="1800+300"), rows[1]], flicker) == {}


def test_every_comparison_has_its_rows_and_metric_in_the_plan_and_as_many_steps(plan: "tasks.Plan") -> None:
    for one in compared.COMPARISONS:
        found = {variant.name: variant for variant in plan.variants[one.claim, 0]}
        assert {one.own, one.other} <= found.keys(), one
        own, other = found[one.own], found[one.other]
        assert one.metric in {*own.metrics} & {*other.metrics}, one
        assert own.is_last_half == other.is_last_half, one
        rows = [replace(row(variant.name, 0, 1.0, claim=one.claim, metric=one.metric), steps=variant.steps)
                for variant in (own, other)]  # fmt: skip
        assert tables.gains(rows, one) == {0: 0.0}, one


def test_less_flicker_of_a_frozen_answer_does_not_prove_temporal_attention(plan: "tasks.Plan") -> None:
    guards = [one for one in compared.COMPARISONS if one.claim == "f" and one.metric != "flicker"]
    assert {one.metric for one in guards} == {"angular_error_mean", "l1"}

    def text_of(normals: float) -> str:
        scores = (("flicker", 0.0, 9.0), ("angular_error_mean", normals, 20.0), ("l1", 0.05, 0.1))
        rows = [replace(row(name, seed, value + (0.01 + 0.001 * seed) * (name == "with_temporal"), claim="f",
                            metric=metric), steps=steps)
                for metric, *values in scores
                for name, steps, value in zip(("with_temporal", "without_temporal"), ("1+1", "1"), values, strict=True)
                for seed in range(3)]  # fmt: skip
        return texts.markdown(rows, ["f"])

    frozen = text_of(50.0)
    assert "lowers the flicker of the background in stage 1's own pictures, which Eq. 2 drops" in frozen
    assert "before step 3, without temporal attention): holds." in frozen
    assert "**Claim (f): does not hold at this size** (2 of 3 comparisons hold)" in frozen
    assert "the normals' error too, a guard against frozen and blurred answers: does not hold at this size." in frozen
    assert "**Claim (f): holds** (3 of 3 comparisons hold)" in text_of(10.0)
    assert {"reference_repeated", "facing_camera"} <= {variant.name for variant in plan.variants["f", 0]}


def test_a_gain_stands_beside_the_truth_and_the_trivial_answers(plan: "tasks.Plan") -> None:
    agreement = comparison_of("a", metric="consistency_angle")
    assert agreement.beside == ("truth", "reference_repeated", "training_mean")
    values = {"with_geometry": (61.0, 61.1, 61.2), "without_geometry": (62.0, 62.1, 62.3), "truth": (7.0,) * 3,
              "reference_repeated": (17.0,) * 3, "training_mean": (58.0,) * 3}  # fmt: skip
    rows = [row(name, seed, value, claim="a", metric="consistency_angle")
            for name, found in values.items() for seed, value in enumerate(found)]  # fmt: skip
    said = tables.sentence(rows, agreement)
    assert "on 3 frames x 1 drawn domain): holds. consistency_angle 61.100 against 62.133" in said
    assert said.endswith(
        "right in 3 of 3. The better of both, with_geometry with 61.100, has maps that agree less than the truth "
        "(7.000, +772.9 %); has maps that agree less than the repeated reference (17.000, +259.4 %); has maps that "
        "agree less than the training set's mean (58.000, +5.3 %).")  # fmt: skip
    better = [replace(one, value=50.0 + one.value / 1000) if "geometry" in one.variant else one for one in rows]
    assert "has maps that agree more than the training set's mean (58.000, " in tables.sentence(better, agreement)
    less = [one for one in rows if (one.variant, one.seed) != ("truth", 1)]
    assert tables.sentence(less, agreement).endswith("; the truth: not measured.")
    others = [replace(one, commit="def") if one.variant == "truth" else one for one in rows]
    assert tables.sentence(others, agreement) == tables.sentence(less, agreement), "rows of other work"
    for one in compared.COMPARISONS:
        variants = {variant.name: variant for variant in plan.variants[one.claim, 0]}
        assert all(one.metric in variants[name].metrics for name in one.beside), one


def test_fitted_bones_that_help_are_still_put_beside_the_trivial_answers() -> None:
    assert "(pairs) fitted bones, across identities (5.3)" in texts.markdown([], ["pairs"])
    values = {"align_bones": 0.16, "align_none": 0.17, "reference_repeated": 0.2, "mean_colour": 0.15}
    rows = [row(name, seed, value * (1 + 0.01 * seed * (name == "align_none")), claim="pairs")
            for name, value in values.items() for seed in range(3)]  # fmt: skip
    said = tables.sentence(rows, comparison_of("pairs"))
    assert "when another person drives: holds." in said
    assert said.endswith(
        " The better of both, align_bones with 0.16000, is no better than the reference's mean colour (0.15000, "
        "+6.7 %); is better than the repeated reference (0.20000, -20.0 %).")  # fmt: skip
    swapped = [replace(one, variant={"align_bones": "align_none", "align_none": "align_bones"}.get(
        one.variant, one.variant)) for one in rows]  # fmt: skip
    assert "The better of both, align_none with 0.16000" in tables.sentence(swapped, comparison_of("pairs"))


def test_a_claim_holds_only_if_all_its_comparisons_hold() -> None:
    rows = [row(name, seed, value + 0.001 * seed, claim="c") for seed in range(3) for name, value in
            {"all_three": 0.1, "no_pose": 0.2, "no_depth": 0.2}.items()]  # fmt: skip
    assert tables.overall(rows, "c").startswith("**Claim (c): not measured** (2 of 3 comparisons hold); ")
    assert "on true maps decide" in tables.overall(rows, "c")
    rows += [row("no_normal", seed, 0.05, claim="c") for seed in range(3)]
    assert tables.overall(rows, "c").startswith("**Claim (c): does not hold at this size** (2 of 3")
    undecided = [replace(one, value=0.1) if one.variant == "no_normal" else one for one in rows]
    undecided[0] = replace(undecided[0], value=0.09)
    assert tables.overall(undecided, "c").startswith("**Claim (c): not decided** (2 of 3")
    unmeasured = [one for one in undecided if one.variant != "no_pose"]
    assert tables.overall(unmeasured, "c").startswith("**Claim (c): not measured** (1 of 3"), "less is known"
    refuted = [one for one in rows if one.variant != "no_pose"]
    assert tables.overall(refuted, "c").startswith("**Claim (c): does not hold at this size** (1 of 3"), "anyway"
    rows = [replace(one, value=0.3) if one.variant == "no_normal" else one for one in rows]
    assert tables.overall(rows, "c").startswith("**Claim (c): holds** (3 of 3")
    rows += [row("all_three_made", seed, 9.0, claim="c") for seed in range(3)]
    rows += [row("no_pose_made", seed, 1.0, claim="c") for seed in range(3)]
    assert tables.overall(rows, "c").startswith("**Claim (c): holds**"), "stage 1's maps do not count"


def test_the_csv_file_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "claims.csv"
    tables.merge(path, [row("mean", 0, 0.5), row("mean", 1, 0.25)])
    (tmp_path / "old.csv").hardlink_to(path)
    merged = tables.merge(path, [row("mean", 0, 0.125), row("all_three", 0, 1.0, claim="c")])
    assert [(one.claim, one.variant, one.seed, one.value) for one in merged] == [
        ("c", "all_three", 0, 1.0), ("d", "mean", 0, 0.125), ("d", "mean", 1, 0.25)]  # fmt: skip
    assert tables.read(path) == merged
    assert [one.value for one in tables.read(tmp_path / "old.csv")] == [0.5, 0.25], "a new file replaces the old one"
    assert len([*tmp_path.iterdir()]) == 2


def sweep_table(judging: Sequence[float] = (0.0, 0.0, 0.0)) -> dict[str, object]:
    """A table of the sweep; its second half, which must not choose, has the same scores in each row."""

    def scores(rgb: float, normal: float, depth: float) -> dict[str, float]:
        return {"l1": rgb, "angular_error_mean": normal, "abs_rel": depth}

    rows = {"this run": scores(1.0, 1.0, 1.0)}
    for domain in names.DOMAINS:
        for scale in names.SCALES[1:]:
            rows[tasks.scaled(domain, scale)] = scores(2.0, 2.0, 2.0)
    rows |= {tasks.scaled("one", scale): scores(1.5, 0.9, 1.5) for scale in names.SCALES[1:]}
    rows["rgb_scale_1"], rows["normal_scale_0p5"] = scores(0.5, 9.0, 9.0), scores(9.0, 0.5, 9.0)
    rows["one_scale_1"], rows["one_scale_2p5"] = scores(1.5, 0.8, 1.5), scores(0.5, 1.0, 1.0)
    judges = {name: scores(*judging) for name in rows}
    return {"clips": {"a": rows, "b": rows, "c": judges, "d": judges}}


def test_guidance_scales_are_chosen_on_clips_that_do_not_judge_them() -> None:
    table = sweep_table()
    assert tables.best_scales(table) == tables.BestScales(
        {"rgb": 1.0, "normal": 0.5, "depth": 0.0}, "one_scale_1", "one_scale_2p5"
    )
    assert tables.mean_of(table, "rgb_scale_1", "l1", tables.last_half(["a", "b", "c", "d"])) == 0.0


def test_own_scales_reach_the_clips_and_only_tables_of_this_plan_are_collected(tmp_path: Path) -> None:
    def runner_of(**settings: object) -> "tool.Runner":
        return tool.Runner(plans.make_plan(tasks.Settings(tmp_path, **settings), ["b"], [0]), hours=4.0)

    runner, judged = runner_of(), {"angular_error_mean": 30.0}
    content = {
        "claims_b_s0_evaluate": sweep_table((7.0, 8.0, 9.0)),
        "claims_b_s0_own_evaluate": {"clips": {clip: {"this run": judged} for clip in "abcd"}},
    }
    protocol = {"clips": "4, mean over clips; 60 frames", "truth": "a folder", "frames": "64x96 pixels"}
    for name, table in content.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        text = json.dumps({**table, "protocol": protocol})
        (tmp_path / f"runs/{name}/table.json").write_text(text, encoding="utf-8")

    jobs = runner.jobs_of(runner.plan.tasks["claims_b_s0_own_clips"])
    assert [job.recipe.geometry.guidance_scales.model_dump() for job in jobs] == [
        {"rgb": 1.0, "normal": 0.5, "depth": 0.0}]  # fmt: skip
    swept = runner.plan.tasks["claims_b_s0_clips"]
    assert runner.jobs_of(swept) == list(swept.jobs)

    def collected(one: "tool.Runner") -> dict[tuple[str, str], "tables.Row"]:
        return {(found.variant, found.metric): found for found in tables.collect(one.plan, one.is_done)}

    assert collected(runner) == {}, "tables without a note"
    assert provenance.how_measured(runner.plan, runner.is_done) == ""
    note = {"seconds": 1.0, "commit": "abc", "date": "2026-11-30"}
    for name in content:
        runner._write_note(runner.plan.tasks[name], {"key": runner.key(runner.plan.tasks[name]), **note})
    found = collected(runner)
    assert len(found) == 13 * 3 + 1 + 2 * 3  # the sweep, the own scales, and two choices of one scale
    normals = "angular_error_mean"
    assert (found["own_scales", normals].value, found["own_scales", normals].clips) == (30.0, 2)
    assert found["own_scales", normals].commit == "abc"
    assert (found["one_best_for_normals", normals].value, found["one_best_for_normals", normals].clips) == (8.0, 2)
    assert (found["one_scale_1", normals].value, found["one_scale_1", normals].clips) == (pytest.approx(4.4), 4)
    assert collected(runner_of(clips=4)) == {}, "tables of other settings"
    how = provenance.how_measured(runner.plan, runner.is_done)
    assert how.splitlines() == [
        "- clips: 4, mean over clips; 60 frames", "- frames: 64x96 pixels",
        "- (b) denoising steps: stage 1 2. Commits: trainings not noted; clips not noted"]  # fmt: skip
    for name, commit in (("claims_s0_domains", "old"), ("claims_s0_temporal", "abc"), ("claims_b_s0_clips", "def")):
        task = runner.plan.tasks[name]
        runner._write_note(task, {"key": runner.key(task), **note, "commit": commit})
    how = provenance.how_measured(runner.plan, runner.is_done)
    assert how.endswith("stage 1 2. Commits: trainings at abc, old; clips at def")
    both = provenance.made_from(plans.make_plan(tasks.Settings(tmp_path), ["demo"], [0]), runner.is_done, "demo")
    assert both.startswith("- (demo) denoising steps: stage 1 2; stage 2 3, 10, 25. Commits: trainings at abc, old")
    text = texts.markdown([*found.values()], ["b"])
    assert text.index("Of 4 clips, not") < text.index("| one_scale_1 |") < text.index("Of 2 clips, not")
    assert text.index("Of 2 clips, not") < text.index("| own_scales |")


def test_a_table_names_the_steps_of_maps_apart() -> None:
    rows = [row("maps_made_3", 0, 0.1, claim="demo"), row("maps_made_3", 0, 0.1, claim="demo", metric="abs_rel")]
    rows[1] = replace(rows[1], steps="7+8")
    assert "| 1 | 12 | 600; maps 7+8 |" in texts.markdown(rows, ["demo"])
    assert "| 1 | 12 | 600 |" in texts.markdown([rows[0], replace(rows[1], steps="600")], ["demo"])
    assert "| 1 | 12 | 7+8 |" in texts.markdown(rows[1:], ["demo"])


def test_the_tables_and_the_picture_say_what_was_not_measured_and_by_which_rule() -> None:
    rows = [row("attention", seed, 0.1 + 0.01 * seed) for seed in range(3)]
    text = texts.markdown(rows, ["d", "a"])
    assert "| attention | 0.1100 +- 0.0100 | 3 | 12 | 600 |" in text
    assert "mean +- standard deviation over seeds" in text
    assert "one-sided, 5 %; all seeds judge the same 12 clips" in text
    assert "on 3 frames x 1 drawn domain): not measured." in text
    picture = plots.draw(rows)
    assert picture.count("<circle") == 3
    assert (
        picture.count("not measured") == 3 + 7 + 3
    )  # lines of this claim, the other claims, the demo, its curve, and the sweep


def test_the_picture_has_a_curve_for_each_domain_that_is_swept_and_one_for_all() -> None:
    errors = {("one", 0.0): 4.0, ("one", 1.0): 2.0, ("normal", 1.0): 1.0}
    rows = [row(tasks.scaled(*varied), seed, value + seed, claim="b", metric="angular_error_mean")
            for varied, value in errors.items() for seed in range(2)]  # fmt: skip
    picture = plots.draw(rows)
    lines = re.findall(r'<polyline points="([^"]*)"[^>]*stroke="([^"]*)"', picture)
    curves = {colour: [tuple(map(float, point.split(","))) for point in points.split()] for points, colour in lines}
    assert list(curves) == [colour for _, colour in plots.CURVES.values()]
    one, normal, depth = (curves[plots.CURVES[name][1]] for name in ("one", "normal", "depth"))
    assert len(depth) == 1, "without guidance all curves begin in one point"
    assert one[0] == normal[0] == depth[0]
    assert one[1][0] == normal[1][0] > one[0][0]
    assert normal[1][1] > one[1][1] > one[0][1]
    assert normal[1][1] - one[0][1] == pytest.approx(1.5 * (one[1][1] - one[0][1]), abs=0.2), "down is less error"
    assert len(re.findall("<circle", picture)) == 2 * (3 + 3)  # no guidance in each curve
