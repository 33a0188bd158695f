"""Unusable videos: problems in headers are named before work begins, problems in decoding at the end."""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.known_videos import known_frames, write_by_ffmpeg
from support.random_shards import random_clip
from support.video_folders import damage_video, stored_clips, videos_recipe, write_videos

from dreamdance.data import writing_report
from dreamdance.data.prepare import prepare
from dreamdance.data.writing import video_opening
from dreamdance.data.writing.part_notes import read_note
from dreamdance.data.writing.shard_parts import ClipRecord, Part, PartSource, ShardFormat, write_part
from dreamdance.data.writing.video_opening import check_videos
from dreamdance.errors import LostWorkerError, ShardError
from dreamdance.launch.prepared import is_prepared
from dreamdance.media.video import VideoError, read_frames, write_video
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.layout import progress_file


@pytest.fixture
def videos(tmp_path) -> Path:
    """Four clips, whole."""
    for seed, name in enumerate("abcd"):
        write_videos(tmp_path / "videos", name, seed=seed)
    return tmp_path / "videos"


def names(output: Path, *splits: str) -> set[str]:
    return {
        clip.metadata["source"].removesuffix(".rgb.mp4") for split in splits for clip in stored_clips(output, split)
    }


def keep_whole(path: Path) -> Path:
    """A copy to repair a video with."""
    whole = path.parent.parent / f"whole.{path.name}"
    shutil.copy(path, whole)
    return whole


@pytest.mark.parametrize(("on_error", "counted"), [("skip", "videos_left_out"), ("stop", "videos_unusable")])
def test_the_progress_counts_videos_per_hour_and_those_that_cannot_be_used(
    tmp_path, videos, monkeypatch, on_error, counted
):
    monkeypatch.setattr(writing_report, "COUNT_SECONDS", 0.0)
    monkeypatch.setattr(writing_report, "FAILURES_SECONDS", 0.0)
    damage_video(videos / "b.rgb.mp4")
    recipe = videos_recipe(tmp_path / "data", videos, validation_fraction=0.25, on_error=on_error)
    began = time.monotonic()
    if on_error == "skip":
        prepare(recipe, tmp_path / "run")
    else:
        with pytest.raises(VideoError, match="1 of the videos are damaged"):
            prepare(recipe, tmp_path / "run")
    hours = (time.monotonic() - began) / 3600
    opened, *lines = map(json.loads, progress_file(tmp_path / "run").read_text().splitlines())
    assert (opened["done"], opened["total"], opened["unit"]) == (4, 4, "videos"), "of both splits"
    written = [line for line in lines if line["message"].startswith("writing")]
    assert written[0]["done"] == 0
    paces = [line["videos_per_hour"] for line in written[1:]]
    assert paces
    assert all(pace >= line["done"] / hours for pace, line in zip(paces, written[1:], strict=True))
    assert all(counted not in line or line[counted] == 1 for line in lines)
    assert lines[-1][counted] == 1


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_video_stops_the_work_until_it_is_repaired(tmp_path, videos, num_workers):
    output = tmp_path / "data"
    recipe = videos_recipe(output, videos, num_workers=num_workers, validation_fraction=0.0)
    whole = keep_whole(videos / "b.rgb.mp4")
    damage_video(videos / "b.rgb.mp4")
    with pytest.raises(VideoError) as raised:
        prepare(recipe, tmp_path / "run")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("1 of the videos are damaged; `prepare` has written no clips of them")
    assert lines[1].startswith("  b: ")
    assert "b.rgb.mp4" in lines[1]
    assert "videos.on_error=skip" in lines[2]
    table = (output / "damaged_videos.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in table] == ["video", "b"]
    assert not (output / "train" / "index.json").exists()
    parts = {path.name.partition("-")[0]: path for path in (output / "train" / ".parts").glob("?-*")}
    assert "a" in parts, "clips in progress are finished"
    assert "b" not in parts
    before = parts["a"].stat().st_mtime_ns
    shutil.copy(whole, videos / "b.rgb.mp4")
    prepare(recipe, tmp_path / "run")
    assert names(output, "train") == set("abcd")
    assert not (output / "damaged_videos.tsv").exists()
    assert (output / "train").stat().st_mtime_ns > before
    untouched = tmp_path / "untouched"
    prepare(videos_recipe(untouched, videos, validation_fraction=0.0), tmp_path / "run2")
    assert (output / "train" / "index.json").read_bytes() == (untouched / "train" / "index.json").read_bytes()


def test_a_removed_damaged_video_no_longer_stops_the_work(tmp_path, videos):
    recipe = videos_recipe(tmp_path / "data", videos)
    damage_video(videos / "b.rgb.mp4")
    with pytest.raises(VideoError):
        prepare(recipe, tmp_path / "run")
    for path in videos.glob("b.*"):
        path.unlink()
    prepare(recipe, tmp_path / "run")
    assert names(tmp_path / "data", "train", "validation") == set("acd")


@pytest.mark.slow
@pytest.mark.parametrize("split_by", ["clip", "time"])
def test_damaged_videos_are_skipped_as_a_whole_and_added_when_they_are_repaired(tmp_path, videos, split_by, caplog):
    """The damage is in the last fifth, which is validation where videos are split by time."""
    output = tmp_path / "data"
    fraction = 0.25 if split_by == "clip" else 0.2
    choices = {"split_by": split_by, "validation_fraction": fraction, "crop": (8, 16, 56, 64), "min_clip_frames": 4}
    recipe = videos_recipe(output, videos, on_error="skip", **choices)
    whole = keep_whole(videos / "c.rgb.mp4")
    damage_video(videos / "c.rgb.mp4", packet=18)
    prepare(recipe, tmp_path / "run")
    assert names(output, "train", "validation") == set("abd")
    assert (
        f"the output contains no clips of 1 damaged videos, see {output / 'damaged_videos.tsv'}:\n  c: " in caplog.text
    )
    assert (output / "damaged_videos.tsv").read_text().splitlines()[1].startswith("c\t")
    index = (output / "train" / "index.json").read_bytes()
    prepare(recipe, tmp_path / "run")
    assert (output / "train" / "index.json").read_bytes() == index, "videos that are still damaged are not tried again"
    with pytest.raises(VideoError, match="  c: "):
        prepare(videos_recipe(output, videos, on_error="stop", **choices), tmp_path / "run")
    shards = {path: path.stat().st_mtime_ns for path in output.glob("train/*.mds")}
    shutil.copy(whole, videos / "c.rgb.mp4")
    prepare(recipe, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "the shards of the others do not change"
    assert not (output / "damaged_videos.tsv").exists()
    untouched = tmp_path / "untouched"
    prepare(videos_recipe(untouched, videos, **choices), tmp_path / "run2")
    for split in ("train", "validation"):
        assert (output / split / "index.json").read_bytes() == (untouched / split / "index.json").read_bytes()
    assert (output / "manifest.jsonl").read_bytes() == (untouched / "manifest.jsonl").read_bytes()


def test_a_skipped_video_may_be_removed_and_the_rest_stays(tmp_path, videos, caplog):
    caplog.set_level(logging.INFO)
    recipe = videos_recipe(tmp_path / "data", videos, on_error="skip")
    damage_video(videos / "b.rgb.mp4")
    prepare(recipe, tmp_path / "run")
    for path in videos.glob("b.*"):
        path.unlink()
    prepare(recipe, tmp_path / "run")
    assert caplog.text.count("is already complete") == 2
    assert not (tmp_path / "data" / "damaged_videos.tsv").exists()


def test_skipping_all_videos_is_an_error(tmp_path):
    write_videos(tmp_path / "videos", "a")
    damage_video(tmp_path / "videos" / "a.rgb.mp4")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", on_error="skip", validation_fraction=0.0)
    with pytest.raises(ShardError, match=r"there are no clips to write into .*train:\n  1 x .*a\.rgb\.mp4"):
        prepare(recipe, tmp_path / "run")
    assert not (tmp_path / "data" / "train" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packet", [None, 12], ids=["its header shows it", "decoding shows it"])
def test_validation_may_be_left_without_clips_until_its_videos_are_repaired(tmp_path, videos, packet, caplog):
    output, untouched = tmp_path / "data", tmp_path / "untouched"
    prepare(videos_recipe(untouched, videos, validation_fraction=0.25), tmp_path / "run2")
    (name,) = names(untouched, "validation")
    path = videos / f"{name}.rgb.mp4"
    whole = keep_whole(path)
    if packet is None:
        path.write_bytes(path.read_bytes()[:500])
    else:
        damage_video(path, packet=packet)
    recipe = videos_recipe(output, videos, on_error="skip", validation_fraction=0.25)
    for _ in range(2):
        prepare(recipe, tmp_path / "run")
        assert names(output, "train") == set("abcd") - {name}, "the others stay in their split"
        assert (output / "manifest.jsonl").read_text() == ""
        assert is_prepared(recipe)
    assert caplog.text.count(f"{output / 'validation'} has no clips") == 1
    with pytest.raises(ShardError, match=r"validation.*lists no shards; if `prepare` skipped all videos"):
        stored_clips(output, "validation")
    shutil.copy(whole, path)
    assert not is_prepared(recipe)
    prepare(recipe, tmp_path / "run")
    for file in ("train/index.json", "validation/index.json", "manifest.jsonl"):
        assert (output / file).read_bytes() == (untouched / file).read_bytes()


def test_training_may_not_be_left_without_clips(tmp_path, videos):
    prepare(videos_recipe(tmp_path / "untouched", videos, validation_fraction=0.75), tmp_path / "run2")
    (name,) = names(tmp_path / "untouched", "train")
    damage_video(videos / f"{name}.rgb.mp4")
    recipe = videos_recipe(tmp_path / "data", videos, on_error="skip", validation_fraction=0.75)
    with pytest.raises(ShardError, match=r"there are no clips to write into .*train:\n  1 x .*\.rgb\.mp4"):
        prepare(recipe, tmp_path / "run")
    assert not is_prepared(recipe)


def damage_headers(videos: Path) -> None:
    """Four of five clips get a problem that headers show."""
    write_videos(videos, "e", num_frames=4)
    (videos / "a.pose.mp4").unlink()
    (videos / "a.pose.mp4").symlink_to(videos / "nowhere.mp4")
    content = (videos / "b.rgb.mp4").read_bytes()
    (videos / "b.rgb.mp4").write_bytes(content[: len(content) // 2])  # the header of these files is at their end
    frames = read_frames(videos / "c.pose.mp4")
    write_video(videos / "c.pose.mp4", frames[:-1], fps=8)
    write_video(videos / "d.pose.mp4", frames[:, :48], fps=8)


WRONG = {
    "a": "a.pose.mp4 is a link to a missing file: ",
    "b": "b.rgb.mp4 cannot be read: ",
    "c": "c.pose.mp4 has 19 frames of 64x96, c.rgb.mp4 20 of 64x96; their last frames are shown at 2.250 s and 2.375 s",
    "d": "d.pose.mp4 has 20 frames of 64x48, d.rgb.mp4 20 of 64x96",
}


def test_problems_in_headers_are_named_all_at_once_before_anything_is_written(tmp_path, videos):
    damage_headers(videos)
    with pytest.raises(VideoError) as raised:
        prepare(videos_recipe(tmp_path / "data", videos, num_workers=2, validation_fraction=0.0), tmp_path / "run")
    first, *lines, last = str(raised.value).splitlines()
    assert first == "4 of the videos cannot be used; `prepare` has written no clips:"
    assert [line[:5] for line in lines] == [f"  {name}: " for name in WRONG]
    assert all(words in line for words, line in zip(WRONG.values(), lines, strict=True))
    assert last.startswith("Repair, replace or remove these videos")
    assert not list((tmp_path / "data").glob("*/.parts/*-*"))
    assert len((tmp_path / "data" / "damaged_videos.tsv").read_text().splitlines()) == 1 + len(WRONG)


def test_files_that_may_not_be_read_are_named():
    """Runs as another user, because root may read everything; all users may read the folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder, user = Path(place), os.geteuid()
        folder.chmod(0o755)
        write_videos(folder, "a", num_frames=4)
        write_videos(folder, "b", num_frames=4)
        (folder / "a.pose.mp4").chmod(0)
        source = VideosSource(folder=place)
        if user == 0:
            os.seteuid(65534)
        try:
            problems = check_videos(source, ["a", "b"], num_threads=1, on_video=lambda number: None)
        finally:
            os.seteuid(user)
    assert problems == {"a": f"{folder / 'a.pose.mp4'} cannot be read (permission denied)"}


def test_videos_with_problems_in_headers_are_skipped_if_the_recipe_allows_it(tmp_path, videos):
    damage_headers(videos)
    prepare(videos_recipe(tmp_path / "data", videos, on_error="skip", validation_fraction=0.0), tmp_path / "run")
    assert names(tmp_path / "data", "train") == {"e"}
    assert len((tmp_path / "data" / "damaged_videos.tsv").read_text().splitlines()) == 1 + len(WRONG)


def test_a_crop_outside_of_some_pictures_is_named_with_them(tmp_path, videos):
    for modality in ("rgb", "pose"):
        write_video(videos / f"small.{modality}.mp4", np.zeros((8, 32, 32, 3), np.uint8), fps=8)
    with pytest.raises(
        VideoError,
        match=r"1 of the videos .*\n  small: `videos.crop` \[0, 0, 64, 64\] reaches beyond the frame of .*32x32",
    ):
        prepare(videos_recipe(tmp_path / "data", videos, crop=(0, 0, 64, 64)), tmp_path / "run")


def test_hidden_files_are_no_clips(tmp_path, videos):
    for modality in ("rgb", "pose"):
        (videos / f"._a.{modality}.mp4").write_bytes(b"\0\5\x16\7 what macOS leaves on other file systems")
        (videos / f".hidden.{modality}.mp4").write_bytes(b"")
    prepare(videos_recipe(tmp_path / "data", videos, validation_fraction=0.0), tmp_path / "run")
    assert names(tmp_path / "data", "train") == set("abcd")


def test_names_that_are_not_text_are_reported_legibly_and_any_other_characters_are_accepted(tmp_path, videos, caplog):
    shutil.copy(videos / "a.rgb.mp4", os.fsencode(videos) + b"/\xfe.rgb.mp4")  # without a pose
    for name in (os.fsdecode(b"\xff"), "two\nlines"):
        for modality in ("rgb", "pose"):
            shutil.copy(videos / f"a.{modality}.mp4", videos / f"{name}.{modality}.mp4")
    with pytest.raises(VideoError) as raised:
        prepare(videos_recipe(tmp_path / "data", videos), tmp_path / "run")
    assert str(raised.value).splitlines()[1] == r"  \udcff: the name '\udcff' is not text in UTF-8; rename the files"
    prepare(videos_recipe(tmp_path / "data", videos, on_error="skip", min_clip_frames=8), tmp_path / "run2")
    assert names(tmp_path / "data", "train", "validation") == {*"abcd", "two\nlines"}
    assert (tmp_path / "data" / "damaged_videos.tsv").read_text().splitlines()[1].startswith(r"\udcff" + "\t")
    caplog.text.encode("utf-8")
    logged = [record.getMessage() for record in caplog.records]
    assert any("\\udcfe.rgb.mp4 is left out" in line for line in logged)
    assert all("two\nlines" not in line for line in logged)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_video_that_changes_while_it_is_read_is_refused(tmp_path, on_error):
    path = tmp_path / "a.rgb.mp4"
    path.write_bytes(b"first")

    def make() -> Iterator[ClipRecord]:
        yield random_clip(0)
        path.write_bytes(b"other")

    part = Part("a", make, PartSource("a", "a", (path,)))
    (tmp_path / ".parts").mkdir()
    damage = write_part(tmp_path, part, ShardFormat(), on_error=on_error)
    assert damage == "a.rgb.mp4 changed while it was read"
    left = tmp_path / ".parts" / "a"
    assert left.exists() == (on_error == "skip")
    assert not list((tmp_path / ".parts").rglob("*.mds*")), "no part of it is kept"
    assert on_error == "stop" or read_note(left).damage == damage


def test_an_error_while_videos_are_opened_leaves_the_rest_unopened(tmp_path, monkeypatch):
    write_videos(tmp_path, "clip_00", num_frames=4)
    names = [f"clip_{number:02d}" for number in range(40)]
    for name in names[1:]:
        for modality in ("rgb", "pose"):
            os.link(tmp_path / f"clip_00.{modality}.mp4", tmp_path / f"{name}.{modality}.mp4")
    opened, open_map = [], video_opening.open_map
    monkeypatch.setattr(
        video_opening, "open_map", lambda path, name: opened.append(path) or time.sleep(0.01) or open_map(path, name)
    )

    def lose(number: int) -> None:
        raise LostWorkerError("a rank is lost")

    with pytest.raises(LostWorkerError):
        check_videos(VideosSource(folder=str(tmp_path)), names, num_threads=2, on_video=lose)
    assert len(opened) < 20


@pytest.mark.slow
def test_an_interlaced_video_is_named_once_though_several_processes_read_it(tmp_path, caplog, capfd):
    folder = tmp_path / "videos"
    folder.mkdir()
    options = "-c:v libx264 -pix_fmt yuv420p -flags +ildct+ilme -x264-params tff=1"
    for modality in ("rgb", "pose"):
        write_by_ffmpeg(folder / f"a.{modality}.mp4", known_frames(20), options)
    recipe = videos_recipe(
        tmp_path / "data", folder, split_by="time", validation_fraction=0.5, crop_letterbox=False, num_workers=2
    )
    write_videos(folder, "b")  # with one part, no process would be started
    prepare(recipe, tmp_path / "run")
    warnings = [record.getMessage() for record in caplog.records if "interlaced" in record.getMessage()]
    assert sorted(text.partition(" is interlaced")[0] for text in warnings) == [
        str(folder / f"a.{modality}.mp4") for modality in ("pose", "rgb")
    ]
    assert "interlaced" not in capfd.readouterr().err, "a worker has written outside the log"
