"""A run is finished when its output exists and its inputs have not changed since."""

import json
import os
import shutil
from pathlib import Path

import pytest

from dreamdance.data.shards.index import DETAILS_KEY
from dreamdance.launch.finished import digest_inputs, is_finished, mark_finished
from dreamdance.recipe import TrainingRecipe, load_recipe
from dreamdance.recipe.parse import TASKS
from dreamdance.runs.file_notes import of_content, write_note
from dreamdance.runs.file_states import read_state
from dreamdance.runs.layout import export_folder

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    return folder


def test_training_that_was_stopped_early_is_not_marked(run_folder):
    recipe = load_recipe(DEMO / "stage2.yaml")
    assert not mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    export_folder(run_folder, recipe.max_steps - 1).mkdir(parents=True)
    assert not mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert not is_finished(recipe, run_folder)


def test_training_is_finished_with_the_export_of_its_last_step(run_folder):
    recipe = load_recipe(DEMO / "stage2.yaml")
    export_folder(run_folder, recipe.max_steps).mkdir(parents=True)
    assert not is_finished(recipe, run_folder), "a run killed between export and marker runs its end again"
    assert mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder)


def test_a_raised_max_steps_makes_a_finished_run_unfinished(run_folder):
    recipe = load_recipe(DEMO / "stage2.yaml")
    export_folder(run_folder, recipe.max_steps).mkdir(parents=True)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert not is_finished(load_recipe(DEMO / "stage2.yaml", [f"max_steps={recipe.max_steps + 1}"]), run_folder)


def note(run_folder: Path, *read: Path) -> None:
    """Writes the note that `animate` and `evaluate` write into the run folder after reading these files."""
    states = {path: read_state(path) for path in read}
    write_note(run_folder, {path: of_content(state) for path, state in states.items() if state is not None})


@pytest.fixture
def picture(tmp_path):
    """A file that an entry of a manifest names."""
    path = tmp_path / "a.png"
    path.write_bytes(b"one picture")
    return path


def test_animate_runs_again_when_its_manifest_or_a_run_that_it_uses_has_changed(run_folder, tmp_path, picture):
    manifest, output = tmp_path / "manifest.jsonl", tmp_path / "out"
    manifest.write_text(json.dumps({"id": "a"}) + "\n")
    output.mkdir()
    recipe = load_recipe(DEMO / "animate.yaml", [f"manifest={manifest}", f"output={output}"])
    note(run_folder, picture)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder)
    with manifest.open("a") as lines:
        lines.write(json.dumps({"id": "b"}) + "\n")
    assert not is_finished(recipe, run_folder)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder)
    export_folder(run_folder.parent / recipe.animation_from, 7).mkdir(parents=True)
    assert not is_finished(recipe, run_folder)


def test_animate_runs_again_when_a_file_that_it_read_was_replaced_by_one_of_the_same_size_and_time(
    run_folder, tmp_path, picture
):
    manifest, output = tmp_path / "manifest.jsonl", tmp_path / "out"
    manifest.write_bytes(b"\xff this is no text, which the run reports\n")
    output.mkdir()
    recipe = load_recipe(DEMO / "animate.yaml", [f"manifest={manifest}", f"output={output}"])
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert not is_finished(recipe, run_folder), "no note contains its inputs"
    note(run_folder, picture)
    assert is_finished(recipe, run_folder)
    times = picture.stat()
    picture.write_bytes(b"two picture")
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_finished(recipe, run_folder)


@pytest.mark.parametrize("task", [task for task, kind in TASKS.items() if not issubclass(kind, TrainingRecipe)])
def test_files_added_during_a_run_make_it_unfinished(run_folder, tmp_path, picture, task):
    output, given = tmp_path / "out", tmp_path / "given"
    prepared(output)
    (output / "index.json").write_text('{"shards": []}')  # of latents
    given.mkdir()
    words = {
        "animate": [f"manifest={given / 'manifest.jsonl'}", f"output={output}"],
        "prepare": [f"videos.folder={given}", f"output={output}"],
        "encode": [f"shards.local={given}", f"output={output}"],
        "evaluate": [f"results={given}"],
    }
    recipe = load_recipe(DEMO.parent / f"{task}.yaml", words[task])

    def add(name: str) -> None:
        with (given / "manifest.jsonl").open("a") as lines:
            lines.write(json.dumps({"id": name}) + "\n")
        (given / f"{name}.rgb.mp4").write_bytes(b"a dance")
        (given / name).mkdir()
        (given / name / "result.json").write_text("{}")
        (given / "index.json").write_text(json.dumps({"shards": [name]}))

    add("a")
    inputs = digest_inputs(recipe, run_folder.parent)
    note(run_folder, picture)
    mark_finished(recipe, run_folder, inputs)
    assert is_finished(recipe, run_folder)
    add("late")
    mark_finished(recipe, run_folder, inputs)
    assert not is_finished(recipe, run_folder)


def test_animate_is_finished_from_any_working_folder(run_folder, tmp_path, picture, monkeypatch):
    """`status` names runs from the working directory, the job by their full path."""
    manifest, output = tmp_path / "manifest.jsonl", tmp_path / "results"
    manifest.write_text('{"id": "a"}\n')
    output.mkdir()
    recipe = load_recipe(DEMO / "animate.yaml", [f"manifest={manifest}", f"output={output}"])
    (run_folder.parent / recipe.geometry_from / "exports" / "step_00000200").mkdir(parents=True)
    note(run_folder, picture)
    assert mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    monkeypatch.chdir(run_folder.parent.parent)
    assert is_finished(recipe, run_folder.relative_to(run_folder.parent.parent))


def test_animate_runs_again_when_an_export_that_it_is_given_as_a_folder_has_changed(run_folder, tmp_path, picture):
    index, output = tmp_path / "stage2" / "model_index.json", tmp_path / "out"
    for folder in (index.parent, output):
        folder.mkdir()
    index.write_text("{}")
    words = [f"manifest={tmp_path / 'none'}", f"output={output}", f"animation_from={index.parent}"]
    recipe = load_recipe(DEMO / "animate.yaml", words)
    note(run_folder, picture)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder)
    index.write_text('{"_class_name": "AnimationPipeline"}')
    assert not is_finished(recipe, run_folder)


def test_evaluate_runs_again_when_a_result_came_went_or_changed(run_folder, tmp_path):
    results = [tmp_path / "results" / name / "result.json" for name in "ab"]
    for result in results:
        result.parent.mkdir(parents=True)
        result.write_text("{}")
    recipe = load_recipe(DEMO / "evaluate.yaml", [f"results={tmp_path / 'results'}"])
    note(run_folder, *results)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    (tmp_path / "results" / ".c.partial").mkdir()
    (tmp_path / "results" / ".c.partial" / "result.json").write_text("{}")
    assert is_finished(recipe, run_folder)
    results[0].write_text('{"seed": 1}')
    assert not is_finished(recipe, run_folder)
    results[0].write_text("{}")
    assert is_finished(recipe, run_folder), "the same content again"
    (tmp_path / "results" / ".c.partial").rename(tmp_path / "results" / "c")
    assert not is_finished(recipe, run_folder)
    shutil.rmtree(tmp_path / "results" / "c")
    assert is_finished(recipe, run_folder)
    shutil.rmtree(tmp_path / "results" / "b")
    assert not is_finished(recipe, run_folder)


def prepared(output: Path) -> None:
    """The part of `prepare`'s output that decides whether a run is finished: one shard per split, and one example."""
    for split in ("train", "validation"):
        (output / split).mkdir(parents=True)
        (output / split / "part_00000.mds").touch()
        shard = {"raw_data": {"basename": "part_00000.mds"}, "zip_data": None}
        (output / split / "index.json").write_text(json.dumps({"shards": [shard]}))
    (output / "examples" / "a").mkdir(parents=True)
    for name in ("reference.png", "pose.mkv"):
        (output / "examples" / "a" / name).touch()
    entry = {"id": "a", "image": "examples/a/reference.png", "pose": "examples/a/pose.mkv"}
    (output / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
    (output / "inputs.json").write_text("{}")


@pytest.mark.parametrize(
    "removed",
    [
        ".",
        "train",
        "validation/index.json",
        "train/part_00000.mds",
        "manifest.jsonl",
        "examples",
        "examples/a/pose.mkv",
    ],
)
def test_prepare_is_not_finished_when_some_of_its_output_was_removed(run_folder, tmp_path, removed):
    output = tmp_path / "data"
    prepared(output)
    recipe = load_recipe(DEMO / "prepare.yaml", [f"output={output}"])
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder)
    path = output / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_finished(recipe, run_folder)


def test_dancers_rendered_before_a_map_was_added_are_not_finished(run_folder, tmp_path, monkeypatch):
    prepared(tmp_path / "data")
    recipe = load_recipe(DEMO / "prepare.yaml", [f"output={tmp_path / 'data'}"])
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert is_finished(recipe, run_folder), "indices of older commits list no maps"
    monkeypatch.setattr("dreamdance.launch.prepared.ADDED_TO_DANCERS", ("legs",))
    assert not is_finished(recipe, run_folder)
    for split in ("train", "validation"):
        path = tmp_path / "data" / split / "index.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {DETAILS_KEY: {"settings": {"added_maps": ["legs"]}}})
        )
    assert is_finished(recipe, run_folder)


def test_prepare_runs_again_when_a_video_was_replaced_by_one_of_the_same_size_and_time(run_folder, tmp_path):
    prepared(tmp_path / "data")
    video = tmp_path / "videos" / "a.rgb.mp4"
    video.parent.mkdir()
    video.write_bytes(b"one dance")
    (video.parent / "b.rgb.mp4").symlink_to("nowhere")  # is reported when prepare runs, and does not end the check here
    words = [f"output={tmp_path / 'data'}", f"videos.folder={video.parent}"]
    recipe = load_recipe(DEMO.parent / "prepare.yaml", words)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    (video.parent / "._a.rgb.mp4").write_bytes(b"left by macOS")
    assert is_finished(recipe, run_folder)
    times, noted = video.stat(), read_state(video)
    (tmp_path / "data" / "inputs.json").write_text(json.dumps({video.name: noted.to_json()}))
    assert is_finished(recipe, run_folder)
    video.write_bytes(b"two dance")
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_finished(recipe, run_folder)
    mark_finished(recipe, run_folder, digest_inputs(recipe, run_folder.parent))
    assert not is_finished(recipe, run_folder), "it was replaced after it had been read, during the run"
