"""A run folder belongs to one recipe, and records code, packages and inputs of the run."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support.fault_log import record_fault

from dreamdance.errors import RecipeError, UserError, is_transient
from dreamdance.launch.run_folder import (
    DifferentRecipeError,
    create_or_check,
    differences,
    locked,
    record_job,
    stored_recipe,
)
from dreamdance.launch.status import readable_recipe
from dreamdance.recipe import load_recipe
from dreamdance.recipe.parse import flatten

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "stage1_domains.yaml"


# The demo may be tuned; the values that these tests check are set here.
PINNED = ("max_steps=2000", "optimizer.lr=1.5e-3", "batch_size=16", "micro_batch_size=8", "data.stride=[1, 1]")


def recipe(*overrides):
    return load_recipe(DEMO, [*PINNED, *overrides])


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "runs" / "demo"


def test_the_folder_holds_the_resolved_recipe_and_its_provenance_before_anything_runs(run_folder):
    create_or_check(recipe("seed=3"), run_folder, ["slurm.py", "demo.yaml", "seed=3"])
    assert load_recipe(run_folder / "recipe.yaml") == recipe("seed=3")
    (start,) = json.loads((run_folder / "provenance.json").read_text())["starts"]
    assert start["argv"] == ["slurm.py", "demo.yaml", "seed=3"]
    assert len(start["git"]["commit"]) == 40
    assert {"torch", "diffusers", "deepspeed", "submitit"} <= start["versions"].keys()
    assert start["host"]
    assert {entry.name for entry in run_folder.iterdir()} == {
        *("recipe.yaml", "provenance.json"),
        *("checkpoints", "exports", "samples", "tensorboard", "logs"),
    }


def test_the_same_recipe_again_resumes_and_records_its_start(run_folder):
    create_or_check(recipe(), run_folder, ["first"])
    create_or_check(recipe(), run_folder, ["second"])
    starts = json.loads((run_folder / "provenance.json").read_text())["starts"]
    assert [start["argv"] for start in starts] == [["first"], ["second"]]


def test_a_different_recipe_is_refused_naming_every_key_with_old_and_new_value(run_folder):
    create_or_check(recipe(), run_folder, [])
    before = (run_folder / "recipe.yaml").read_text()
    with pytest.raises(DifferentRecipeError) as caught:
        create_or_check(recipe("optimizer.lr=2e-3", "data.stride=[1, 2]"), run_folder, [])
    text = str(caught.value)
    assert "optimizer.lr: 0.0015 -> 0.002" in text
    assert "data.stride: [1, 1] -> [1, 2]" in text
    assert "checkpoint.allow_changed=[data.stride, optimizer.lr]" in text
    assert (run_folder / "recipe.yaml").read_text() == before
    record_fault(
        "changed recipe under a run's name",
        how="another learning rate and stride for a run that has begun",
        promised="refused before anything is submitted, with each key, its old and new value, and the way to allow it",
        happened=text.partition(":\n")[2],
    )


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.tasks_per_node=1"],
        ["cluster.environment={A: b}"],
        ["logging.every_steps=1"],
        ["data.verify=hash"],
        ["max_steps=9999"],
        ["optimizer.lr=2e-3", "checkpoint.allow_changed=[optimizer.lr]"],
        ["optimizer.lr=2e-3", "optimizer.eps=1e-6", "checkpoint.allow_changed=[optimizer]"],
    ],
)
def test_permitted_changes_resume_and_are_recorded(run_folder, words):
    create_or_check(recipe(), run_folder, [])
    create_or_check(recipe(*words), run_folder, [])
    assert load_recipe(run_folder / "recipe.yaml") == recipe(*words)


def test_a_lowered_max_steps_is_a_difference(run_folder):
    create_or_check(recipe(), run_folder, [])
    with pytest.raises(DifferentRecipeError, match="max_steps: 2000 -> 1999"):
        create_or_check(recipe("max_steps=1999"), run_folder, [])


def test_permission_for_one_key_does_not_cover_another_with_the_same_beginning(run_folder):
    create_or_check(recipe(), run_folder, [])
    with pytest.raises(DifferentRecipeError, match=r"model\.pose_channels"):
        create_or_check(
            recipe("model.pose_channels=[8, 16, 32]", "checkpoint.allow_changed=[model.unet]"), run_folder, []
        )


def test_a_key_that_the_stored_recipe_lacks_has_its_default(run_folder):
    create_or_check(recipe(), run_folder, [])
    stored = run_folder / "recipe.yaml"
    stored.write_text(stored.read_text().replace("max_nonfinite_steps: 3\n", ""))
    create_or_check(recipe(), run_folder, [])
    with pytest.raises(DifferentRecipeError, match="max_nonfinite_steps: 3 -> 5"):
        create_or_check(recipe("max_nonfinite_steps=5"), run_folder, [])


def written_before(key, line, run_folder):
    """Changes the stored recipe to one of a version without a key."""
    stored = run_folder / "recipe.yaml"
    text = stored.read_text()
    assert text.count(line) == 1
    stored.write_text(text.replace(line, ""))
    assert key not in flatten(yaml.safe_load(stored.read_text()))


def test_a_run_that_began_before_targets_were_sampled_keeps_its_targets_or_is_refused(run_folder):
    create_or_check(recipe(), run_folder, [])
    written_before("objective.target_latents", "  target_latents: sample\n", run_folder)
    assert stored_recipe(run_folder) == recipe("objective.target_latents=mode")  # as a requeued job reads it
    with pytest.raises(DifferentRecipeError, match=r'objective\.target_latents: "mode" -> "sample"'):
        create_or_check(recipe(), run_folder, [])
    create_or_check(recipe("objective.target_latents=mode"), run_folder, [])
    written_before("objective.target_latents", "  target_latents: mode\n", run_folder)
    create_or_check(recipe("checkpoint.allow_changed=[objective.target_latents]"), run_folder, [])
    assert stored_recipe(run_folder).objective.target_latents == "sample"


def test_a_run_of_stage_2_that_began_before_has_no_reference_among_its_frames_and_the_clips_rates(run_folder):
    def stage2(*overrides):
        return load_recipe(DEMO.with_name("stage2.yaml"), overrides)

    before = ("objective.reference_first=false", "objective.fps=clip")
    create_or_check(stage2(*before), run_folder, [])
    written_before("objective.reference_first", "  reference_first: false\n", run_folder)
    written_before("objective.fps", "  fps: clip\n", run_folder)
    assert stored_recipe(run_folder) == stage2(*before)
    with pytest.raises(DifferentRecipeError, match=r"reference_first: false -> true\n.*fps: \"clip\" -> 7.0"):
        create_or_check(stage2("objective.reference_first=true", "objective.fps=7"), run_folder, [])
    create_or_check(stage2(*before), run_folder, [])


@pytest.mark.parametrize("task", ["prepare", "animate", "evaluate"])
def test_a_run_of_the_time_when_every_task_had_the_key_logging_still_loads_and_continues(task, run_folder, caplog):
    now = load_recipe(DEMO.with_name(f"{task}.yaml"))
    create_or_check(now, run_folder, [])
    stored = run_folder / "recipe.yaml"
    stored.write_text(stored.read_text() + "logging:\n  every_steps: 20\n")
    assert stored_recipe(run_folder) == readable_recipe(run_folder) == now
    create_or_check(now, run_folder, [])
    assert caplog.messages == []
    assert "logging" not in stored.read_text()


def test_keys_that_a_stored_recipe_lacks_are_named_with_their_present_values(run_folder, caplog):
    create_or_check(recipe(), run_folder, [])
    create_or_check(recipe("logging.every_steps=1"), run_folder, [])
    assert caplog.messages == []
    written_before("tf32", "tf32: false\n", run_folder)
    written_before("max_nonfinite_steps", "max_nonfinite_steps: 3\n", run_folder)
    create_or_check(recipe(), run_folder, [])
    (warning,) = caplog.messages
    assert f"{run_folder / 'recipe.yaml'} was written by an earlier version" in warning
    assert "from now on: " in warning
    assert warning.partition("from now on: ")[2].partition(". ")[0].split(", ") in (
        ["tf32=false", "max_nonfinite_steps=3"],
        ["max_nonfinite_steps=3", "tf32=false"],
    )


def test_a_stored_recipe_that_no_longer_loads_is_compared_by_its_values(run_folder):
    create_or_check(recipe(), run_folder, [])
    stored = run_folder / "recipe.yaml"
    stored.write_text(stored.read_text() + "forgotten_key: 1\n")
    with pytest.raises(DifferentRecipeError, match=r"forgotten_key: 1 -> \(not set\)"):
        create_or_check(recipe(), run_folder, [])


def test_recipes_of_another_task_differ(run_folder):
    other = load_recipe(DEMO.with_name("prepare.yaml"))
    changed = differences(recipe().model_dump(mode="json"), other.model_dump(mode="json"))
    assert changed["task"] == ('"stage1"', '"prepare"')
    assert changed["max_steps"] == ("2000", "(not set)")


def test_base_weights_are_hashed_once_and_others_do_not_continue_a_run(run_folder, tmp_path, monkeypatch):
    weights = tmp_path / "weights" / "unet"
    weights.mkdir(parents=True)
    file = weights / "model.safetensors"
    file.write_bytes(b"first")
    words = ["model.unet.config=null", f"model.unet.path={weights.parent}", "model.unet.subfolder=unet"]
    beside = weights.parent / "vae" / "model.safetensors"  # another network of the same folder
    beside.parent.mkdir()
    beside.write_bytes(b"first")
    words += ["model.autoencoder.patch_size=null", f"model.autoencoder.path={weights.parent}"]
    words += ["model.autoencoder.subfolder=vae", "model.pose_channels=[8, 8, 16, 16]", "data.height=64"]

    def digest(*permitted):
        create_or_check(recipe(*words, *permitted), run_folder, [])
        return json.loads((run_folder / "provenance.json").read_text())["starts"][-1]["base_weights"][str(file)][
            "sha256"
        ]

    assert digest() == hashlib.sha256(b"first").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr("dreamdance.runs.file_states.hash_file", lambda path: pytest.fail(f"{path} was read again"))
        assert digest() == hashlib.sha256(b"first").hexdigest()
    stamp = file.stat().st_mtime_ns
    file.write_bytes(b"other")
    os.utime(file, ns=(stamp, stamp))
    for _ in range(2):  # a refused start is not recorded
        with pytest.raises(DifferentRecipeError, match=r"began with another .*model.safetensors \(model.unet\): put"):
            digest()
    permitted = "checkpoint.allow_changed=[model.unet]"
    assert digest(permitted) == hashlib.sha256(b"other").hexdigest(), "the same size and time, but written to"
    beside.write_bytes(b"second")
    with pytest.raises(DifferentRecipeError, match=r"vae/model.safetensors \(model.autoencoder\): put"):
        digest(permitted)


def test_two_launchers_cannot_start_one_run_at_the_same_moment(run_folder):
    run_folder.mkdir(parents=True)
    start = time.monotonic()
    with (
        locked(run_folder),
        pytest.raises(UserError, match=r"another launcher has been starting .* for over 0 s") as raised,
    ):
        locked(run_folder, wait_seconds=0.2).__enter__()
    assert 0.2 <= time.monotonic() - start < 10
    assert is_transient(raised.value), "a job that did not find it may start again"
    with locked(run_folder):
        pass


def test_a_waiting_launcher_gets_the_lock_when_the_other_is_done(run_folder):
    run_folder.mkdir(parents=True)
    order = []

    def second():
        with locked(run_folder, wait_seconds=60):
            order.append("second")

    with ThreadPoolExecutor() as pool, locked(run_folder):
        waiting = pool.submit(second)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        order.append("first")
    assert order == ["first", "second"]


def test_a_job_does_not_recreate_a_removed_run_folder(run_folder):
    with pytest.raises(FileNotFoundError):
        record_job(run_folder, "7", ["a"])
    assert not run_folder.exists()


def test_a_job_waits_for_the_recipe_of_its_run(run_folder):
    create_or_check(recipe(), run_folder, [])
    hidden = run_folder.with_name("hidden")
    run_folder.rename(hidden)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(stored_recipe, run_folder)
        with pytest.raises(TimeoutError):
            reading.result(0.3)
        hidden.rename(run_folder)
        assert reading.result(20) == recipe()


def test_a_missing_stored_recipe_is_a_storage_error_and_a_wrong_one_is_an_error_of_the_user(run_folder, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.files.FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(OSError, match=r"its storage is away, or the run folder was removed.*demo/recipe\.yaml"):
        stored_recipe(run_folder)
    create_or_check(recipe(), run_folder, [])
    (run_folder / "recipe.yaml").write_text("task: nothing\n")
    with pytest.raises(RecipeError, match="unknown task 'nothing'"):
        stored_recipe(run_folder)


def test_a_run_of_prepare_without_a_clip_takes_other_videos_and_one_with_clips_names_both_words(tmp_path, run_folder):
    def prepare_recipe(*overrides):
        return load_recipe(DEMO.parents[1] / "prepare.yaml", [f"output={tmp_path / 'data'}", *overrides])

    create_or_check(prepare_recipe("videos.folder=wrong"), run_folder, [])
    create_or_check(prepare_recipe("videos.folder=right"), run_folder, [])
    assert load_recipe(run_folder / "recipe.yaml").videos.folder == "right"
    part = tmp_path / "data" / "train" / ".parts" / "a-1"
    part.mkdir(parents=True)
    (part / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    create_or_check(prepare_recipe("videos.folder=again"), run_folder, [])
    (part / "index.json").write_text(json.dumps({"version": 2, "shards": [{"samples": 1}]}))
    with pytest.raises(DifferentRecipeError) as caught:
        create_or_check(prepare_recipe("videos.folder=other"), run_folder, [])
    _, change, advice = str(caught.value).splitlines()
    assert change == '  videos.folder: "again" -> "other"'
    assert advice.startswith(f"{tmp_path / 'data'} has clips of that recipe: give this run another name and another ")
    assert "(name=... output=...)" in advice
