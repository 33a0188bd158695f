"""The prepare task: dancers and videos become shards, a manifest and examples."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.random_shards import write_random_shards
from support.real_clips import CLIPS, needs_clips
from support.video_folders import stored_clips, videos_recipe, write_videos

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS, render_clip
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.data.planning import plan_dancers
from dreamdance.data.prepare import choose_format, prepare
from dreamdance.data.shards.columns import FIRST_MODALITIES, metric_disparity
from dreamdance.data.writing.dancer_clips import render_record
from dreamdance.data.writing.video_clips import choose_validation, split_frames, split_span
from dreamdance.errors import MissingInputError, ShardError
from dreamdance.media.cropping import Crop, centred_crop
from dreamdance.media.keypoints import read_keypoint_file
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import decode_normals, pictures_to_tensor
from dreamdance.media.video import VideoError, read_frames, write_video
from dreamdance.modalities import ADDED_TO_DANCERS
from dreamdance.recipe.schema import DancersSource, PrepareRecipe, VideosSource
from dreamdance.recipe.sections import Shards

WIDTH, HEIGHT = 32, 48


def dancers_recipe(output: Path, **changes) -> PrepareRecipe:
    source = DancersSource(num_train_clips=3, num_validation_clips=2, num_frames=4, width=WIDTH, height=HEIGHT)
    settings = {"name": "p", "task": "prepare", "output": str(output), "dancers": source, "num_workers": 1}
    return PrepareRecipe(**{**settings, "clips_per_part": 2, **changes})


@pytest.fixture(scope="module")
def dancers(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dancers") / "data"
    prepare(dancers_recipe(output), output.parent / "run")
    return output


def test_held_out_dancers_that_are_skipped_are_followed_by_others_and_training_stays():
    sizes = {"num_train_clips": 3, "num_validation_clips": 2, "pairs": True}
    first, other = (plan_dancers(DancersSource(skip_validation_clips=skip, **sizes), 4) for skip in (0, 12))
    assert [part.make for part in first["train"]] != [part.make for part in other["train"]]  # their sources differ
    assert [list(part.make.seeds) for part in other["train"]] == [list(part.make.seeds) for part in first["train"]]
    assert [list(part.make.seeds) for part in first["validation"][:-1]] == [list(HELD_OUT_SEEDS[:2])]
    assert [list(part.make.seeds) for part in other["validation"][:-1]] == [list(HELD_OUT_SEEDS[12:14])]
    twelve, thirteen = HELD_OUT_SEEDS[12:14]
    assert other["validation"][-1].make.pairs == ((twelve, thirteen), (thirteen, twelve))


def test_dancers_are_stored_as_they_are_rendered(dancers):
    for split, seeds in (("train", TRAINING_SEEDS[:3]), ("validation", HELD_OUT_SEEDS[:2])):
        clips = stored_clips(dancers, split)
        assert [clip.metadata["seed"] for clip in clips] == list(seeds)
        rendered, clip = render_clip(seeds[1], num_frames=4, width=WIDTH, height=HEIGHT, fps=8.0), clips[1]
        np.testing.assert_array_equal(clip.frames("rgb"), rendered.rgb)
        np.testing.assert_array_equal(clip.frames("mask") > 0, rendered.mask)
        np.testing.assert_array_equal(clip.keypoints, rendered.keypoints)
        np.testing.assert_array_equal(clip.frames("pose"), draw_poses(rendered.keypoints, width=WIDTH, height=HEIGHT))
        normals = decode_normals(pictures_to_tensor(clip.frames("normal"))).movedim(1, -1).numpy()
        cosine = (normals * rendered.normal).sum(axis=-1)
        assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() < 0.5
        disparity = metric_disparity(clip.frames("depth") / 65535, clip.metadata["depth_range"])
        np.testing.assert_allclose(1 / disparity, rendered.depth, rtol=1e-3)


def test_the_manifest_lists_the_inputs_of_animate_for_each_validation_clip(dancers):
    entries = [json.loads(line) for line in (dancers / "manifest.jsonl").read_text().splitlines()]
    clips = stored_clips(dancers, "validation")
    assert [entry["id"] for entry in entries] == [clip.clip_id for clip in clips]
    for number, (entry, clip) in enumerate(zip(entries, clips, strict=True)):
        assert (entry["seed"], entry["align"], entry["fps"]) == (number, False, 8.0)
        reference = np.asarray(Image.open(dancers / entry["image"]))
        np.testing.assert_array_equal(reference, clip.frames("rgb", [3])[0])
        sequence = read_keypoint_file(dancers / entry["keypoints"])
        assert (sequence.width, sequence.height, sequence.fps) == (WIDTH, HEIGHT, 8.0)
        np.testing.assert_allclose(sequence.keypoints, clip.keypoints, rtol=0, atol=1e-6)


def test_examples_show_the_reference_that_validation_uses(dancers):
    shards = Shards(local=str(dancers / "validation"))
    for sample in fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=2, count=2):
        picture = np.asarray(Image.open(dancers / "examples" / sample.clip_id / "reference.png"))
        np.testing.assert_array_equal((sample.reference.movedim(0, -1).numpy() * 255).round().astype(np.uint8), picture)


def test_preparing_again_writes_nothing(dancers, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = {path: path.stat().st_mtime_ns for path in dancers.rglob("*") if path.is_file()}
    prepare(dancers_recipe(dancers), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in dancers.rglob("*") if path.is_file()} == before
    assert caplog.text.count("is already complete") == 2


def test_another_recipe_for_the_same_output_is_refused_by_name(dancers, tmp_path):
    source = DancersSource(num_train_clips=3, num_validation_clips=2, num_frames=5, width=WIDTH, height=HEIGHT)
    with pytest.raises(ShardError, match=r"(?s)dancers\.num_frames was 4, is 5.*`output`"):
        prepare(dancers_recipe(dancers, dancers=source), tmp_path / "run")


def test_the_number_of_workers_and_the_cluster_are_not_part_of_the_settings(dancers, tmp_path):
    index = (dancers / "train" / "index.json").read_bytes()
    prepare(dancers_recipe(dancers, num_workers=2), tmp_path / "run")
    assert (dancers / "train" / "index.json").read_bytes() == index


def test_dancers_have_the_maps_of_the_first_version_and_those_that_the_table_lists():
    source = DancersSource(num_train_clips=1, num_validation_clips=1, num_frames=1, width=WIDTH, height=HEIGHT)
    assert render_record(0, source).maps.keys() == {*FIRST_MODALITIES, *ADDED_TO_DANCERS}


def test_dancers_that_lack_a_map_added_since_are_refused_by_name(dancers, tmp_path, monkeypatch):
    index = (dancers / "train" / "index.json").read_bytes()
    assert b"added_maps" not in index, "as in the indices of older commits, which stay complete"
    monkeypatch.setattr("dreamdance.data.planning.ADDED_TO_DANCERS", ("legs",))
    with pytest.raises(ShardError, match=r"added_maps was None, is \['legs'\]\nSet another `output`"):
        prepare(dancers_recipe(dancers), tmp_path / "run")
    assert (dancers / "train" / "index.json").read_bytes() == index


def test_pictures_of_videos_are_stored_as_jpeg_and_those_of_dancers_without_loss(tmp_path):
    videos = videos_recipe(tmp_path / "data", tmp_path).model_copy(update={"rgb_format": None})
    dancers = dancers_recipe(tmp_path / "data")
    assert [choose_format(recipe).rgb_format for recipe in (videos, dancers)] == ["jpeg", "png"]
    assert choose_format(videos).compression == "none"


def test_an_existing_output_keeps_its_compression_unless_the_recipe_sets_another(tmp_path):
    recipe = dancers_recipe(tmp_path / "data")
    write_random_shards(tmp_path / "data" / "train", 4, compression="zstd")
    assert choose_format(recipe).compression == "zstd"
    assert choose_format(recipe.model_copy(update={"compression": "none"})).compression == "none"


def test_progress_is_reported(dancers):
    lines = [json.loads(line) for line in (dancers.parent / "run/logs/progress.jsonl").read_text().splitlines()]
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)
    assert (lines[-1]["done"], lines[-1]["total"], lines[-1]["unit"]) == (3, 3, "parts")


def test_videos_are_cut_alike_in_all_modalities(tmp_path):
    write_videos(tmp_path / "videos", "a", with_maps=True)
    write_videos(tmp_path / "videos", "b", seed=1)
    output = tmp_path / "data"
    prepare(videos_recipe(output, tmp_path / "videos", validation_fraction=0.5), tmp_path / "run")
    clips = [*stored_clips(output, "train"), *stored_clips(output, "validation")]
    assert sorted((clip.clip_id.split(".")[0], clip.num_frames) for clip in clips) == [
        ("a", 4), ("a", 8), ("a", 8), ("b", 4), ("b", 8), ("b", 8),
    ]  # fmt: skip
    for clip in clips:
        assert (clip.width, clip.height, clip.fps) == (56, 64, 8.0)
        assert clip.metadata["crop"] == [8, 16, 56, 64]
        name, first = clip.clip_id.split(".")[0], clip.metadata["first_frame"]
        frames = list(range(first, first + clip.num_frames))
        for modality in ("rgb", "pose"):
            original = read_frames(tmp_path / "videos" / f"{name}.{modality}.mp4", frames)
            np.testing.assert_array_equal(clip.frames(modality), original[:, 16:80, 8:])
        assert clip.has("normal") == clip.has("depth") == (name == "a")
        if name == "a":
            original = read_frames(tmp_path / "videos" / "a.depth.mp4", frames)[:, 16:80, 8:]
            np.testing.assert_allclose(clip.frames("depth") / 257.0, original.mean(axis=-1), rtol=0, atol=0.51)


def test_clips_without_key_points_get_a_lossless_video_of_their_poses(tmp_path):
    write_videos(tmp_path / "videos", "a")
    output = tmp_path / "data"
    recipe = videos_recipe(output, tmp_path / "videos", split_by="time", validation_fraction=0.4)
    prepare(recipe, tmp_path / "run")
    (entry,) = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    (clip,) = stored_clips(output, "validation")
    assert clip.metadata["first_frame"] == 12
    assert [clip.metadata["first_frame"] for clip in stored_clips(output, "train")] == [0, 8]
    np.testing.assert_array_equal(read_frames(output / entry["pose"]), clip.frames("pose"))


def test_size_and_stride_are_those_of_the_recipe(tmp_path):
    write_videos(tmp_path / "videos", "a", with_maps=True)
    recipe = videos_recipe(
        tmp_path / "data", tmp_path / "videos", width=16, height=24, frame_stride=2, validation_fraction=0.0
    )
    prepare(recipe, tmp_path / "run")
    (clip,) = stored_clips(tmp_path / "data", "train")
    assert (clip.num_frames, clip.width, clip.height, clip.fps) == (8, 16, 24, 4.0)
    assert clip.metadata["crop"] == [14, 16, 43, 64]  # the centre of the part between the bars, 2 : 3
    lengths = np.linalg.norm(clip.frames("normal") / 127.5 - 1.0, axis=-1)
    np.testing.assert_allclose(lengths, 1.0, atol=0.01)
    assert not (tmp_path / "data" / "manifest.jsonl").exists()


def test_maps_that_are_not_aligned_are_refused_by_name(tmp_path):
    write_videos(tmp_path / "videos", "a")
    frames = read_frames(tmp_path / "videos" / "a.pose.mp4")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", validation_fraction=0.0)
    write_video(tmp_path / "videos" / "a.pose.mp4", frames[:-1], fps=8)
    with pytest.raises(VideoError, match=r"a\.pose\.mp4 has 19 frames of 64x96, a\.rgb\.mp4 20 of 64x96"):
        prepare(recipe, tmp_path / "run")
    write_video(tmp_path / "videos" / "a.pose.mp4", frames[:, :48], fps=8)
    with pytest.raises(VideoError, match=r"a\.pose\.mp4 has 20 frames of 64x48"):
        prepare(videos_recipe(tmp_path / "data2", tmp_path / "videos", validation_fraction=0.0), tmp_path / "run")


def test_a_crop_outside_of_the_picture_is_refused(tmp_path):
    write_videos(tmp_path / "videos", "a")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", crop=(0, 0, 65, 96), validation_fraction=0.0)
    with pytest.raises(VideoError, match=r"`videos\.crop` \[0, 0, 65, 96\] reaches beyond the frame of .*64x96"):
        prepare(recipe, tmp_path / "run")


def test_videos_without_poses_are_left_out_with_a_line(tmp_path, caplog):
    write_videos(tmp_path / "videos", "a")
    write_videos(tmp_path / "videos", "b")
    (tmp_path / "videos" / "b.pose.mp4").unlink()
    prepare(videos_recipe(tmp_path / "data", tmp_path / "videos", validation_fraction=0.0), tmp_path / "run")
    assert "b.rgb.mp4 is left out: the folder has no b.pose.mp4" in caplog.text
    assert {clip.clip_id.split(".")[0] for clip in stored_clips(tmp_path / "data", "train")} == {"a"}


def test_a_folder_without_videos_is_an_error_that_names_the_needed_files(tmp_path):
    with pytest.raises(
        MissingInputError, match=r"`videos\.folder` must contain <clip>\.rgb\.mp4 and <clip>\.pose\.mp4"
    ):
        prepare(videos_recipe(tmp_path / "data", tmp_path), tmp_path / "run")


def test_an_output_of_fewer_videos_is_refused_naming_the_added_one(tmp_path):
    write_videos(tmp_path / "videos", "a")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", validation_fraction=0.0)
    prepare(recipe, tmp_path / "run")
    write_videos(tmp_path / "videos", "b")
    with pytest.raises(
        ShardError, match=r"was made from other videos .*:\n  b was added\nSet another `output`, delete"
    ):
        prepare(recipe, tmp_path / "run")


def test_whole_videos_are_drawn_for_validation():
    names = [f"video_{number}" for number in range(20)]
    chosen = choose_validation(names, fraction=0.1, seed=3)
    assert len(chosen) == 2
    assert chosen == choose_validation(names, fraction=0.1, seed=3)
    assert choose_validation(names, fraction=0.0, seed=3) == set()
    assert len(choose_validation(names[:2], fraction=0.01, seed=3)) == 1
    with pytest.raises(MissingInputError, match=r"`videos\.split_by` to time"):
        choose_validation(names[:1], fraction=0.1, seed=3)


def test_a_last_clip_that_is_too_short_is_left_out():
    source = VideosSource(folder="x", clip_frames=8, min_clip_frames=4, validation_fraction=0.0)
    assert [(first, len(piece)) for first, piece in split_frames(list(range(19)), "train", source)] == [(0, 8), (8, 8)]
    assert [(first, len(piece)) for first, piece in split_frames(list(range(20)), "train", source)] == [
        (0, 8), (8, 8), (16, 4),
    ]  # fmt: skip


def test_centred_crops_have_the_aspect_asked_for():
    assert centred_crop(100, 90, to_width=2, to_height=3) == Crop(left=20, top=0, width=60, height=90)
    assert centred_crop(60, 100, to_width=2, to_height=3) == Crop(left=0, top=5, width=60, height=90)
    assert centred_crop(512, 768, to_width=256, to_height=384) == Crop(left=0, top=0, width=512, height=768)


@pytest.mark.clips
@pytest.mark.slow
@needs_clips("dance_01")
def test_real_dance_videos_are_cropped_and_their_poses_stay_aligned(tmp_path):
    for path in CLIPS.glob("dance_01.*.mp4"):
        (tmp_path / path.name).symlink_to(path)
    recipe = videos_recipe(
        tmp_path / "data", tmp_path, width=64, height=96, frame_stride=4, split_by="time", validation_fraction=0.2
    )
    prepare(recipe, tmp_path / "run")
    train, validation = stored_clips(tmp_path / "data", "train"), stored_clips(tmp_path / "data", "validation")
    assert max(clip.metadata["first_frame"] for clip in train) < min(
        clip.metadata["first_frame"] for clip in validation
    )
    assert {clip.fps for clip in train} == {2.0}
    left, top, width, height = train[0].metadata["crop"]
    assert (left, left + width) == (0, 408)  # the bars: 104 columns on the right, some 150 rows above
    assert top > 150
    assert width * 3 == pytest.approx(height * 2, abs=3)
    for clip in (train[0], validation[0]):
        drawn = clip.frames("pose").max(axis=-1) > 60
        changing = clip.frames("rgb").astype(np.int16).max(axis=-1)
        columns = np.array([np.flatnonzero(frame.any(axis=0)).mean() for frame in drawn])
        assert ((columns > 10) & (columns < 54)).all()
        # The trousers are black: along the drawn legs the picture is darker than around them.
        legs = drawn[:, 55:85]
        assert changing[:, 55:85][legs].mean() < 0.75 * changing[:, 55:85][~legs].mean()


def test_a_still_that_is_held_over_the_boundary_in_time_belongs_to_training_alone():
    """Videos of variable frame rate repeat a frame until the next one."""
    frames = [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 6, 7, 8]
    source = VideosSource(folder="videos", split_by="time", validation_fraction=0.5)
    train, validation = (split_span(frames, split, source) for split in ("train", "validation"))
    assert (train, validation) == (range(11), range(11, 14))
    assert not {frames[place] for place in train} & {frames[place] for place in validation}
    assert split_span([0, *[1] * 9], "validation", source) == range(10, 10)
