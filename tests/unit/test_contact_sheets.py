"""`prepare` shows what it stored: sheets of all clips and a page that plays them, continued after a kill."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, require_chromium
from support.fault_log import record_fault
from support.killed_drawing import draw_in
from support.ranks import StartedRanks
from support.video_folders import damage_video, stored_clips, videos_recipe, write_videos

from dreamdance.data import contact_sheets
from dreamdance.data.contact_sheets import StoredFrames
from dreamdance.data.curation.shown_clip import SHOWN_MAPS
from dreamdance.data.prepare import prepare
from dreamdance.media.video import probe_video, read_frames
from dreamdance.recipe.schema import DancersSource, PrepareRecipe

NUM_TRAIN, NUM_VALIDATION, NUM_FRAMES = 4, 2, 6
WIDTH, HEIGHT = 96, 144


def dancers_recipe(output, **changes):
    source = DancersSource(
        num_train_clips=NUM_TRAIN,
        num_validation_clips=NUM_VALIDATION,
        num_frames=NUM_FRAMES,
        width=WIDTH,
        height=HEIGHT,
    )
    settings = {"name": "p", "task": "prepare", "output": str(output), "dancers": source, "num_workers": 1}
    return PrepareRecipe(**settings, **changes)


@pytest.fixture(scope="module")
def dancers(tmp_path_factory):
    output = tmp_path_factory.mktemp("dancers") / "data"
    prepare(dancers_recipe(output, page_clips=3), output.parent / "run")
    return output


def test_a_sheet_shows_the_stored_middle_frames(dancers):
    with Image.open(dancers / "contact_sheets" / "train_0000.png") as picture:
        sheet = np.asarray(picture)
    clips = stored_clips(dancers, "train")
    tile_width = (sheet.shape[1] - 6) // NUM_TRAIN - 6
    for number, clip in enumerate(clips):
        left = 6 + number * (tile_width + 6)
        for place, name in enumerate(SHOWN_MAPS):
            shown = sheet[6 : 6 + HEIGHT, left + place * WIDTH : left + (place + 1) * WIDTH]
            stored = clip.pictures(name, [NUM_FRAMES // 2])[0].astype(float)
            expected = np.round(stored / 257) if name == "depth" else stored
            np.testing.assert_array_equal(shown, np.broadcast_to(expected, shown.shape))


def test_the_page_plays_clips_spread_over_both_splits(dancers, tmp_path):
    folder = dancers / "contact_sheets"
    train, validation = stored_clips(dancers, "train"), stored_clips(dancers, "validation")
    played = [train[0], train[2], validation[0]]
    assert {path.stem for path in (folder / "clips").iterdir()} == {clip.clip_id for clip in played}
    for clip in played:
        video = probe_video(folder / "clips" / f"{clip.clip_id}.mp4")
        assert (video.num_frames, video.width, video.height) == (NUM_FRAMES, 5 * 128, 192)
        picture = Image.fromarray(clip.frames("normal", [4])[0]).resize((128, 192), Image.Resampling.BILINEAR)
        assert np.abs(read_frames(video, [4])[0][:, 512:].astype(float) - np.asarray(picture)).mean() < 6
    require_chromium()
    with Browser(tmp_path / "profile") as browser:
        browser.open(folder / "index.html")
        videos = "[...document.querySelectorAll('video')]"
        browser.wait_for(f"{videos}.length === 3 && {videos}.every((one) => one.currentTime > 0.2)")
        assert browser.evaluate("document.querySelector('h1').textContent").startswith("data, 3 of 6 clips")
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == []


def test_a_killed_start_is_continued_and_a_complete_one_writes_nothing(dancers, tmp_path):
    folder = dancers / "contact_sheets"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    prepare(dancers_recipe(dancers, page_clips=3), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    page = (folder / "index.html").read_bytes()
    for lost in ("index.html", "validation_0000.png", f"clips/{stored_clips(dancers, 'validation')[0].clip_id}.mp4"):
        (folder / lost).unlink()
    prepare(dancers_recipe(dancers, page_clips=3), tmp_path / "run")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert after[folder / "train_0000.png"] == before[folder / "train_0000.png"], "it is not drawn again"
    assert (folder / "index.html").read_bytes() == page


def draw_on_two_ranks(output: Path, last_clips: tuple[int, int]) -> list[int]:
    """The exit codes of two ranks, each of which is killed at its n-th clip; 0: when the other one has been killed."""
    arguments = {
        "recipe": dancers_recipe(output, page_clips=4).model_dump_json(),
        "run_folder": str(output.parent / "run"),
        "last_clips": last_clips,
    }
    with StartedRanks(draw_in, 2, output.parent / "ranks", **arguments) as ranks:
        return ranks.wait()


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_are_killed_while_they_draw_leave_the_pictures_of_one_rank(dancers, tmp_path, monkeypatch):
    """First both ranks are killed; in the next start one is killed, and the other one does its share."""
    folders = [tmp_path / name / "data" for name in ("whole", "killed")]
    for folder in folders:
        shutil.copytree(dancers, folder, ignore=shutil.ignore_patterns("contact_sheets"))
    with monkeypatch.context() as small_sheets:
        small_sheets.setattr(contact_sheets, "CLIPS_PER_SHEET", 1)
        prepare(dancers_recipe(folders[0], page_clips=4), tmp_path / "run")
    whole, killed = (folder / "contact_sheets" for folder in folders)
    assert draw_on_two_ranks(folders[1], (3, 2)) == [-signal.SIGKILL] * 2
    assert len(list(killed.glob("[!.]*.png"))) == 3, "the sheets that they had finished"
    assert not (killed / "index.html").exists()
    assert draw_on_two_ranks(folders[1], (0, 1)) == [0, -signal.SIGKILL]
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert len(files) == NUM_TRAIN + NUM_VALIDATION + 4 + 1, "sheets, clips and the page"
    assert {path.relative_to(killed): path.read_bytes() for path in killed.rglob("*") if path.is_file()} == files
    record_fault(
        "ranks killed while they draw contact sheets",
        how="SIGKILL of both ranks in the middle of a sheet; in the next start SIGKILL of one of them",
        promised="the next start, or the other rank, draws the rest; all files equal those of one rank",
        happened="all sheets, clips and the page equal, byte for byte",
    )


def test_frames_are_read_one_at_a_time(dancers):
    clip = stored_clips(dancers, "train")[1]
    frames = StoredFrames(clip, "depth")
    assert (len(frames), frames.shape) == (NUM_FRAMES, (NUM_FRAMES, HEIGHT, WIDTH))
    np.testing.assert_array_equal(frames[5], clip.frames("depth")[5])


def test_videos_without_clips_are_on_the_page_by_reason(tmp_path):
    for number, name in enumerate("abcd"):
        write_videos(tmp_path / "videos", name, seed=number)
    for name in "bd":
        damage_video(tmp_path / "videos" / f"{name}.rgb.mp4")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", on_error="skip", validation_fraction=0)
    prepare(recipe, tmp_path / "run")
    text = (tmp_path / "data" / "contact_sheets" / "index.html").read_text()
    content = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert [clip["source"] for clip in content["clips"]][:2] == ["a.rgb.mp4, from frame 0", "a.rgb.mp4, from frame 8"]
    (group,) = content["failures"]
    assert sorted(group["names"]) == ["b", "d"]
    assert group["reason"].startswith("<clip>.rgb.mp4: frame N of N cannot be decoded")


def test_they_can_be_switched_off(tmp_path):
    write_videos(tmp_path / "videos", "a")
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", validation_fraction=0)
    prepare(recipe.model_copy(update={"contact_sheets": False}), tmp_path / "run")
    assert not (tmp_path / "data" / "contact_sheets").exists()
