"""Files of commit 5194bb1 still load, or are refused with the command or keys that load them.

`older_files/files.tar.xz` contains the output of that commit's commands; `older_files/make.sh` makes it again.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.tool_modules import load_tool

from dreamdance.evaluation.clips import open_clips
from dreamdance.evaluation.trivial import FACING_CAMERA
from dreamdance.launch.command import main
from dreamdance.media.keypoints import read_keypoint_file
from dreamdance.pipelines import AnimationPipeline, DreamDancePipeline, GeometryPipeline
from dreamdance.recipe.sections import Shards

FILES = Path(__file__).parent / "older_files"
# That commit used the mode of the autoencoder's distribution; today's default is a sample.
FORMER_TARGETS = "objective.target_latents=mode"
# Stage 2 had no reference among the frames, and each clip's own frame rate.
FORMER_STAGE2 = (FORMER_TARGETS, "objective.reference_first=false", "objective.fps=clip")
DANCER = "dancer_1000000000"
GEOMETRY_EXPORT, ANIMATION_EXPORT = "older_domains/exports/step_00000002", "older_animation/exports/step_00000001"
NETWORKS = {
    GEOMETRY_EXPORT: ("unet", "reference_unet", "pose_encoder", "vae"),
    ANIMATION_EXPORT: ("unet", "controlnet", "controller", "vae"),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_environment", "one_thread")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder that the commands ran in: `data`, `runs`, `results`, `base`, and `continued`."""
    shutil.unpack_archive(FILES / "files.tar.xz", tmp_path)
    shutil.copytree(FILES / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs the command in this process; returns its exit code and its output."""

    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--cluster", "debug"], lambda *_: "")
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def reports(log: Path, key: str) -> list[dict]:
    """The lines of a progress log that have a key."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if key in line]


def losses_by_step(log: Path) -> dict[int, float]:
    """The losses of the last start that trained a step."""
    return {line["done"]: line["loss"] for line in reports(log, "loss")}


def assert_same_weights(folder: Path, expected: Path) -> None:
    """On the machine that made the files, values are the same bit for bit; other machines round differently."""
    for network in NETWORKS[GEOMETRY_EXPORT]:
        name = f"{network}/diffusion_pytorch_model.safetensors"
        torch.testing.assert_close(load_file(folder / name), load_file(expected / name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words", [("prepare",), ("domains", FORMER_TARGETS), ("animation", *FORMER_STAGE2)])
def test_a_finished_run_is_reported_as_finished_and_left_unchanged(command, folder, words):
    recipe, *changes = words
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".launch_lock"}
    code, output = command(f"recipes/{recipe}.yaml", *changes)
    assert code == 0
    assert f"older_{recipe} is finished" in output
    files = [path for path in before if path.is_file()]
    assert {path: path.stat().st_mtime_ns for path in files} == {path: before[path] for path in files}


def test_status_shows_all_runs(command):
    code, output = command("status")
    assert code == 0
    states = {line.split()[0]: line for line in output.splitlines()[1:]}
    assert len(states) == 6
    assert "finished" in states["older_domains"]
    assert "step 4/12" in states["older_geometry"]


def test_a_run_whose_default_has_changed_since_is_refused_with_the_key_that_resumes_it(command):
    code, output = command("recipes/geometry.yaml")
    assert code == 3
    assert 'objective.target_latents: "mode" -> "sample"' in output
    assert "checkpoint.allow_changed=[objective.target_latents]" in output


def test_the_stored_clips_are_those_that_were_written(folder):
    """The example beside the shards was made from the same clip: its last frame, and its key points."""
    (clip,) = open_clips(Shards(local=str(folder / "data" / "validation")))
    sample = open_clips(Shards(local=str(folder / "data" / "validation"))).clip(0)
    example = folder / "data" / "examples" / DANCER
    assert (clip["clip_id"], sample.clip_id, sample.num_frames, sample.fps) == (DANCER, DANCER, 6, 8.0)
    np.testing.assert_array_equal(sample.frames("rgb", [5])[0], np.asarray(Image.open(example / "reference.png")))
    points = read_keypoint_file(example / "keypoints.json").keypoints
    np.testing.assert_allclose(sample.keypoints, points, atol=1e-4)


def test_exports_open_as_pipelines_with_the_weights_that_they_hold(folder):
    pipelines = {
        GEOMETRY_EXPORT: GeometryPipeline.from_pretrained(folder / "runs" / GEOMETRY_EXPORT),
        ANIMATION_EXPORT: AnimationPipeline.from_pretrained(folder / "runs" / ANIMATION_EXPORT),
    }
    for export, pipeline in pipelines.items():
        for network in NETWORKS[export]:
            held = load_file(folder / "runs" / export / network / "diffusion_pytorch_model.safetensors")
            torch.testing.assert_close(getattr(pipeline, network).state_dict(), held, rtol=0, atol=0)
    both = DreamDancePipeline.from_stages(pipelines[GEOMETRY_EXPORT], pipelines[ANIMATION_EXPORT])
    image, poses = torch.rand(3, 32, 16), torch.rand(4, 3, 32, 16)
    sizes = {"height": 32, "width": 16, "geometry_height": 32, "geometry_width": 16}
    frames = both(image, poses, **sizes, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 32, 16)
    assert torch.isfinite(frames).all()


def test_animate_makes_the_same_pictures_of_the_exports(command, folder):
    stored = folder / "results" / DANCER / "arrays.npz"
    with np.load(stored, allow_pickle=False) as arrays:
        before = {name: arrays[name].astype(np.float32) for name in arrays.files}
    code, _ = command("recipes/animate.yaml", "output=again")
    assert code == 3  # the run has its own output; another run may use a different one
    code, output = command("recipes/animate.yaml", "name=again", "output=again")
    assert code == 0, output
    with np.load(folder / "again" / DANCER / "arrays.npz", allow_pickle=False) as arrays:
        after = {name: arrays[name].astype(np.float32) for name in arrays.files}
    assert after.keys() == before.keys() == {"frames", "normals", "depths"}
    np.testing.assert_allclose(after["frames"], before["frames"], atol=1)
    for name in ("normals", "depths"):
        np.testing.assert_allclose(after[name], before[name], atol=2e-3)


def test_evaluate_measures_the_results_as_it_did(command, folder):
    table = folder / "runs" / "older_evaluate" / "table.json"
    before = json.loads(table.read_text(encoding="utf-8"))
    table.unlink()
    code, output = command("recipes/evaluate.yaml")
    assert code == 0, output
    after = json.loads(table.read_text(encoding="utf-8"))
    assert after["rows"].keys() == before["rows"].keys() | {FACING_CAMERA}  # which came later
    for row, scores in before["rows"].items():
        kept = {key: value for key, value in scores.items() if "disco" not in key}  # those were not at 256x256 then
        assert {key: after["rows"][row].get(key) for key in kept} == pytest.approx(kept, rel=1e-5), row


def test_a_training_starts_from_an_export_as_it_did(command, folder):
    """Its first loss equals that of the run that the old commit started from that export."""
    code, output = command("recipes/geometry.yaml", FORMER_TARGETS, "name=again", "max_steps=1")
    assert code == 0, output
    first = losses_by_step(folder / "continued" / "logs" / "progress.jsonl")[1]
    assert losses_by_step(folder / "runs" / "again" / "logs" / "progress.jsonl")[1] == pytest.approx(first, rel=1e-5)


# The two tests of checkpoints: DeepSpeed's files with weights, masters and moments, which a command converts.


@pytest.fixture
def convert(capsys):
    """Runs the command that an error names, in this process."""
    module = load_tool("convert_checkpoint")

    def run(output: str) -> str:
        (named,) = set(re.findall(r"`python tools/convert_checkpoint\.py ([^`]+)`", output))
        assert module.main([named]) == 0
        return capsys.readouterr().out

    return run


def test_a_stopped_training_resumes_and_ends_with_the_same_weights(command, convert, folder):
    run = folder / "runs" / "older_geometry"
    shutil.move(run / "logs", run / "logs_then")
    code, output = command("recipes/geometry.yaml", FORMER_TARGETS)
    assert code == 1
    assert "step_00000004 was saved by another version of this software: its format is 2, not 3" in output
    shutil.rmtree(run / "logs")
    converted = convert(output).splitlines()
    assert [line.rpartition("/")[2] for line in converted] == ["step_00000002: converted", "step_00000004: converted"]
    code, output = command("recipes/geometry.yaml", FORMER_TARGETS)
    assert code == 0, output
    log = run / "logs" / "progress.jsonl"
    messages = [line["message"] for line in reports(log, "message")]
    assert "from step 4 (epoch 4, sample 0 of 9; verified 2 files" in messages[0]
    then = losses_by_step(folder / "continued" / "logs" / "progress.jsonl")
    assert losses_by_step(log) == pytest.approx({step: then[step] for step in range(5, 13)}, rel=1e-5)
    assert_same_weights(run / "exports" / "step_00000012", folder / "continued" / "exports" / "step_00000012")


def test_a_finished_training_of_two_ranks_continues_with_more_steps_on_one(command, convert, folder):
    words, run = (FORMER_TARGETS, "max_steps=3", "cluster.tasks_per_node=1"), folder / "runs" / "older_domains"
    code, output = command("recipes/domains.yaml", *words)
    assert code == 1
    shutil.rmtree(run / "logs")  # a failed debug job counts as running while its process, this one, is running
    assert convert(output).endswith("step_00000002: converted\n")
    code, output = command("recipes/domains.yaml", *words)
    assert code == 0, output
    messages = [line["message"] for line in reports(run / "logs" / "progress.jsonl", "message")]
    assert any("from step 2 " in text and "saved by 2 ranks and redistributed" in text for text in messages)
    assert (run / "exports" / "step_00000003" / "model_index.json").is_file()
