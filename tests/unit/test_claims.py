"""What `tools/claims.py` would do for hours: its plan, what it resumes, its rule, and maps of a chosen error."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tool_modules import load_tool

from dreamdance.evaluation.clips import read_result
from dreamdance.inference.results import ClipResult, is_done
from dreamdance.launch.run_folder import differences
from dreamdance.recipe import AnimateRecipe, Stage1Recipe, Stage2Recipe, load_recipe

ROOT = Path(__file__).parents[2]

tasks, plans, tables, plots, tool, clips = (
    load_tool(name)
    for name in ("claims_tasks", "claims_plan", "claims_table", "claims_plot", "claims", "claims_animate")
)
SETTINGS = tasks.Settings(Path("runs/claims"))


def whole_plan(seeds: tuple[int, ...] = (0, 1, 2)) -> "tasks.Plan":
    return plans.make_plan(SETTINGS, plans.CLAIMS, seeds)


def recipe_of(name: str, seed: int = 0):
    task = whole_plan().tasks[f"claims_s{seed}_{name}"]
    return load_recipe(ROOT / f"recipes/demo/{task.words[0]}.yaml", list(task.words[1:]))


def row(variant: str, seed: int, value: float, *, claim: str = "d", metric: str = "l1_body") -> "tables.Row":
    return tables.Row(claim, variant, seed, metric, value, 12, "600", "abc", "2026-11-29")


def test_claims_come_in_their_order_and_share_their_trainings() -> None:
    plan = whole_plan()
    assert [claim for claim, _ in plan.units] == [claim for claim in "cabdfeg" for _ in range(3)]
    trainings = [task for task in plan.tasks.values() if task.steps]
    # of each seed: stage 1's three steps, step 1 longer, and stage 2 whole, three times with a map left out, with a
    # sum, without dropouts of maps, with the reference first, on stage 1's maps
    assert len(trainings) == 3 * (3 + 1 + 8)
    for claim in "cdeg":
        assert "claims_s0_stage2" in plan.with_needs(plan.units[claim, 0]), claim
    for claim in "abf":
        assert not {"stage2"} & {plan.tasks[name].words[0] for name in plan.with_needs(plan.units[claim, 0])
                                 if plan.tasks[name].words}, claim  # fmt: skip
    ordered = plan.with_needs([name for names in plan.units.values() for name in names])
    assert sorted(ordered) == sorted(plan.tasks)
    places = {name: place for place, name in enumerate(ordered)}
    assert all(places[need] < places[name] for name in ordered for need in plan.tasks[name].needs)


def test_a_second_task_of_the_same_name_is_refused() -> None:
    plan = whole_plan((0,))
    with pytest.raises(ValueError, match="two tasks are named claims_s0_stage2"):
        plan.add(replace(plan.tasks["claims_s0_stage2"], words=("stage2",)))


def test_every_word_of_the_plan_is_accepted_by_its_recipe() -> None:
    for task in whole_plan().tasks.values():
        if task.words:
            recipe = load_recipe(ROOT / f"recipes/demo/{task.words[0]}.yaml", list(task.words[1:]))
            assert recipe.name == task.name
        for job in task.jobs:
            assert isinstance(job.recipe, AnimateRecipe)


def test_three_seeds_are_meant_to_take_at_most_four_hours() -> None:
    assert sum(task.seconds for task in whole_plan().tasks.values()) < 4 * 3600


def test_what_is_compared_differs_in_nothing_but_the_claim() -> None:
    def changed(one: str, other: str) -> set[str]:
        return {*differences(*(recipe_of(name).model_dump(mode="json") for name in (one, other)))} - {"name"}

    whole = recipe_of("stage2")
    assert isinstance(whole, Stage2Recipe)
    assert whole.model.controls == ["pose", "depth", "normal"]
    for left_out in ("pose", "depth", "normal"):
        assert changed("stage2", f"stage2_no_{left_out}") == {"model.controls"}
        assert set(whole.model.controls) - set(recipe_of(f"stage2_no_{left_out}").model.controls) == {left_out}
    assert changed("stage2", "stage2_sum") == {"model.geometry_attention"}
    assert changed("stage2", "stage2_plain") == {f"objective.{kind}_control_dropout" for kind in ("frame", "modality")}
    assert changed("stage2", "stage2_first") == {"objective.reference_first", "data.num_frames"}
    assert {key.split(".")[1] for key in changed("stage2", "stage2_made")} == {"maps"}
    step2, longer = recipe_of("geometry"), recipe_of("domains_longer")
    assert isinstance(step2, Stage1Recipe)
    assert isinstance(longer, Stage1Recipe)
    assert (longer.init_from, longer.max_steps, longer.optimizer.lr) == (
        step2.init_from, step2.max_steps, step2.optimizer.lr)  # fmt: skip
    assert longer.batch_size * longer.data.num_frames == 3 * step2.batch_size * step2.data.num_frames


def test_seeds_change_training_and_sampling() -> None:
    assert [recipe_of("stage2", seed).seed for seed in (0, 2)] == [0, 2]
    jobs = [whole_plan().tasks[f"claims_c_s{seed}_clips"].jobs[0].recipe for seed in (0, 2)]
    assert [job.seed for job in jobs] == [0, 2]
    assert jobs[0].animation_from != jobs[1].animation_from
    assert jobs[0].output != jobs[1].output


def test_what_is_noted_as_done_is_not_run_again_unless_it_or_what_it_needs_has_changed(tmp_path: Path) -> None:
    def runner(**settings: object) -> "tool.Runner":
        made = plans.make_plan(tasks.Settings(tmp_path, **settings), ["c"], [0])
        return tool.Runner(made, hours=4.0)

    def noted(one: "tool.Runner") -> set[str]:
        return {name for name, task in one.plan.tasks.items() if one.is_done(task)}

    before = runner()
    assert noted(before) == set()
    for task in before.plan.tasks.values():
        before.stamp(task).parent.mkdir(parents=True, exist_ok=True)
        before.stamp(task).write_text(json.dumps({"key": before.key(task), "seconds": 1.0}), encoding="utf-8")
    assert noted(runner()) == {*before.plan.tasks}
    assert "| all | 11s | |" in runner().times()
    changed = runner(stage2=("optimizer.lr=1e-3",))
    assert {name for name in changed.plan.tasks if "stage2" not in name} - noted(changed) == {
        "claims_c_s0_clips", "claims_c_s0_evaluate"}  # fmt: skip
    before.stamp(before.plan.tasks["claims_s0_temporal"]).write_text("{", encoding="utf-8")
    assert "claims_s0_temporal" not in noted(before), "a damaged note"


def test_nothing_begins_that_would_end_after_the_hours(tmp_path: Path) -> None:
    plan = plans.make_plan(tasks.Settings(tmp_path), ["c"], [0])
    with pytest.raises(tool.OutOfTimeError, match="claims_dancers takes about 30s"):
        tool.Runner(plan, hours=0.001).run_unit(("c", 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([], "not measured"),
        ([0.1], "not decided"),
        ([0.10, 0.11, 0.12], "holds"),
        ([0.01, 0.30, 0.02], "not decided"),  # all positive, mean .11, standard error .095
        ([-0.01, 0.2, 0.2], "not decided"),
        ([0.0, 0.0, 0.0], "does not hold at this size"),
        ([-0.1, -0.2, 0.1], "does not hold at this size"),
        ([-0.1], "not decided"),
    ],
)
def test_the_rule_of_a_sentence(differences: list[float], said: str) -> None:
    assert tables.verdict(differences) == said


def test_a_sentence_pairs_seeds_and_knows_which_way_is_better() -> None:
    lower = next(one for one in tables.COMPARISONS if one.claim == "d")
    rows = [row(name, seed, value) for name, values in {"attention": (0.10, 0.20), "sum": (0.11, 0.212)}.items()
            for seed, value in enumerate(values)]  # fmt: skip
    rows.append(row("sum", 2, 0.5))  # whose partner is not measured
    assert tables.gains(rows, lower) == pytest.approx({0: 0.01, 1: 0.012})
    said = tables.sentence(rows, lower)
    assert "on true maps: holds. l1_body 0.15000 against 0.16100; gain +0.01100, +6.8 %" in said
    assert "right in 2 of 2" in said
    higher = replace(lower, metric="psnr_body")
    swapped = [replace(one, metric="psnr_body") for one in rows]
    assert tables.gains(swapped, higher) == pytest.approx({0: -0.01, 1: -0.012})
    assert tables.sentence(rows, replace(lower, own="absent")).endswith(": not measured.")


def test_a_claim_holds_only_if_all_its_comparisons_hold() -> None:
    rows = [row(name, seed, value + 0.001 * seed, claim="c") for seed in range(3) for name, value in
            {"all_three": 0.1, "no_pose": 0.2, "no_depth": 0.2}.items()]  # fmt: skip
    assert tables.overall(rows, "c") == "**Claim (c): not measured** (2 of 3 comparisons hold)"
    rows += [row("no_normal", seed, 0.05, claim="c") for seed in range(3)]
    assert tables.overall(rows, "c").startswith("**Claim (c): does not hold at this size** (2 of 3")
    rows = [replace(one, value=0.3) if one.variant == "no_normal" else one for one in rows]
    assert tables.overall(rows, "c").startswith("**Claim (c): holds** (3 of 3")
    rows += [row("all_three_made", seed, 9.0, claim="c") for seed in range(3)]
    rows += [row("no_pose_made", seed, 1.0, claim="c") for seed in range(3)]
    assert tables.overall(rows, "c").startswith("**Claim (c): holds**"), "stage 1's maps do not count"


def test_the_csv_file_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "claims.csv"
    tables.merge(path, [row("sum", 0, 0.5), row("sum", 1, 0.25)])
    merged = tables.merge(path, [row("sum", 0, 0.125), row("all_three", 0, 1.0, claim="c")])
    assert [(one.claim, one.variant, one.seed, one.value) for one in merged] == [
        ("c", "all_three", 0, 1.0), ("d", "sum", 0, 0.125), ("d", "sum", 1, 0.25)]  # fmt: skip
    assert tables.read(path) == merged


def test_guidance_scales_are_chosen_on_clips_that_do_not_judge_them() -> None:
    def scores(rgb: float, normal: float, depth: float) -> dict[str, float]:
        return {"l1": rgb, "angular_error_mean": normal, "abs_rel": depth}

    rows = {"this run": scores(1.0, 1.0, 1.0)}
    for domain in plans.DOMAINS:
        for scale in plans.SCALES[1:]:
            rows[plans.scaled(domain, scale)] = scores(2.0, 2.0, 2.0)
    rows |= {plans.scaled("one", scale): scores(1.5, 0.9, 1.5) for scale in plans.SCALES[1:]}
    rows["rgb_scale_1"], rows["normal_scale_0p5"] = scores(0.5, 9.0, 9.0), scores(9.0, 0.5, 9.0)
    rows["one_scale_2p5"] = scores(0.5, 1.0, 1.0)
    worse = {name: scores(0.0, 0.0, 0.0) for name in rows}  # the second half would choose something else
    table = {"clips": {"a": rows, "b": rows, "c": worse, "d": worse}}
    assert tables.best_scales(table) == ({"rgb": 1.0, "normal": 0.5, "depth": 0.0}, "one_scale_2p5")
    assert tables.mean_of(table, "rgb_scale_1", "l1", tables.last_half(["a", "b", "c", "d"])) == 0.0


def test_the_tables_and_the_picture_say_what_was_not_measured() -> None:
    rows = [row("attention", seed, 0.1 + 0.01 * seed) for seed in range(3)]
    text = tables.markdown(rows, ["d", "a"])
    assert "| attention | 0.1100 +- 0.0100 | 3 | 12 | 600 |" in text
    assert "Geometry attention brings normals and depth into agreement: not measured." in text
    picture = plots.draw(rows)
    assert picture.count("<circle") == 3
    assert picture.count("not measured") == 3 + 6  # lines of this claim, and the other claims


def test_maps_of_no_error_are_true_and_of_the_whole_error_those_that_were_made() -> None:
    generator = np.random.default_rng(0)
    true, made = (generator.normal(size=(4, 5, 3)).astype(np.float32) for _ in range(2))
    true, made = (normals / np.linalg.norm(normals, axis=-1, keepdims=True) for normals in (true, made))
    np.testing.assert_allclose(clips.mix_normals(true, made, 0.0), true, atol=1e-6)
    np.testing.assert_allclose(clips.mix_normals(true, made, 1.0), made, atol=1e-6)
    half = clips.mix_normals(true, made, 0.5)
    np.testing.assert_allclose(np.linalg.norm(half, axis=-1), 1.0, atol=1e-6)
    # half of the way lies on the bisector
    np.testing.assert_allclose((half * true).sum(-1), (half * made).sum(-1), atol=1e-6)
    np.testing.assert_array_equal(clips.mix_normals(true, -true, 0.5), true)


def test_a_result_is_complete_for_its_request_alone_and_is_what_evaluate_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frames, depths = (torch.rand(3, channels, 6, 4, generator=generator) for channels in (3, 1))
    normals = torch.nn.functional.normalize(torch.randn(3, 3, 6, 4, generator=generator), dim=1)
    made = ClipResult(frames[0], frames, frames, normals, depths, fps=8.0)
    content = {"request": {"seed": 1}, "fps": 8.0, "reference_frame": 2, "window_starts": [0]}
    clips.write(tmp_path / "clip", made, content)
    assert is_done(tmp_path / "clip", {"seed": 1})
    assert not is_done(tmp_path / "clip", {"seed": 2})
    found = read_result(tmp_path / "clip")
    assert (found.reference_frame, found.fps, found.window_starts) == (2, 8.0, (0,))
    np.testing.assert_allclose(found.frames, frames.movedim(1, -1), atol=0.5 / 255 + 1e-6)
    assert found.prediction.normals is not None
    np.testing.assert_allclose(found.prediction.normals, normals.movedim(1, -1), atol=1e-3)
    (tmp_path / "clip" / "arrays.npz").write_bytes(b"")
    assert not is_done(tmp_path / "clip", {"seed": 1}), "a damaged file"
