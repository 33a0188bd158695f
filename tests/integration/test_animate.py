"""Offline batch inference from a manifest to results: split over ranks, skipped when done, bad entries reported."""

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from support.recipes import HEIGHT, WIDTH
from support.tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline

import dreamdance
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.errors import CheckpointError, ManifestError, MissingInputError, RecipeError
from dreamdance.evaluation.clips import read_requested_ids
from dreamdance.inference.animate import AnimateError, _number_of, animate
from dreamdance.inference.entry_inputs import Size, load_inputs
from dreamdance.inference.manifest import read_entries
from dreamdance.launch.finished import digest_inputs, is_finished, mark_finished
from dreamdance.launch.job import free_port
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import write_video
from dreamdance.pipelines import DreamDancePipeline
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.runs.layout import progress_file
from dreamdance.runs.provenance import code_version
from dreamdance.runtime.sample_random import sample_generator

NUM_FRAMES = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with the exports of a finished stage 1 and stage 2, as training writes them."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_geometry_pipeline().save_pretrained(folder / "stage1" / "exports" / "step_00000004")
    tiny_animation_pipeline().save_pretrained(folder / "stage2" / "exports" / "step_00000004")
    tiny_animation_pipeline(controls=("pose",)).save_pretrained(folder / "pose_only" / "exports" / "step_00000002")
    return folder


@pytest.fixture
def job(tmp_path, runs):
    """Writes a manifest of dancers and runs the task on it."""
    return AnimateJob(tmp_path, runs)


class AnimateJob:
    def __init__(self, folder, runs) -> None:
        self.folder, self.runs, self.entries = folder, runs, []
        self.run_folder = runs / folder.name

    def add(self, entry_id: str, seed: int = 0, *, video: bool = False, **changes) -> None:
        """Adds a held-out dancer: its last frame is the reference, its own motion drives it."""
        clip = render_clip(HELD_OUT_SEEDS[seed], num_frames=NUM_FRAMES, width=WIDTH * 2, height=HEIGHT * 2)
        Image.fromarray(clip.rgb[-1]).save(self.folder / f"{entry_id}.png")
        entry = {"id": entry_id, "image": f"{entry_id}.png", "seed": seed, "reference_frame": NUM_FRAMES - 1}
        if video:
            drawings = draw_poses(clip.keypoints, width=WIDTH * 2, height=HEIGHT * 2)
            write_video(self.folder / f"{entry_id}.mkv", drawings, fps=10.0, lossless=True)
            entry["pose"] = f"{entry_id}.mkv"
        else:
            sequence = KeypointSequence(clip.keypoints, width=WIDTH * 2, height=HEIGHT * 2, fps=8.0)
            write_keypoint_file(self.folder / f"{entry_id}.json", sequence)
            entry["keypoints"] = f"{entry_id}.json"
        self.entries.append({**entry, **changes})

    def recipe(self, **changes) -> AnimateRecipe:
        values = {
            "task": "animate",
            "name": "tiny_animate",
            "manifest": str(self.folder / "manifest.jsonl"),
            "output": str(self.folder / "results"),
            "geometry_from": "stage1",
            "animation_from": "stage2",
            "geometry_width": WIDTH,
            "geometry_height": HEIGHT,
            "width": WIDTH * 2,
            "height": HEIGHT * 2,
            "precision": "fp32",
            "geometry": {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1},
            "animation": {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1},
            **changes,
        }
        return AnimateRecipe.model_validate_json(json.dumps(values))

    def write_manifest(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        (self.folder / "manifest.jsonl").write_text(lines)

    def run(self, **changes) -> None:
        self.write_manifest()
        animate(self.recipe(**changes), self.run_folder)

    def result(self, entry_id: str) -> dict:
        return json.loads((self.folder / "results" / entry_id / "result.json").read_text())

    def arrays(self, entry_id: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / "results" / entry_id / "arrays.npz", allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}

    def ages(self) -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in (self.folder / "results").glob("*/result.json")}


def test_a_result_holds_videos_arrays_a_contact_sheet_and_how_it_was_made(job):
    job.add("dancer", seed=3)
    before = os.umask(0o027)
    try:
        job.run()
    finally:
        os.umask(before)
    folder = job.folder / "results" / "dancer"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert {path.name for path in folder.iterdir()} == {
        "video.mp4",
        "side_by_side.mp4",
        "pose.mp4",
        "contact_sheet.png",
        "arrays.npz",
        "result.json",
    }
    arrays = job.arrays("dancer")
    assert (arrays["frames"].shape, arrays["frames"].dtype) == ((NUM_FRAMES, HEIGHT * 2, WIDTH * 2, 3), np.uint8)
    assert (arrays["normals"].shape, arrays["normals"].dtype) == ((NUM_FRAMES, HEIGHT, WIDTH, 3), np.float16)
    assert (arrays["depths"].shape, arrays["depths"].dtype) == ((NUM_FRAMES, HEIGHT, WIDTH), np.float16)
    np.testing.assert_allclose(np.linalg.norm(arrays["normals"].astype(np.float32), axis=-1), 1, atol=2e-3)
    for name in ("video.mp4", "side_by_side.mp4"):
        with av.open(str(folder / name)) as video:
            assert sum(1 for _ in video.decode(video=0)) == NUM_FRAMES
    sheet = Image.open(folder / "contact_sheet.png")
    assert sheet.height >= 4 * 192
    result = job.result("dancer")
    assert result["request"]["seed"] == 3
    assert result["request"]["geometry"]["guidance_scales"] == {"rgb": 2.5, "normal": 1.0, "depth": 1.5}
    assert result["exports"]["animation"].endswith("stage2/exports/step_00000004")
    assert {"torch", "diffusers", "dreamdance"} <= set(result["versions"])
    assert (result["fps"], result["reference_frame"], result["num_frames"]) == (8.0, NUM_FRAMES - 1, NUM_FRAMES)


def test_the_end_reports_seconds_per_frame_of_each_part_and_the_machine(job, caplog):
    job.add("dancer")
    with caplog.at_level(logging.INFO):
        job.run()
    result = job.result("dancer")
    for stage, network in (("geometry", "reference network"), ("geometry", "denoising"), ("animation", "ControlNet")):
        assert 0 < result["part_seconds"][stage][network] < result["seconds"]
    seconds = [value for parts in result["part_seconds"].values() for value in parts.values()]
    assert sum(seconds) <= result["seconds"]
    lines = [record.getMessage() for record in caplog.records if "s per frame" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["geometry guidance (stage 1)", "animation (stage 2)"]
    assert all(line.endswith(f"{NUM_FRAMES} frames on {result['machine']}") for line in lines)


@pytest.mark.slow
def test_finished_entries_are_skipped_and_changed_ones_are_done_again(job, runs):
    job.add("a")
    job.add("b", seed=1)
    job.run()
    first = job.ages()
    job.run()
    assert job.ages() == first
    job.entries[1]["seed"] = 7
    job.run()
    second = job.ages()
    assert second["a"] == first["a"]
    assert second["b"] > first["b"]
    Image.new("RGB", (32, 48), "red").save(job.folder / "a.png")
    job.run()
    assert job.ages()["a"] > second["a"]
    job.run(animation={"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1, "guidance_scale": 3.0})
    assert job.result("b")["request"]["animation"]["guidance_scale"] == 3.0
    assert not list((job.folder / "results").glob(".*"))


@pytest.mark.slow
def test_a_replaced_input_and_a_removed_result_are_detected_by_launcher_and_run(job):
    """A replaced file has the name, size and time of the old one; the result of a file that was only copied is kept."""
    for number, name in enumerate("abc"):
        job.add(name, seed=number, video=name == "c")
    with Image.open(job.folder / "a.png") as opened:
        opened.save(job.folder / "a.bmp")  # of the same size for any picture
    job.entries[0]["image"] = "a.bmp"
    job.run()
    mark_finished(job.recipe(), job.run_folder, digest_inputs(job.recipe(), job.run_folder.parent))
    assert is_finished(job.recipe(), job.run_folder)
    first = job.ages()

    picture = job.folder / "a.bmp"
    before = picture.stat()
    with Image.open(picture) as opened:
        other = np.asarray(opened).copy()
    other[0, 0] ^= 1
    Image.fromarray(other).save(picture)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not is_finished(job.recipe(), job.run_folder)
    job.run()
    assert is_finished(job.recipe(), job.run_folder)
    second = job.ages()
    assert second["a"] > first["a"]
    assert (second["b"], second["c"]) == (first["b"], first["c"])

    shutil.rmtree(job.folder / "results" / "b")
    (job.folder / "results" / "c" / "video.mp4").unlink()
    assert not is_finished(job.recipe(), job.run_folder)
    job.run()
    assert is_finished(job.recipe(), job.run_folder)
    assert job.ages()["a"] == second["a"]
    assert set(job.ages()) == {"a", "b", "c"}
    assert job.ages()["c"] > second["c"]

    shutil.copy(job.folder / "c.mkv", job.folder / "copy.mkv")
    (job.folder / "copy.mkv").replace(job.folder / "c.mkv")
    third = job.ages()
    assert is_finished(job.recipe(), job.run_folder), "the same content"
    job.run()
    assert job.ages() == third


def test_half_written_results_of_a_killed_run_are_made_again(job):
    job.add("a")
    (job.folder / "results" / ".a.partial").mkdir(parents=True)
    (job.folder / "results" / ".a.partial" / "arrays.npz").write_bytes(b"half")
    (job.folder / "results" / "a").mkdir()
    (job.folder / "results" / "a" / "result.json").write_text('{"request": {"see')
    job.run()
    assert job.arrays("a")["frames"].shape[0] == NUM_FRAMES
    assert [path.name for path in (job.folder / "results").iterdir()] == ["a"]


def test_other_weights_make_another_result(job, tmp_path):
    job.add("a")
    job.run(animation_from="pose_only")
    before = job.ages()
    tiny_animation_pipeline(controls=("pose",), seed=5).save_pretrained(tmp_path / "other_export")
    job.run(animation_from=str(tmp_path / "other_export"))
    assert job.ages()["a"] > before["a"]


def test_one_bad_entry_is_reported_and_the_others_are_done(job, caplog):
    job.add("good")
    job.add("no_picture", seed=1)
    job.add("no_such_file", seed=2, image="missing.png")
    job.add("bad_keypoints", seed=3)
    job.add("bad_video", seed=4, video=True)
    job.add("also_good", seed=5, video=True)
    (job.folder / "no_picture.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (job.folder / "bad_keypoints.json").write_text('{"frames": 3}')
    (job.folder / "bad_video.mkv").write_bytes(b"no video at all")
    with caplog.at_level(logging.ERROR), pytest.raises(AnimateError, match="4 of 6 entries failed") as caught:
        job.run()
    failed = {"no_picture", "no_such_file", "bad_keypoints", "bad_video"}
    failures = json.loads((job.run_folder / "failures.json").read_text())
    assert {failure["id"] for failure in failures} == failed
    assert all(name in str(caught.value) and name in caplog.text for name in failed)
    assert set(job.ages()) == {"good", "also_good"}
    assert job.result("also_good")["fps"] == pytest.approx(10.0)
    assert read_requested_ids(job.folder / "results") == failed | {"good", "also_good"}, (
        "evaluate must notice what is missing"
    )

    job.entries = [entry for entry in job.entries if entry["id"] not in failed]
    job.run()
    assert not (job.run_folder / "failures.json").exists()
    assert read_requested_ids(job.folder / "results") == set()


def test_the_id_of_an_entry_may_equal_the_name_of_one_of_our_files(job):
    names = ["failures.json", "FAILURES.JSON", "result.json"]
    for number, name in enumerate(names):
        job.add(name, seed=number)
    job.add("bad", image="missing.png")
    with pytest.raises(AnimateError, match="1 of 4 entries failed"):
        job.run(animation_from="pose_only", geometry_from=None)
    assert set(job.ages()) == set(names)
    assert [failure["id"] for failure in json.loads((job.run_folder / "failures.json").read_text())] == ["bad"]
    job.entries.pop()
    job.run(animation_from="pose_only", geometry_from=None)
    assert set(job.ages()) == set(names)
    assert not (job.run_folder / "failures.json").exists()


def test_without_git_a_computed_clip_is_kept_and_its_commit_is_unknown(job, monkeypatch):
    code_version.cache_clear()
    monkeypatch.setenv("PATH", str(job.folder))
    assert shutil.which("git") is None
    job.add("dancer")
    job.run(animation_from="pose_only", geometry_from=None)
    code_version.cache_clear()
    assert job.result("dancer")["versions"]["commit"] == "unknown"
    assert job.result("dancer")["versions"]["dreamdance"] == dreamdance.__version__


def test_a_wrong_manifest_stops_everything_before_networks_are_loaded(job):
    job.add("good")
    job.add("bad", align=True)
    with pytest.raises(ManifestError, match="reference_keypoints"):
        job.run(animation_from="never_trained")
    assert not (job.folder / "results").exists()


def test_results_depend_on_seed_and_id_and_not_on_other_entries_of_the_manifest(job):
    job.add("a", seed=1)
    job.add("b", seed=1)
    job.run()
    together = {name: job.arrays(name) for name in ("a", "b")}
    assert not np.array_equal(together["a"]["frames"], together["b"]["frames"])
    job.entries.pop(0)
    job.run(output=str(job.folder / "alone"))
    with np.load(job.folder / "alone" / "b" / "arrays.npz") as alone:
        assert all(np.array_equal(alone[name], together["b"][name]) for name in alone.files)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_the_entries_and_the_failures_of_all_end_the_command(job):
    """Two real processes: the one without a failure of its own reports the failure, when both are done."""
    for index in range(3):
        job.add(f"clip_{index}", seed=index)
    job.entries[1]["image"] = "missing.png"
    job.write_manifest()
    (job.folder / "recipe.json").write_text(job.recipe().model_dump_json())
    program = (
        "import sys; from pathlib import Path; from dreamdance.errors import UserError\n"
        "from dreamdance.inference.animate import animate; from dreamdance.recipe.schema import AnimateRecipe\n"
        "recipe = AnimateRecipe.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "try:\n    animate(recipe, Path(sys.argv[2]))\nexcept UserError as error:\n    sys.exit(str(error))"
    )
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(job.folder / "recipe.json"), str(job.run_folder)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **ranks, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 0], errors
    assert re.search(r"1 of 3 entries failed.*\n.*clip_1 \(line 2\)", errors[0])
    assert set(job.ages()) == {"clip_0", "clip_2"}
    reports = [json.loads(line) for line in progress_file(job.run_folder).read_text().splitlines()]
    assert reports[-1]["done"] == reports[-1]["total"] == 3


def test_a_pose_only_controller_runs_without_stage_1(job):
    job.add("dancer")
    job.run(geometry_from=None, animation_from="pose_only")
    assert set(job.arrays("dancer")) == {"frames"}
    with pytest.raises(RecipeError, match="give geometry_from"):
        job.run(geometry_from=None)


def test_a_stage_2_that_needs_the_references_pose_gets_it_and_its_maps_as_in_the_joint_pipeline(job, runs):
    """Drawings, maps and frames have one size here, so that the joint pipeline gets the same pixels."""
    anchored = tiny_animation_pipeline()
    anchored.controlnet.register_to_config(reference_first=True, trained_fps=7.0)
    anchored.save_pretrained(runs / "anchored" / "exports" / "step_00000004")
    job.add("frame")
    sizes = {"geometry_width": WIDTH * 2, "geometry_height": HEIGHT * 2}
    job.run(animation_from="anchored", **sizes)
    request = job.result("frame")["request"]
    assert (request["reference_pose_from"], request["reference_frame"]) == ("reference_frame", NUM_FRAMES - 1)

    (entry,) = read_entries(job.folder / "manifest.jsonl")
    size = Size(WIDTH * 2, HEIGHT * 2)
    inputs = load_inputs(entry, aspect=size, pose_sizes={size})
    both = DreamDancePipeline.from_stages(tiny_geometry_pipeline(), anchored)
    both.set_progress_bar_config(disable=True)
    expected = both(
        inputs.reference,
        inputs.poses[size],
        reference_pose=inputs.poses[size][NUM_FRAMES - 1],
        height=size.height,
        width=size.width,
        **sizes,
        num_inference_steps=1,
        window_frames=4,
        window_overlap=1,
        generator=sample_generator((entry.seed, 0, _number_of("frame")), "animate"),
        output_type="np",
    )
    found = job.arrays("frame")
    assert found["frames"].shape == (NUM_FRAMES, size.height, size.width, 3)
    np.testing.assert_array_equal(found["frames"], np.rint(expected.frames[0] * 255).astype(np.uint8))
    done = job.ages()
    job.run(animation_from="anchored", **sizes)
    assert job.ages() == done


def test_a_run_that_is_not_there_is_named_with_its_key(job):
    job.add("dancer")
    with pytest.raises(MissingInputError, match="geometry_from: run 'nowhere' does not exist"):
        job.run(geometry_from="nowhere")


def test_an_export_of_the_other_stage_is_refused_with_its_key(job, runs):
    job.add("dancer")
    with pytest.raises(RecipeError, match=r"geometry_from: .* is an export of AnimationPipeline, but GeometryPipeline"):
        job.run(geometry_from="stage2")
    with pytest.raises(RecipeError, match=r"animation_from: .* is an export of GeometryPipeline"):
        job.run(animation_from="stage1")
    damaged = runs / "damaged" / "exports" / "step_00000001"
    damaged.mkdir(parents=True)
    (damaged / "model_index.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"animation_from: .* is damaged"):
        job.run(animation_from="damaged")


def test_sizes_and_windows_that_the_networks_cannot_do_are_refused_together_before_anything_runs(job):
    job.add("dancer")
    geometry = {"num_inference_steps": 1, "window_frames": 20, "window_overlap": 1}
    with pytest.raises(RecipeError) as refused:
        job.run(width=WIDTH * 2 + 1, geometry_height=HEIGHT + 1, geometry=geometry)
    problems = str(refused.value).splitlines()
    assert [line.split()[0] for line in problems] == ["width", "geometry_height", "geometry.window_frames"]
    assert "more than the 16 frames" in problems[2]
    assert job.ages() == {}


@pytest.mark.parametrize("align", [True, "bones"])
def test_an_aligned_skeleton_is_drawn_at_the_size_of_the_reference(job, align):
    job.add("plain")
    job.add("aligned")
    body = json.loads((job.folder / "aligned.json").read_text())
    points = np.array(body["frames"][0]["keypoints"])
    points[:, :2] = points[:, :2] * 0.5 + 0.25
    body["frames"] = [{"keypoints": points.tolist()}]
    (job.folder / "body.json").write_text(json.dumps(body))
    job.entries[1].update(align=align, reference_keypoints="body.json")
    job.write_manifest()
    size = Size(WIDTH * 2, HEIGHT * 2)
    heights = []
    for entry in read_entries(job.folder / "manifest.jsonl"):
        drawing = load_inputs(entry, aspect=size, pose_sizes={size}).poses[size][0]
        rows = (drawing.amax(dim=0) > 0.1).any(dim=1).nonzero()
        heights.append(int(rows.max() - rows.min() + 1))
    assert heights[1] == pytest.approx(heights[0] / 2, abs=3)


def test_pictures_of_another_aspect_lose_their_margins_evenly_and_keypoints_with_them(job):
    """A wide picture with bars left and right: the middle is kept, also of the drawing."""
    job.add("dancer")
    size = Size(WIDTH * 2, HEIGHT * 2)
    job.write_manifest()
    (entry,) = read_entries(job.folder / "manifest.jsonl")
    expected = load_inputs(entry, aspect=size, pose_sizes={size})
    picture = np.asarray(Image.open(entry.image))
    Image.fromarray(np.pad(picture, [(0, 0), (WIDTH, WIDTH), (0, 0)])).save(entry.image)
    points = json.loads(entry.keypoints.read_text())
    points["width"] *= 2
    for frame in points["frames"]:
        frame["keypoints"] = [[x / 2 + 0.25, y, confidence] for x, y, confidence in frame["keypoints"]]
    entry.keypoints.write_text(json.dumps(points))
    cut = load_inputs(entry, aspect=size, pose_sizes={size})
    assert torch.equal(cut.reference, expected.reference)
    assert (cut.poses[size] - expected.poses[size]).abs().mean() < 0.02
