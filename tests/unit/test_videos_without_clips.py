"""Sound videos that give no clip: each has one reason, in the log, in a table, in `status` and on the page."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.true_maps import FOLDER, NAME, write_truth
from support.video_folders import damage_video, stored_clips, videos_recipe, write_videos

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data import writing_report
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.clip_record import NoClips
from dreamdance.data.writing.video_clips import VideoPart
from dreamdance.errors import ShardError
from dreamdance.launch.status import details
from dreamdance.media.video import write_video
from dreamdance.recipe import dump_recipe
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.layout import RECIPE_FILE, progress_file

WIDTH, HEIGHT, FPS = 48, 72, 8
SECTION = {"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False}


@pytest.fixture
def plain_videos(tmp_path, monkeypatch) -> Path:
    """A dancer of 16 frames, an empty stage of 16 frames and a dancer of 5."""
    open_networks.cache_clear()
    monkeypatch.setenv(FOLDER, str(tmp_path / "truth"))
    clip = render_clip(HELD_OUT_SEEDS[3], num_frames=16, width=WIDTH, height=HEIGHT, fps=FPS)
    write_truth(tmp_path / "truth", "dance", clip)
    folder = tmp_path / "videos"
    write_video(folder / "dance.mp4", clip.rgb, fps=FPS)
    write_video(folder / "short.mp4", clip.rgb[:5], fps=FPS)
    write_video(folder / "empty.mp4", np.full((16, HEIGHT, WIDTH, 3), 90, np.uint8), fps=FPS)
    return folder


def run_details(recipe, run: Path) -> list[str]:
    (run / RECIPE_FILE).write_text(dump_recipe(recipe))
    return details(run).splitlines()


def test_videos_without_a_person_or_too_short_are_counted_by_reason(tmp_path, plain_videos, caplog):
    output = tmp_path / "data"
    recipe = videos_recipe(
        output, plain_videos, annotators=SECTION, validation_fraction=0.0, crop_letterbox=False, min_clip_frames=8
    )
    prepare(recipe, tmp_path / "run")
    assert {clip.clip_id for clip in stored_clips(output, "train")} == {"dance.train.0000", "dance.train.0001"}
    nobody = "nobody is seen in most of the frames of any clip"
    rows = (output / "videos_without_clips.tsv").read_text().splitlines()
    assert rows == [
        "video\treason",
        f"empty\tno clip: {nobody}",
        "short\tno clip: it has 5 frames; a clip has at least 8 (`videos.min_clip_frames`)",
    ]
    about_empty = [record.getMessage() for record in caplog.records if "empty" in record.getMessage()]
    assert about_empty[0] == f"empty gives no train clip: {nobody}"
    assert about_empty[1:] == [
        f"2 sound videos gave no clip, or none for one split, see {output / 'videos_without_clips.tsv'}:\n"
        "  1 x no clip: it has 5 frames; a clip has at least 8 (`videos.min_clip_frames`) (short)\n"
        f"  1 x no clip: {nobody} (empty)"
    ]
    assert "  videos       1 x no clip: nobody is seen" in "\n".join(run_details(recipe, tmp_path / "run"))
    page = (output / "contact_sheets" / "index.html").read_text()
    shown = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])["failures"]
    assert {failure["reason"]: failure["names"] for failure in shown} == {
        f"no clip: {nobody}": ["empty"],
        "no clip: it has N frames; a clip has at least N (`videos.min_clip_frames`)": ["short"],
    }
    assert json.loads(progress_file(tmp_path / "run").read_text().splitlines()[-1])["videos_without_clips"] == 2
    # Another start of the complete output finds the same, without the videos' maps.
    (output / "videos_without_clips.tsv").unlink()
    prepare(recipe, tmp_path / "run")
    assert (output / "videos_without_clips.tsv").read_text().splitlines() == rows


def test_a_video_too_short_for_validation_has_the_reason_of_that_split(tmp_path, caplog):
    write_videos(tmp_path / "videos", "long", num_frames=40)
    write_videos(tmp_path / "videos", "middle", num_frames=20)
    write_videos(tmp_path / "videos", "tiny", num_frames=3)
    output = tmp_path / "data"
    recipe = videos_recipe(
        output, tmp_path / "videos", split_by="time", validation_fraction=0.2, min_clip_frames=8, clip_frames=8
    )
    prepare(recipe, tmp_path / "run")
    rows = dict(line.split("\t") for line in (output / "videos_without_clips.tsv").read_text().splitlines()[1:])
    assert rows["middle"] == (
        "no validation clip: the last 20 % of its 20 frames, which are for validation (`videos.split_by`, "
        "`videos.validation_fraction`), are 4 frames; a clip has at least 8 (`videos.min_clip_frames`)"
    )
    assert rows["tiny"].startswith("no train clip: the first 80 % of its 3 frames")
    assert "; no validation clip: the last 20 % of its 3 frames" in rows["tiny"]
    assert set(rows) == {"middle", "tiny"}


def test_an_empty_validation_set_is_an_error_that_names_the_share_and_the_keys(tmp_path):
    write_videos(tmp_path / "videos", "one", num_frames=20)
    recipe = videos_recipe(
        tmp_path / "data", tmp_path / "videos", split_by="time", validation_fraction=0.2, min_clip_frames=8
    )
    with pytest.raises(ShardError) as raised:
        prepare(recipe, tmp_path / "run")
    head, reason, advice = str(raised.value).splitlines()
    assert head == f"there are no clips to write into {tmp_path / 'data' / 'validation'}:"
    assert "the last 20 % of its 20 frames" in reason
    assert reason.endswith("are 4 frames; a clip has at least 8 (`videos.min_clip_frames`) (one)")
    assert advice.startswith("Lower `videos.min_clip_frames`, raise `videos.validation_fraction`, or set ")
    assert (tmp_path / "data" / "videos_without_clips.tsv").is_file()


def test_the_reason_counts_the_frames_that_are_kept(tmp_path):
    write_videos(tmp_path, "one", num_frames=20)
    source = VideosSource(folder=str(tmp_path), frame_stride=3, min_clip_frames=8, validation_fraction=0.0)
    (found,) = VideoPart(source, "one", "one", "train")()
    assert found == NoClips(
        "it has 7 frames at `videos.frame_stride` 3; a clip has at least 8 (`videos.min_clip_frames`)"
    )


def test_tables_of_an_earlier_run_are_not_counted_by_the_next(tmp_path, monkeypatch):
    """The tables of the earlier run are replaced before the writing begins, also while it goes on."""
    monkeypatch.setattr(writing_report, "COUNT_SECONDS", 0.0)
    monkeypatch.setattr(writing_report, "FAILURES_SECONDS", 0.0)
    for seed, name in enumerate("abc"):
        write_videos(tmp_path / "videos", name, seed=seed)
    write_videos(tmp_path / "videos", "tiny", num_frames=3)
    damage_video(tmp_path / "videos" / "b.rgb.mp4")
    output = tmp_path / "data"
    output.mkdir()
    (output / "damaged_videos.tsv").write_text("video\tdamage\nx\tbroken\ny\tbroken\n")
    (output / "videos_without_clips.tsv").write_text("video\treason\nz\tno clip: old\n")
    recipe = videos_recipe(output, tmp_path / "videos", on_error="skip", validation_fraction=0.0)
    prepare(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in progress_file(tmp_path / "run").read_text().splitlines()]
    assert {line.get("videos_left_out", 0) for line in lines} <= {0, 1}
    assert {line.get("videos_without_clips", 0) for line in lines} <= {0, 1}
    assert (lines[-1]["videos_left_out"], lines[-1]["videos_without_clips"]) == (1, 1)
    assert [line.split("\t")[0] for line in (output / "videos_without_clips.tsv").read_text().splitlines()] == [
        "video",
        "tiny",
    ]
