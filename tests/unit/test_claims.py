"""What `tools/claims.py` would do for hours: its plan, what it resumes, and maps of a chosen error."""

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import require_weights
from support.tool_modules import load_tool

from dreamdance.evaluation.clips import read_result
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.inference.results import ClipResult, is_done
from dreamdance.launch.run_folder import TIME_FORMAT, differences
from dreamdance.recipe import AnimateRecipe, EvaluateRecipe, Stage1Recipe, Stage2Recipe, load_recipe

ROOT = Path(__file__).parents[2]

clips, names, tasks, plans, provenance, tool = (
    load_tool(f"claims{name}") for name in ("_animate", "_names", "_tasks", "_plan", "_provenance", "")
)
SETTINGS = tasks.Settings(Path("runs/claims"))


@pytest.fixture(scope="module")
def plan() -> "tasks.Plan":
    """The whole plan; tests do not change it."""
    return plans.make_plan(SETTINGS, names.CLAIMS, (0, 1, 2))


def of_first_seed(plan: "tasks.Plan") -> "list[tasks.Task]":
    return [task for task in plan.tasks.values() if not {"s1", "s2"} & {*task.name.split("_")}]


def test_the_demo_and_the_claims_come_in_their_order_and_share_their_trainings(plan: "tasks.Plan") -> None:
    times = {claim: 1 if claim == "curve" else 3 for claim in ("demo", *"cabd", "pairs", "curve", *"efg")}
    assert [claim for claim, _ in plan.units] == [claim for claim, seeds in times.items() for _ in range(seeds)]
    trainings = [task for task in plan.tasks.values() if task.steps]
    # of each seed: stage 1's three steps, step 1 longer, and stage 2 whole, three times with a map left out, with a
    # mean, without dropouts of maps, with the reference first, on stage 1's maps; of the first seed, the demo's four
    # with 2 and 4 times their steps
    assert len(trainings) == 3 * (3 + 1 + 8) + 2 * 4
    for claim in ("demo", *"cdeg", "pairs"):
        assert "claims_s0_stage2" in plan.with_needs(plan.units[claim, 0]), claim
    for claim in "abf":
        assert not {"stage2"} & {plan.tasks[name].words[0] for name in plan.with_needs(plan.units[claim, 0])
                                 if plan.tasks[name].words}, claim  # fmt: skip
    ordered = plan.with_needs([name for names in plan.units.values() for name in names])
    assert sorted(ordered) == sorted(plan.tasks)
    places = {name: place for place, name in enumerate(ordered)}
    assert all(places[need] < places[name] for name in ordered for need in plan.tasks[name].needs)


def test_a_second_task_of_the_same_name_is_refused(plan: "tasks.Plan") -> None:
    with pytest.raises(ValueError, match="two tasks are named claims_s0_stage2"):
        plan.add(replace(plan.tasks["claims_s0_stage2"], words=("stage2",)))


def test_every_word_of_the_plan_is_accepted_by_its_recipe(plan: "tasks.Plan") -> None:
    for task in of_first_seed(plan):
        assert task.recipe is None or task.recipe.name == task.name
        assert (task.recipe is None) == bool(task.jobs)
        for job in task.jobs:
            assert isinstance(job.recipe, AnimateRecipe)


def test_the_demo_decides_what_trainings_predict_at_which_noise(plan: "tasks.Plan") -> None:
    """A base model fits one parametrisation, which the demo's recipes name."""
    trainings = [task for task in of_first_seed(plan) if task.steps]
    assert len(trainings) == 12 + 8
    for task in trainings:
        changed = {word.split("=")[0] for word in task.words if word.startswith(("model.", "objective."))}
        assert changed <= {
            "model.controls", "model.geometry_attention", "objective.reference_first",
            "objective.frame_control_dropout", "objective.modality_control_dropout"}, task.name  # fmt: skip


def test_three_seeds_are_meant_to_take_at_most_four_hours(plan: "tasks.Plan") -> None:
    assert sum(task.seconds for task in plan.tasks.values()) < 4 * 3600


def test_what_is_compared_differs_in_nothing_but_the_claim(plan: "tasks.Plan") -> None:
    def recipe_of(name: str):
        return plan.tasks[f"claims_s0_{name}"].recipe

    def changed(one: str, other: str) -> set[str]:
        return {*differences(*(recipe_of(name).model_dump(mode="json") for name in (one, other)))} - {"name"}

    whole = recipe_of("stage2")
    assert isinstance(whole, Stage2Recipe)
    assert whole.model.controls == ["pose", "depth", "normal"]
    for left_out in ("pose", "depth", "normal"):
        assert changed("stage2", f"stage2_no_{left_out}") == {"model.controls"}
        assert set(whole.model.controls) - set(recipe_of(f"stage2_no_{left_out}").model.controls) == {left_out}
    assert changed("stage2", "stage2_mean") == {"model.geometry_attention"}
    assert changed("stage2", "stage2_plain") == {f"objective.{kind}_control_dropout" for kind in ("frame", "modality")}
    assert changed("stage2", "stage2_first") == {"objective.reference_first", "data.num_frames"}
    assert recipe_of("stage2_first").data.num_frames == whole.data.num_frames + 1
    assert {key.split(".")[1] for key in changed("stage2", "stage2_made")} == {"maps"}
    step2, longer = recipe_of("geometry"), recipe_of("domains_longer")
    assert isinstance(step2, Stage1Recipe)
    assert isinstance(longer, Stage1Recipe)
    assert (longer.init_from, longer.max_steps, longer.optimizer.warmup_steps) == (
        step2.init_from, step2.max_steps, step2.optimizer.warmup_steps)  # fmt: skip
    # above all, the learning rate stays step 1's
    assert {key for key in changed("domains", "domains_longer") if not key.startswith("validation.")} == {
        "init_from", "max_steps", "optimizer.warmup_steps", "data.num_frames"}  # fmt: skip
    assert longer.batch_size == step2.batch_size
    assert (step2.train, step2.data.num_frames, longer.train, longer.data.num_frames) == ("geometry", 1, "domains", 3)


def test_nobody_who_is_judged_decided_a_setting_or_stopped_a_training(plan: "tasks.Plan") -> None:
    """The demo's settings were chosen on the first twelve held-out dancers, whose losses the trainings log too."""
    demo = load_recipe(ROOT / "recipes/demo/prepare.yaml").dancers
    for name in ("claims_people", "claims_pairs"):
        judged = plan.tasks[name].recipe.dancers
        assert (judged.skip_validation_clips, judged.num_validation_clips) == (12, 12)
    assert (demo.skip_validation_clips, demo.num_validation_clips) == (0, 12)
    for clips, skipped in ((4, 12), (20, 20)):
        trial = plans.make_plan(replace(SETTINGS, clips=clips), ["demo"], [0]).tasks["claims_people"].recipe.dancers
        assert (trial.skip_validation_clips, trial.num_validation_clips) == (skipped, clips), "a trial too"
    jobs = [job for task in plan.tasks.values() for job in task.jobs]
    assert {Path(job.truth).parent.name for job in jobs} == {"claims_people", "claims_pairs"}
    tables = [task.recipe for task in plan.tasks.values() if isinstance(task.recipe, EvaluateRecipe)]
    assert {Path(table.truth.local).parent.name for table in tables} == {"claims_people", "claims_pairs"}


def test_seeds_change_training_and_sampling(plan: "tasks.Plan") -> None:
    assert [plan.tasks[f"claims_s{seed}_stage2"].recipe.seed for seed in (0, 2)] == [0, 2]
    jobs = [plan.tasks[f"claims_c_s{seed}_clips"].jobs[0].recipe for seed in (0, 2)]
    assert [job.seed for job in jobs] == [0, 2]
    assert jobs[0].animation_from != jobs[1].animation_from
    assert jobs[0].output != jobs[1].output


def write_starts(run: Path, *, starts: Sequence[float], reports: Sequence[float]) -> None:
    """What a run folder says of its starts and steps, at seconds of the epoch."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    begun = [time.strftime(TIME_FORMAT, time.localtime(second)) for second in starts]
    content = {"starts": [{"time": one} for one in begun]}
    (run / "provenance.json").write_text(json.dumps(content), encoding="utf-8")
    lines = [json.dumps({"time": second + 0.125, "done": 1}) for second in reports]
    (run / "logs/progress.jsonl").write_text("\n".join([*lines, '{"time": 99']), encoding="utf-8")


def test_the_time_of_a_training_is_that_of_all_its_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert provenance.seconds_of_starts(run) == 0.0
    write_starts(run, starts=(100,), reports=(160, 200))  # its last line is incomplete, as after a kill
    assert provenance.seconds_of_starts(run) == 100.125
    write_starts(run, starts=(100, 500, 900), reports=(160, 200, 560))
    assert provenance.seconds_of_starts(run) == 100.125 + 60.125, "the third had no step"


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
    assert "| all | 12s | |" in runner().times()
    assert "others' of the last." in runner().times()
    write_starts(tmp_path / "runs/claims_s0_stage2", starts=(100, 500), reports=(160, 200, 560))
    assert "| claims_s0_stage2 | 2m 40s |" in runner().times(), "its note has the second start alone"
    assert "| all | 2m 51s | |" in runner().times()
    changed = runner(stage2=("optimizer.lr=1e-3",))
    assert {name for name in changed.plan.tasks if "stage2" not in name} - noted(changed) == {
        "claims_c_s0_clips", "claims_c_s0_evaluate"}  # fmt: skip
    before.stamp(before.plan.tasks["claims_s0_temporal"]).write_text("{", encoding="utf-8")
    assert "claims_s0_temporal" not in noted(before), "a damaged note"
    kept = before.stamp(before.plan.tasks["claims_dancers"])
    kept.write_text(json.dumps({"key": before.key(before.plan.tasks["claims_dancers"])}), encoding="utf-8")
    assert "claims_dancers" not in noted(before), "it began, and was killed"


def test_a_changed_recipe_or_base_model_makes_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stage2.yaml", "animate.yaml"):
        (tmp_path / name).write_bytes((tasks.DEMO / name).read_bytes())
    monkeypatch.setattr(tasks, "DEMO", tmp_path)
    monkeypatch.setattr(clips, "RECIPE", tmp_path / "animate.yaml")
    folder = tmp_path / "video"
    for name, content in (("unet/config.json", "{}"), ("unet/a.safetensors", "1"), ("README.md", "a card")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    def training() -> str:
        words = ("stage2", f"model.unet={{path: {folder}, subfolder: unet}}")
        return tasks.Task("training", words).identity

    def made() -> str:
        return tasks.Task("made", jobs=(clips.Job("animation", ("seed=1",), "truth"),)).identity

    found = {training()}
    assert {training()} == found
    assert tasks.base_weights(tasks.Task("t", ("stage2", f"model.unet={{path: {folder}}}")).recipe) == [
        ("unet: unet/a.safetensors", "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"),  # of "1"
        ("unet: unet/config.json", "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),  # of "{}"
    ]
    (folder / "README.md").write_text("another card", encoding="utf-8")
    (tmp_path / "stage2.yaml").write_text(f"# More words.\n{(tmp_path / 'stage2.yaml').read_text()}", encoding="utf-8")
    assert {training()} == found, "words for people decide nothing"
    (folder / "unet/a.safetensors").write_text("22", encoding="utf-8")
    found |= {training()}
    assert len(found) == 2
    text = (tmp_path / "stage2.yaml").read_text(encoding="utf-8")
    (tmp_path / "stage2.yaml").write_text(text.replace("warmup_steps: 30", "warmup_steps: 31"), encoding="utf-8")
    assert len(found | {training()}) == 3
    before, text = made(), (tmp_path / "animate.yaml").read_text(encoding="utf-8")
    assert made() == before
    (tmp_path / "animate.yaml").write_text(text.replace("window_overlap: 2", "window_overlap: 3"), encoding="utf-8")
    assert made() != before


def test_a_run_that_another_recipe_began_is_not_continued(tmp_path: Path) -> None:
    plan = plans.make_plan(tasks.Settings(tmp_path), ["c"], [0])
    runner = tool.Runner(plan, hours=4.0)
    begun = ("claims_s0_stage2", "claims_dancers", "claims_c_s0_evaluate")
    for name in begun:
        (tmp_path / "runs" / name).mkdir(parents=True)
        runner.stamp(plan.tasks[name]).parent.mkdir(exist_ok=True)
        runner.stamp(plan.tasks[name]).write_text('{"key": "another"}', encoding="utf-8")
    (tmp_path / "claims_dancers").mkdir()
    training, data, evaluation = (plan.tasks[name] for name in begun)
    with pytest.raises(tool.FailedError, match=f"remove {tmp_path}/runs/claims_s0_stage2, or give another --out"):
        runner.run(training)
    with pytest.raises(tool.FailedError, match=f"remove {tmp_path}/claims_dancers and {tmp_path}/runs/claims_dancers"):
        runner.run(data)
    runner._leave_nothing_of_others(evaluation)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["claims_dancers", "claims_s0_stage2"]
    (tmp_path / "runs/claims_s0_stage2").rmdir()
    runner._leave_nothing_of_others(training)  # nothing is left of the other one


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "tools").mkdir()
    for name in ("code.py", "tools/claims.csv", "tools/claims.svg"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "A commit")
    clean = git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "tools/claims.csv").write_text("new", encoding="utf-8")  # which the command itself writes
    assert tool.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("new", encoding="utf-8")
    assert tool.commit(tmp_path) == f"{clean}-dirty"


def test_a_trial_never_writes_the_committed_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = ROOT / "tools/claims.csv"
    assert tool.parse([]).table == committed
    assert tool.parse(["c", "--seeds", "0", "--out", "elsewhere"]).table == committed
    words = (["--steps", "3"], ["--clips", "2"], ["--training-clips", "6"], ["--stage1", "batch_size=4"],
             ["--stage2", "batch_size=4"])  # fmt: skip
    for trial in words:
        assert tool.parse([*trial, "--out", str(tmp_path)]).table == tmp_path / "claims.csv"
        with pytest.raises(SystemExit):
            tool.parse([*trial, "--table", "tools/claims.csv"])
        assert "a trial needs another --table" in capsys.readouterr().err


def test_relative_folders_lie_in_the_project_wherever_the_command_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = tool.parse(["--out", "some/folder", "--table", "some/numbers.csv"])
    assert (options.out, options.settings.out) == (ROOT / "some/folder",) * 2
    assert options.table == ROOT / "some/numbers.csv"


def test_nothing_begins_that_would_end_after_the_hours(tmp_path: Path) -> None:
    plan = plans.make_plan(tasks.Settings(tmp_path), ["c"], [0])
    with pytest.raises(tool.OutOfTimeError, match="claims_people takes about 30s"):
        tool.Runner(plan, hours=0.001).run_unit(("c", 0))
    assert list(tmp_path.iterdir()) == []


def test_nothing_begins_whose_table_would_lack_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)  # without weights
    words = ["c", "--seeds", "0", "--hours", "0", "--out", "some", "--table", "numbers.csv"]
    assert tool.main(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"claims: run bash tools/networks.sh first: {tmp_path}/weights/networks/lpips/alexnet.ckpt")
    assert list(tmp_path.iterdir()) == []
    assert tool.main([*words, "--list"]) == 0
    plan = plans.make_plan(SETTINGS, ["a", "b", "f"], [0])
    assert tool.absent_networks(plan, lambda task: False, tmp_path) == [], "tables of stage 1 have no LPIPS"
    plan = plans.make_plan(SETTINGS, ["c"], [0])
    assert tool.absent_networks(plan, lambda task: "evaluate" in task.name, tmp_path) == [], "done before"


def test_with_the_network_the_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = require_weights("lpips/alexnet.ckpt")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/networks").symlink_to(weights.absolute())
    words = ["c", "--seeds", "0", "--hours", "0", "--out", "some", "--table", "numbers.csv"]
    assert tool.main(words) == 3, "of no hours"


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


def test_a_clip_is_made_again_from_other_maps_other_truth_or_in_another_size(tmp_path: Path) -> None:
    entry = ManifestEntry("clip", tmp_path / "reference.png", keypoints=tmp_path / "keypoints.json", line=1)
    files = ("reference.png", "keypoints.json", "made/clip/arrays.npz", "truth/index.json")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"old")

    def request(stage: str, error: float = 1.0, *words: str, weights: str = "w") -> str:
        job = clips.Job(stage, ("seed=1", *words), str(tmp_path / "truth"), str(tmp_path / "made"), error)
        return json.dumps(clips.describe_request(job, entry, weights))

    def all_requests() -> list[str]:
        return [request("animation"), request("animation", 0.0), request("geometry")]

    before = all_requests()
    assert all_requests() == before
    assert len({*before, request("animation", 0.5), request("animation", weights="v")}) == 5
    assert request("animation", 1.0, "geometry_width=128", "geometry_height=192") not in before
    # which of the three kinds of clips a file is a part of: with stage 1's maps, with true maps alone, stage 1's own
    for name, used in zip(files, ([1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]), strict=True):
        (tmp_path / name).write_bytes(b"newer")
        after = all_requests()
        assert [int(one != other) for one, other in zip(before, after, strict=True)] == used, name
        before = after


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
