"""`prepare` from plain videos: annotators make the maps, given files win, the same footage stays on one side."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.true_maps import FOLDER, NAME, open_truth, write_truth
from support.video_folders import stored_clips, videos_recipe

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.loading.stored_clip import draw_window
from dreamdance.data.prepare import prepare
from dreamdance.data.shards.columns import encode_normal, metric_disparity
from dreamdance.data.writing.map_files import as_video
from dreamdance.data.writing.video_opening import open_videos, read_given_keypoints
from dreamdance.errors import MissingInputError, ShardError
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import VideoError, write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 48, 72, 24, 8
SECTION = {"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False}


@pytest.fixture(scope="module")
def dancers(tmp_path_factory):
    """Four dancers; the annotators know all of them."""
    folder = tmp_path_factory.mktemp("truth")
    clips = {
        name: render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=FPS)
        for name, seed in zip("abcd", HELD_OUT_SEEDS[20:24], strict=True)
    }
    for name, clip in clips.items():
        write_truth(folder / "truth", name, clip)
        write_video(folder / "videos" / f"{name}.mp4", clip.rgb, fps=FPS)
    return folder, clips


@pytest.fixture
def job(tmp_path, dancers, monkeypatch):
    folder, clips = dancers
    monkeypatch.setenv(FOLDER, str(folder / "truth"))
    shutil.copytree(folder / "videos", tmp_path / "videos")
    monkeypatch.chdir(tmp_path)  # a path in the recipe is part of the settings that the index states
    open_networks.cache_clear()
    yield Job(tmp_path, clips)
    open_networks.cache_clear()


class Job:
    def __init__(self, folder, clips) -> None:
        self.folder, self.clips, self.videos = folder, clips, folder / "videos"

    def recipe(self, output: str, section: dict, *, seed: int = 0, **changes):
        recipe = videos_recipe(
            Path(output),
            Path("videos"),
            annotators=section,
            **{"validation_fraction": 0.25, "crop_letterbox": False, "references": 3, **changes},
        )
        return recipe.model_copy(update={"contact_sheets": False, "seed": seed})

    def run(self, output: str = "data", section: dict = SECTION, **changes):
        prepare(self.recipe(output, section, **changes), self.folder / f"run_{output}")
        return self.clips_of(output)

    def clips_of(self, output: str = "data"):
        return [clip for split in ("train", "validation") for clip in stored_clips(self.folder / output, split)]

    def content(self, output: str = "data") -> dict[str, bytes]:
        files = [path for split in ("train", "validation") for path in (self.folder / output / split).iterdir()]
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files if path.is_file()}


def only(clips, name: str):
    return [clip for clip in clips if clip.clip_id.startswith(f"{name}.")]


def test_plain_videos_become_clips_with_the_true_maps(job):
    found = job.run()
    assert {clip.clip_id[0] for clip in found} == set("abcd")
    for name, truth in job.clips.items():
        for number, clip in enumerate(only(found, name)):
            frames = slice(8 * number, 8 * number + 8)
            np.testing.assert_allclose(clip.keypoints, truth.keypoints[frames], atol=1e-6)
            poses = draw_poses(truth.keypoints[frames], width=WIDTH, height=HEIGHT)
            np.testing.assert_array_equal(clip.frames("pose"), poses)
            mask = truth.mask[frames]
            np.testing.assert_array_equal(clip.frames("mask") > 0, mask)
            facing = np.where(mask[..., None], truth.normal[frames], np.float32([0, 0, 1]))
            difference = clip.frames("normal").astype(int) - encode_normal(facing)
            assert np.abs(difference).max() <= 1
            assert clip.metadata["background"] == "none"
            low, high = clip.metadata["depth_range"]
            depth = 1 / (low + (high - low) * clip.frames("depth") / 65535.0)
            np.testing.assert_allclose(depth[mask], truth.depth[frames][mask], rtol=1e-3)
            assert (clip.frames("depth")[~mask] == 0).all()
            assert clip.metadata["source"] == f"{name}.mp4"
            assert clip.metadata["first_frame"] == 8 * number


def test_each_clip_has_scores_provenance_and_references_of_its_whole_video(job):
    for clip in job.run():
        scores = clip.metadata["scores"]
        assert scores["people"] == 1
        assert scores["visible_joints"] > 0.8
        assert scores["geometry_angle"] < 25
        assert clip.metadata["annotators"]["depth"]["name"] == NAME
        assert len(clip.metadata["source_sha256"]) == 64
        first = clip.metadata["first_frame"]
        assert [first + place for place in clip.reference_positions] == [4, 12, 20]
        truth = job.clips[clip.clip_id[0]]
        reference = clip.frames("rgb", subject="references").astype(int)
        assert np.abs(reference - truth.rgb[[4, 12, 20]]).mean() < 8
        disparity = clip.frames("depth", subject="references") / 65535.0
        for values, depth_range, frame in zip(
            disparity, clip.metadata["reference_depth_ranges"], [4, 12, 20], strict=True
        ):
            mask = truth.mask[frame]
            np.testing.assert_allclose(
                1 / metric_disparity(values, depth_range)[mask], truth.depth[frame][mask], rtol=1e-3
            )


def test_given_files_win_over_annotators(job, caplog):
    truth = job.clips["a"]
    moved = truth.keypoints.copy()
    moved[..., 0] += 0.05
    for right, left in ((9, 12), (10, 13)):  # knees and ankles
        moved[[5, 12], right], moved[[5, 12], left] = moved[[5, 12], left], moved[[5, 12], right]
    write_keypoint_file(job.videos / "a.keypoints.json", KeypointSequence(moved, WIDTH, HEIGHT, FPS))
    normals = truth.normal + np.float32([0.1, 0.0, 0.0])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    mask = np.zeros((NUM_FRAMES, HEIGHT, WIDTH), bool)
    mask[:, 10:60, 10:40] = True
    np.savez(job.videos / "a.normal.npz", normal=normals)
    np.savez(job.videos / "a.MASK.npz", mask=mask)
    (job.videos / "b.mp4").rename(job.videos / "b.MOV")  # as phones name it
    found = only(job.run(), "a")
    assert len(found) == 3
    for number, clip in enumerate(found):
        np.testing.assert_allclose(clip.keypoints, moved[8 * number : 8 * number + 8], atol=1e-6)
        np.testing.assert_array_equal(clip.frames("mask"), np.uint8(255) * mask[:8])
        stored = clip.frames("normal").astype(int)
        part = slice(8 * number, 8 * number + 8)
        assert np.abs(stored - encode_normal(normals[part]))[mask[part]].max() <= 1
        assert (stored[~mask[part]] == [128, 128, 255]).all()  # the annotator of depth sees no background
        assert set(clip.metadata["given"]) == {"keypoints", "mask", "normal"}
    assert "a.mp4: the given key points seem to exchange the left and the right leg in frames 5, 12;" in caplog.text
    others = only(job.clips_of(), "b")
    assert all(not clip.metadata["given"] for clip in others)
    assert [clip.metadata["source"] for clip in others] == ["b.MOV"] * 3
    assert caplog.text.count("the background of 1 given maps is not stored, such as that of ") == 1
    assert "a.normal.npz, because `videos.annotators.depth` (support.true_maps:open_truth) sees none" in caplog.text
    assert "drawings of poses" not in caplog.text


def test_given_depth_has_the_wall_of_the_normals_that_see_no_background(job):
    truth = job.clips["a"]
    np.savez(job.videos / "a.depth.npz", depth=truth.depth)
    found = only(job.run(), "a")
    assert len(found) == 3
    for number, clip in enumerate(found):
        part = slice(8 * number, 8 * number + 8)
        low, high = clip.metadata["depth_range"]
        depth = 1 / (low + (high - low) * clip.frames("depth") / 65535.0)
        np.testing.assert_allclose(depth[truth.mask[part]], truth.depth[part][truth.mask[part]], rtol=1e-3)
        assert (clip.frames("depth")[~truth.mask[part]] == 0).all()
        assert clip.metadata["background"] == "none"


def test_clips_of_a_drawing_without_key_points_are_never_mirrored(job, caplog):
    """Else the set would be trained on two styles: the drawing, and the mirrored drawing of other key points."""
    drawing = np.full((NUM_FRAMES, HEIGHT, WIDTH, 3), np.uint8([255, 0, 0]))
    for name in "ab":
        write_video(job.videos / f"{name}.pose.mkv", drawing, fps=FPS, lossless=True)
    write_keypoint_file(job.videos / "b.keypoints.json", KeypointSequence(job.clips["b"].keypoints, WIDTH, HEIGHT, FPS))
    found = job.run()
    for name, has_keypoints in {"a": False, "b": True, "c": True}.items():
        for clip in only(found, name):
            assert clip.has_keypoints == has_keypoints
            window = draw_window(clip, (0, 0, 0), num_frames=4, stride=(1, 1), flip_probability=1.0)
            assert window.flip == has_keypoints
            if name in "ab":
                np.testing.assert_array_equal(clip.frames("pose"), drawing[:8])
            assert clip.metadata["scores"]["visible_joints"] > 0.8
    assert "1 drawings of poses have no key points beside them, such as " in caplog.text
    assert caplog.text.count("drawings of poses") == 1
    assert f"{job.videos / 'a.pose.mkv'}: clips" in caplog.text


def test_a_given_map_with_a_turned_axis_is_a_problem_of_that_video(job):
    np.savez(job.videos / "a.normal.npz", normal=job.clips["a"].normal * np.float32([1, -1, 1]))
    job.run(on_error="skip", split_by="time")
    found = stored_clips(job.folder / "data", "train")
    assert {clip.clip_id[0] for clip in found} == set("bcd")
    assert "the given file of normal" in (job.folder / "data" / "damaged_videos.tsv").read_text()


@pytest.mark.slow
def test_the_same_footage_stays_on_one_side_of_the_split(job, caplog):
    """Copies of `a` in other qualities; each seed draws others, and never divides them."""
    caplog.set_level("INFO")
    for name in "xyz":
        write_video(job.videos / f"{name}.mp4", (job.clips["a"].rgb * 0.97).astype(np.uint8), fps=FPS)
    for seed in range(2):
        job.run(output=f"data_{seed}", validation_fraction=0.4, seed=seed)
        sides = {
            split: {clip.clip_id[0] for clip in stored_clips(job.folder / f"data_{seed}", split)}
            for split in ("train", "validation")
        }
        assert {"a", "x", "y", "z"} <= sides["train"] or {"a", "x", "y", "z"} <= sides["validation"]
        assert sides["train"]
        assert sides["validation"]
    assert "1 groups of videos show the same footage" in caplog.text
    assert "no footage is on both sides of the split" in caplog.text


def test_another_annotator_is_another_output(job):
    job.run()
    before = job.content()
    with pytest.raises(ShardError, match=r"annotators was .*open_truth.*open_other"):
        job.run(section={**SECTION, "depth": NAME.replace("open_truth", "open_other")})
    assert job.content() == before


def test_kept_results_give_the_same_shards_as_fresh_ones(job, monkeypatch):
    """Soft masks, and maps that their stored encodings round: a fresh clip must be made from the rounded ones."""
    look_up = type(open_truth())._look_up

    def soft(self, name, rgb):
        found = look_up(self, name, rgb)
        return 0.1237 + 0.7611 * found if name == "mask" else found

    monkeypatch.setattr(type(open_truth()), "_look_up", soft)
    job.run()
    fresh = job.content()
    kept = {path: path.stat().st_mtime_ns for path in (job.folder / "data" / "annotations").glob("*/*.npz")}
    for split in ("train", "validation"):
        shutil.rmtree(job.folder / "data" / split)
    monkeypatch.setattr(type(open_truth()), "_look_up", None)  # nothing is made again
    job.run()
    assert job.content() == fresh
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "no key-point file of a known kind"), ("[", "not valid JSON")],
)
def test_key_points_that_cannot_be_used_are_named_before_anything_is_written(job, content, message):
    (job.videos / "b.keypoints.json").write_text(content)
    with pytest.raises(VideoError, match=rf"b\.keypoints\.json.*{message}"):
        job.run()
    assert not list(job.folder.glob("data/*/*.mds*"))


def test_key_points_of_another_length_are_refused(job):
    sequence = KeypointSequence(job.clips["b"].keypoints[:5], WIDTH, HEIGHT, FPS)
    write_keypoint_file(job.videos / "b.keypoints.json", sequence)
    with pytest.raises(VideoError, match=r"b\.keypoints\.json has 5 frames, b\.mp4 24"):
        job.run()


@pytest.mark.parametrize(
    ("width", "height", "fps", "message"),
    [
        (512, 512, 8.0, r"states frames of 512x512, b\.mp4 has 48x72: the aspects differ"),
        (72, 48, 8.0, "states frames of 72x48"),
        (48, 71, 8.0, "states frames of 48x71"),
        (48, 72, 24.0, r"states 24 frames per second, b\.mp4 has 8"),
    ],
)
def test_key_points_of_another_picture_or_rate_are_refused(job, width, height, fps, message):
    sequence = KeypointSequence(job.clips["b"].keypoints, width, height, fps)
    write_keypoint_file(job.videos / "b.keypoints.json", sequence)
    with pytest.raises(VideoError, match=rf"b\.keypoints\.json {message}"):
        open_videos(job.recipe("data", SECTION).videos, "b")


@pytest.mark.parametrize(("width", "height", "fps"), [(512, 768, 8.0), (341, 512, 7.992)])
def test_key_points_found_at_another_size_are_used(job, width, height, fps):
    sequence = KeypointSequence(job.clips["b"].keypoints, width, height, fps)
    write_keypoint_file(job.videos / "b.keypoints.json", sequence)
    source = job.recipe("data", SECTION).videos
    given = read_given_keypoints(source, "b", as_video(open_videos(source, "b")["rgb"]))
    np.testing.assert_allclose(given.keypoints, job.clips["b"].keypoints, atol=1e-6)


def test_a_missing_network_ends_the_run_before_anything_is_written(job):
    with pytest.raises(MissingInputError, match=r"tools/networks\.sh"):
        job.run(section={"weights": str(job.folder / "nothing")})
    assert not (job.folder / "data" / "train").exists()


def test_a_folder_of_plain_videos_without_annotators_says_what_to_set(job):
    recipe = videos_recipe(job.folder / "data", job.videos)
    with pytest.raises(MissingInputError, match=r"4 videos without a pose: `videos\.annotators=\{\}` finds the poses"):
        prepare(recipe, job.folder / "run")


def test_normals_with_a_turned_axis_end_the_run_and_are_no_damage_of_a_video(job, monkeypatch):
    look_up = type(open_truth())._look_up
    turned = {"normal": np.float32([-1, 1, 1])}
    monkeypatch.setattr(
        type(open_truth()), "_look_up", lambda self, name, rgb: look_up(self, name, rgb) * turned.get(name, 1)
    )
    with pytest.raises(Exception, match=r"`videos\.annotators\.normal` .*x \(right\)") as caught:
        job.run(on_error="skip")
    assert type(caught.value).__name__ == "AxesError"
    assert not (job.folder / "data" / "damaged_videos.tsv").exists()
