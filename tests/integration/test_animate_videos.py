"""`animate` with driving videos: the same results as from the true key points, kept key points, sound, clear errors."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from support.exact_annotator import EXACT, NAME
from support.recipes import HEIGHT, WIDTH
from support.sounds import sound_packets, write_video_with_sound
from support.tiny_pipelines import tiny_animation_pipeline

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.errors import MissingInputError, UserError
from dreamdance.inference.animate import AnimateError, animate
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import write_video
from dreamdance.pipelines.driving_video import poses_from_video
from dreamdance.recipe.schema import AnimateRecipe

NUM_FRAMES, FPS = 5, 8
SIZE = {"width": WIDTH * 2, "height": HEIGHT * 2}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "pose_only"
    tiny_animation_pipeline(controls=("pose",)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dancers():
    """Two dancers; each motion drives, each first frame is a reference. The annotator knows all of them."""
    clips = [render_clip(seed, num_frames=NUM_FRAMES, fps=FPS, **SIZE) for seed in HELD_OUT_SEEDS[10:12]]
    for clip in clips:
        clip.keypoints[...] = clip.keypoints.round(6)  # as key-point files store them
        EXACT.learn(clip.rgb, clip.keypoints)
    return clips


@pytest.fixture
def job(tmp_path, export, dancers):
    return Job(tmp_path, export, dancers)


class Job:
    """Files of two dancers: pictures, key points, and videos with sound."""

    def __init__(self, folder, export, dancers) -> None:
        self.folder, self.export = folder, export
        for name, clip in zip("ab", dancers, strict=True):
            Image.fromarray(clip.rgb[0]).save(folder / f"{name}.png")
            write_keypoint_file(folder / f"{name}.json", KeypointSequence(clip.keypoints, fps=FPS, **SIZE))
            write_video_with_sound(folder / f"{name}.mp4", clip.rgb, fps=FPS, codec="aac", seconds=3.0)

    def run(self, *entries: dict, output: str = "results", **annotators) -> None:
        lines = [json.dumps({"id": "x", "image": "a.png", **entry}) + "\n" for entry in entries]
        (self.folder / "manifest.jsonl").write_text("".join(lines))
        sampling = {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1}
        recipe = {
            "task": "animate",
            "name": "driven",
            "manifest": str(self.folder / "manifest.jsonl"),
            "output": str(self.folder / output),
            "animation_from": str(self.export),
            **SIZE,
            "geometry_width": SIZE["width"],
            "geometry_height": SIZE["height"],
            "precision": "fp32",
            "animation": sampling,
            "annotators": {"pose": NAME, "smooth": False, **annotators},
        }
        animate(AnimateRecipe.model_validate_json(json.dumps(recipe)), self.folder / "run")

    def frames(self, output: str = "results", name: str = "x"):
        with np.load(self.folder / output / name / "arrays.npz", allow_pickle=False) as stored:
            return stored["frames"]

    def kept(self, output: str = "results") -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (self.folder / output / ".keypoints").iterdir()}


@pytest.mark.parametrize("align", [False, "scale", "bones"])
def test_a_video_gives_the_result_of_its_true_key_points(job, align):
    job.run({"video": "b.mp4", "align": align})
    job.run({"keypoints": "b.json", "align": align, "reference_keypoints": "a.json"}, output="given")
    np.testing.assert_array_equal(job.frames(), job.frames("given"))
    described = json.loads((job.folder / "results" / "x" / "result.json").read_text())
    assert (described["fps"], described["num_frames"]) == (pytest.approx(FPS), NUM_FRAMES)
    assert len(job.kept()) == (2 if align else 1)  # the picture is searched only where its body is needed


def test_the_result_has_the_sound_of_the_animated_span(job):
    job.run({"video": "b.mp4"})
    expected = [packet for packet in sound_packets(job.folder / "b.mp4") if packet[0] < NUM_FRAMES / FPS]
    found = sound_packets(job.folder / "results" / "x" / "video.mp4")
    assert [content for _, content in found] == [content for _, content in expected]
    assert json.loads((job.folder / "results" / "x" / "result.json").read_text())["sound"] == "copied (aac)"


def test_a_video_is_searched_once_for_all_entries_and_runs(job):
    job.run({"video": "b.mp4"}, {"id": "y", "image": "b.png", "video": "b.mp4"})
    seen, kept = EXACT.frames_seen, job.kept()
    assert len(kept) == 1
    (job.folder / "copy.mp4").write_bytes((job.folder / "b.mp4").read_bytes())
    job.run({"id": "z", "video": "copy.mp4", "seed": 5}, smooth=True)
    assert (EXACT.frames_seen, job.kept()) == (seen, kept)
    next((job.folder / "results" / ".keypoints").iterdir()).write_bytes(b"half a file")
    job.run({"id": "w", "video": "b.mp4"})
    assert EXACT.frames_seen == seen + NUM_FRAMES
    np.testing.assert_array_equal(job.kept().keys(), kept.keys())


def test_another_person_or_rate_makes_the_entry_again(job):
    result = job.folder / "results" / "x" / "result.json"
    for number, entry in enumerate(({}, {"person": [0, 0, 1, 1]}, {"fps": 4})):
        job.run({"video": "b.mp4", **entry})
        before = result.stat().st_mtime_ns
        job.run({"video": "b.mp4", **entry})
        assert result.stat().st_mtime_ns == before
        assert len(job.kept()) == number + 1
    assert len(job.frames()) == 3  # frames 0, 2 and 4


def test_person_0_is_the_person_of_no_choice_and_makes_nothing_again(job):
    result = job.folder / "results" / "x" / "result.json"
    job.run({"video": "b.mp4"})
    before, seen = result.stat().st_mtime_ns, EXACT.frames_seen
    job.run({"video": "b.mp4", "person": 0})
    assert (result.stat().st_mtime_ns, EXACT.frames_seen, len(job.kept())) == (before, seen, 1)
    job.run({"video": "b.mp4", "person": 0}, person=[0, 0, 1, 1])  # the entry wins over the recipe's box
    assert (EXACT.frames_seen, len(job.kept())) == (seen, 1)


def test_person_chooses_one_of_two_dancers(job, dancers):
    """The dancers stand side by side; the right one is chosen by its box, by the entry and by the recipe."""
    both = np.concatenate([clip.rgb for clip in dancers], axis=2)
    people = []
    for side, clip in enumerate(dancers):
        points = clip.keypoints.copy()
        points[..., 0] = points[..., 0] / 2 + side / 2
        people.append(points)
    EXACT.learn(both, *people)
    write_video(job.folder / "both.mkv", both, fps=FPS, lossless=True)
    wide = KeypointSequence(people[1], width=2 * SIZE["width"], height=SIZE["height"], fps=FPS)
    write_keypoint_file(job.folder / "right.json", wide)
    body = {"align": "scale", "reference_keypoints": "a.json"}
    job.run({"keypoints": "right.json", **body}, output="given")
    job.run({"video": "both.mkv", "align": "scale", "person": [0.5, 0, 1, 1]})
    np.testing.assert_array_equal(job.frames(), job.frames("given"))
    job.run({"video": "both.mkv", "align": "scale"}, output="by_recipe", person=[0.5, 0, 1, 1])
    np.testing.assert_array_equal(job.frames("by_recipe"), job.frames("given"))
    with pytest.raises(AnimateError, match=r"x \(line 1\): .*both.mkv: person: 2: there are 2 people: 0: in 5 frames"):
        job.run({"video": "both.mkv", "person": 2})


def test_nobody_in_a_video_or_picture_is_an_error_of_the_entry(job):
    empty = np.full((NUM_FRAMES, SIZE["height"], SIZE["width"], 3), 7, np.uint8)
    write_video(job.folder / "empty.mp4", empty, fps=FPS)
    Image.fromarray(empty[0]).save(job.folder / "empty.png")
    with pytest.raises(AnimateError) as refused:
        job.run(
            {"id": "good", "video": "b.mp4"},
            {"id": "no_dancer", "video": "empty.mp4"},
            {"id": "no_body", "image": "empty.png", "video": "b.mp4", "align": "bones"},
            {"id": "too_fast", "video": "b.mp4", "fps": 30},
        )
    text = str(refused.value)
    assert "no_dancer (line 2)" in text
    assert "empty.mp4: nobody was found in 5 frames" in text
    assert "empty.png: nobody was found in the picture" in text
    assert "has 8 frames per second; fps 30 must not be more" in text
    assert len(job.frames(name="good")) == NUM_FRAMES


def test_missing_weights_end_the_run_before_anything_is_animated(job):
    with pytest.raises(MissingInputError, match=r"pose_detection.tflite: the weights.*tools/networks.sh"):
        job.run({"video": "b.mp4"}, pose="blazepose", weights=str(job.folder))
    assert not (job.folder / "results" / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps 0 must be a number above 0"),
        ({"fps": -5.0}, "fps -5.0 must be a number above 0"),
        ({"fps": float("nan")}, "fps nan must be a number above 0"),
        ({"align": "bone", "image": "a.png"}, "align 'bone' must be 'scale' or 'bones'"),
        ({"align": "bones"}, "align needs `image`"),
        ({"person": -1}, "person: -1; accepted is a whole number from 0"),
        ({"person": (0.1, 0.1, 0.05, 0.5)}, "left < right"),
        ({"align": "scale", "image": "no.png"}, "no.png"),
    ],
    ids=str,
)
def test_the_function_for_pipelines_checks_its_arguments_before_it_searches_the_video(job, options, message):
    seen = EXACT.frames_seen
    given = {**options, "image": job.folder / options["image"]} if "image" in options else options
    with pytest.raises(UserError, match=re.escape(message)):
        poses_from_video(job.folder / "b.mp4", annotator=EXACT, **given)
    assert EXACT.frames_seen == seen


def test_the_function_for_pipelines_draws_the_true_poses(job, dancers):
    found = poses_from_video(job.folder / "b.mp4", annotator=EXACT, smooth=False)
    assert found.fps == pytest.approx(FPS)
    np.testing.assert_array_equal(np.stack(found.poses), draw_poses(dancers[1].keypoints, **SIZE))
    fitted = poses_from_video(job.folder / "a.mp4", image=job.folder / "a.png", align="scale", annotator=EXACT)
    assert fitted.poses[0].size == (SIZE["width"], SIZE["height"])
