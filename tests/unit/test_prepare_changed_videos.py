"""The output of `prepare` belongs to the content of its videos; missing parts of it are written again."""

import json
import logging
import os
import shutil
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.random_shards import edit_index
from support.video_folders import damage_video, stored_clips, videos_recipe, write_videos

from dreamdance.data.prepare import prepare
from dreamdance.data.writing.video_opening import check_videos
from dreamdance.errors import ShardError
from dreamdance.inference.manifest import read_entries
from dreamdance.media.video import VideoError, write_video
from dreamdance.recipe.schema import PrepareRecipe, VideosSource
from dreamdance.runs import file_states


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two videos and the output that was prepared from them, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("ab"):
        write_videos(folder / "videos", name, seed=seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        prepare(recipe_of(), folder / "run")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A copy of it; relative paths keep the settings the same."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    prepare(recipe_of(), Path("run"))  # records the times of the copies
    return tmp_path / "copy"


def recipe_of() -> PrepareRecipe:
    return videos_recipe(Path("data"), Path("videos"), split_by="time", validation_fraction=0.4)


def replace_in_place(path: Path, content: bytes) -> None:
    """Replaces a file by other content of the same size, with the same name and time of change."""
    times = path.stat()
    assert len(content) == times.st_size
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_video_replaced_by_one_of_the_same_size_and_time_is_named(folder):
    path = folder / "videos" / "a.pose.mp4"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace_in_place(path, bytes(content))
    before = files(folder / "data")
    with pytest.raises(ShardError, match=r"other videos .*:\n  a\.pose\.mp4 has changed\nSet another `output`, delete"):
        prepare(recipe_of(), Path("run"))
    assert files(folder / "data") == before


def test_a_map_that_was_added_to_a_clip_is_named(folder):
    shutil.copy("videos/a.rgb.mp4", "videos/a.depth.mp4")
    with pytest.raises(ShardError, match=r"\n  a\.depth\.mp4 has changed\n"):
        prepare(recipe_of(), Path("run"))


def test_an_output_that_names_fewer_of_the_missing_maps_is_still_complete(folder):
    """Changes an output to one of an earlier version, which knew fewer modalities."""

    def forget(index):
        for record in index["dreamdance"]["sources"].values():
            record["files"] = {name: content for name, content in record["files"].items() if content is not None}

    for split in ("train", "validation"):
        edit_index(folder / "data" / split, forget)
    before = files(folder / "data/train") | files(folder / "data/validation")
    prepare(recipe_of(), Path("run"))
    assert files(folder / "data/train") | files(folder / "data/validation") == before


def test_videos_that_were_removed_or_added_are_named(folder):
    for modality in ("rgb", "pose"):
        Path(f"videos/b.{modality}.mp4").rename(f"videos/c.{modality}.mp4")
    with pytest.raises(ShardError, match=r"\n  c was added\n  b was removed\n"):
        prepare(recipe_of(), Path("run"))


def test_a_video_that_was_only_touched_is_compared_once_by_its_content(folder, monkeypatch):
    read = []
    hash_file = file_states.hash_file
    monkeypatch.setattr(file_states, "hash_file", lambda path, *rest: read.append(path.name) or hash_file(path))
    os.utime("videos/a.rgb.mp4", ns=(0, 0))
    index = Path("data/train/index.json").read_bytes()
    prepare(recipe_of(), Path("run"))
    assert set(read) == {"a.rgb.mp4"}
    read.clear()
    prepare(recipe_of(), Path("run"))
    assert read == [], "unchanged videos are not read"
    assert Path("data/train/index.json").read_bytes() == index


def test_videos_without_noted_times_are_compared_by_their_content(folder):
    Path("data/inputs.json").write_text("{")
    prepare(recipe_of(), Path("run"))
    assert set(json.loads(Path("data/inputs.json").read_text())) == {
        f"{name}.{modality}.mp4" for name in "ab" for modality in ("rgb", "pose")
    }


@pytest.mark.parametrize(
    "removed", ["train", "train/index.json", "train/a-*.mds", "validation/b-*.mds", "manifest.jsonl", "examples/a.*"]
)
def test_removed_parts_of_the_output_are_written_again(folder, removed):
    before = files(folder / "data")
    (path,) = Path("data").glob(removed)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    prepare(recipe_of(), Path("run"))
    assert files(folder / "data").keys() == before.keys()
    for name, content in files(folder / "data").items():
        assert content == before[name] or name.endswith(".mkv"), name


def test_a_truncated_shard_is_written_again(folder):
    (path,) = Path("data/train").glob("a-*.mds")
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    prepare(recipe_of(), Path("run"))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_video_replaced_while_the_output_is_incomplete_is_cut_again(folder, caplog):
    shutil.rmtree("data")
    whole = Path("videos/b.rgb.mp4").read_bytes()
    damage_video(Path("videos/b.rgb.mp4"))
    with pytest.raises(VideoError):
        prepare(recipe_of(), Path("run"))
    Path("videos/b.rgb.mp4").write_bytes(whole)
    write_videos(Path("videos"), "a", seed=5)
    prepare(recipe_of(), Path("run"))
    assert "a has changed since its clips were made" in caplog.text
    write_videos(Path("other"), "a", seed=5)
    shutil.copy("videos/b.rgb.mp4", "other")
    shutil.copy("videos/b.pose.mp4", "other")
    prepare(videos_recipe(Path("data2"), Path("other"), split_by="time", validation_fraction=0.4), Path("run2"))
    clips, expected = stored_clips(Path("data"), "train"), stored_clips(Path("data2"), "train")
    assert [clip.clip_id for clip in clips] == [clip.clip_id for clip in expected]
    for clip, other in zip(clips, expected, strict=True):
        np.testing.assert_array_equal(clip.frames("rgb"), other.frames("rgb"))


NAMES = {"my dance (1)": "my_dance_1-", "我的舞蹈": "video-", "-AbCdEf12345": "AbCdEf12345-", "plain_1": "plain_1"}


def test_clips_get_ids_that_animate_accepts_and_keep_the_names_of_their_videos(tmp_path):
    for seed, name in enumerate(NAMES):
        write_videos(tmp_path / "videos", name, seed=seed, num_frames=8)
    output = tmp_path / "data"
    recipe = videos_recipe(output, tmp_path / "videos", split_by="time", validation_fraction=0.5, crop_letterbox=False)
    prepare(recipe, tmp_path / "run")
    entries = read_entries(output / "manifest.jsonl")
    clips = stored_clips(output, "validation")
    assert [entry.id for entry in entries] == [clip.clip_id for clip in clips]
    assert sorted(clip.metadata["source"] for clip in clips) == sorted(f"{name}.rgb.mp4" for name in NAMES)
    for clip in clips:
        assert clip.clip_id.startswith(NAMES[clip.metadata["source"].removesuffix(".rgb.mp4")])
        assert clip.clip_id.endswith(".validation.0000")


def write_at(path: Path, frames: np.ndarray, seconds: list[float]) -> None:
    """A video whose frames are shown at given times."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"crf": "10", "bf": "0"}
        for frame, time in zip(frames, seconds, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def flat(levels: list[float]) -> np.ndarray:
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), 32, 32, 3)).copy()


def test_modalities_of_other_rates_are_sampled_at_equal_times(tmp_path):
    """The brightness grows by 100 a second, in pictures of a varying rate and in a pose of a constant one."""
    generator = np.random.default_rng(0)
    rgb = np.cumsum([0.0, *generator.uniform(0.03, 0.09, 30)]).round(3)
    pose = np.arange(0, rgb[-1] + 0.02, 0.04)
    for name, times in (("rgb", rgb), ("pose", pose)):
        write_at(tmp_path / "videos" / f"a.{name}.mp4", flat([20 + 100 * time for time in times]), list(times))
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", crop_letterbox=False, validation_fraction=0.0)
    prepare(recipe, tmp_path / "run")
    clips = stored_clips(tmp_path / "data", "train")
    seen = {
        name: np.concatenate([clip.frames(name).mean(axis=(1, 2, 3)) for clip in clips]) for name in ("rgb", "pose")
    }
    assert len(seen["rgb"]) > 16
    assert np.ptp(seen["rgb"]) > 100
    assert np.abs(seen["rgb"] - seen["pose"]).max() < 100 * 0.02 + 2  # half a frame of the pose, and the codec's error


@pytest.mark.parametrize(("num_frames", "fps"), [(20, 10.0), (10, 8.0), (21, 8.0)])
def test_a_pose_of_another_length_is_refused_though_its_frames_may_be_as_many(tmp_path, num_frames, fps):
    write_video(tmp_path / "a.rgb.mp4", flat([100.0] * 20), fps=8)
    write_video(tmp_path / "a.pose.mp4", flat([100.0] * num_frames), fps=fps)
    with pytest.raises(VideoError, match=rf"a\.pose\.mp4 has {num_frames} frames .*the same moments at the same times"):
        prepare(videos_recipe(tmp_path / "data", tmp_path, validation_fraction=0.0), tmp_path / "run")


def opening(folder: Path, rgb: np.ndarray, pose: np.ndarray) -> dict[str, str]:
    for name, times in (("rgb", rgb), ("pose", pose)):
        write_at(folder / f"a.{name}.mp4", flat([100.0] * len(times)), list(times))
    return check_videos(VideosSource(folder=str(folder)), ["a"], num_threads=1, on_video=lambda number: None)


STEADY = np.arange(0.0, 6.0, 0.04)


def without(times: np.ndarray, start: float, end: float) -> np.ndarray:
    return times[(times <= start) | (times >= end)]


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (STEADY[STEADY < 5.1], "their last frames are shown at 5.080 s and 5.960 s"),
        (without(STEADY, 3.0, 5.0), "; at 3.040 s only a.rgb.mp4 has a frame"),
        (without(STEADY, 3.0, 3.12), "; at 3.040 s only a.rgb.mp4 has a frame"),
    ],
    ids=["its end", "two seconds", "two frames"],
)
def test_a_pause_in_the_pictures_does_not_allow_missing_pose_frames(tmp_path, pose, words):
    """The pictures pause for two seconds."""
    problems = opening(tmp_path, without(STEADY, 0.4, 2.4), pose)
    assert words in problems["a"]


@pytest.mark.parametrize(
    ("rgb", "pose"),
    [
        (without(STEADY, 0.4, 2.4), without(STEADY, 0.4, 2.4)),
        (without(STEADY, 0.4, 2.4), STEADY),  # no pose frame is used there
        (STEADY, STEADY[::2]),
        (STEADY[::3], STEADY[:-2]),
        (np.append(STEADY, 6.0 + 0.2 * np.arange(9)), np.concatenate([STEADY, [6.0], 6.1 + 0.2 * np.arange(8), [7.6]])),
    ],
    ids=["a pause in both", "a pause in the pictures", "half the rate", "thrice the rate", "both slow down"],
)
def test_frames_at_other_times_are_accepted_where_each_picture_has_a_pose(tmp_path, rgb, pose):
    assert opening(tmp_path, rgb, pose) == {}


def test_files_follow_the_umask(tmp_path):
    write_videos(tmp_path / "videos", "a")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", split_by="time", validation_fraction=0.4)
    before = os.umask(0o027)
    try:
        prepare(recipe, tmp_path / "run")
    finally:
        os.umask(before)
    for place in (tmp_path / "data", tmp_path / "run"):
        for path in (place, *place.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_a_complete_output_is_reported_as_complete(folder, caplog):
    caplog.set_level(logging.INFO)
    prepare(recipe_of(), Path("run"))
    assert caplog.text.count("is already complete") == 2


def test_an_output_without_a_clip_takes_other_footage(tmp_path):
    """The only video of the first folder is damaged, which decoding shows: the folders of both splits were begun."""
    write_videos(tmp_path / "wrong", "a")
    damage_video(tmp_path / "wrong" / "a.rgb.mp4")
    write_videos(tmp_path / "right", "b")
    output = tmp_path / "data"
    choices = {"split_by": "time", "validation_fraction": 0.2}
    with pytest.raises(VideoError):
        prepare(videos_recipe(output, tmp_path / "wrong", **choices), tmp_path / "run")
    assert (output / "train" / ".parts" / "settings.json").is_file()
    right = videos_recipe(output, tmp_path / "right", **choices)
    prepare(right, tmp_path / "run")
    prepare(videos_recipe(tmp_path / "untouched", tmp_path / "right", **choices), tmp_path / "run2")
    for split in ("train", "validation"):
        assert (output / split / "index.json").read_bytes() == (
            tmp_path / "untouched" / split / "index.json"
        ).read_bytes()
        assert not list((output / split).glob(".parts*"))


@pytest.mark.parametrize("is_complete", [True, False])
def test_an_output_with_clips_refuses_other_footage_in_one_error(tmp_path, is_complete):
    for seed, name in enumerate("ab"):
        write_videos(tmp_path / "first", name, seed=seed)
    write_videos(tmp_path / "second", "c")
    if not is_complete:
        damage_video(tmp_path / "first" / "b.rgb.mp4", packet=18)
    output = tmp_path / "data"
    choices = {"split_by": "time", "validation_fraction": 0.2}
    with nullcontext() if is_complete else pytest.raises(VideoError):
        prepare(videos_recipe(output, tmp_path / "first", **choices), tmp_path / "run")
    with_clips = [output / "train", *([output / "validation"] if is_complete else [])]
    before = sorted(output.rglob("*"))
    with pytest.raises(ShardError) as raised:
        prepare(videos_recipe(output, tmp_path / "second", clip_frames=6, **choices), tmp_path / "run")
    assert str(raised.value).splitlines() == [
        f"{output} has clips that were made with other settings:",
        "  videos.clip_frames was 8, is 6",
        f"  videos.folder was '{tmp_path / 'first'}', is '{tmp_path / 'second'}'",
        f"Set another `output`, use these values, or delete {' and '.join(map(str, with_clips))}; results of "
        "annotators may stay where they are, and are used again",
    ]
    assert sorted(output.rglob("*")) == before
    for folder in with_clips:
        shutil.rmtree(folder)
    prepare(videos_recipe(output, tmp_path / "second", clip_frames=6, **choices), tmp_path / "run")
    assert {clip.clip_id for clip in stored_clips(output, "train")} == {f"c.train.000{number}" for number in range(3)}
