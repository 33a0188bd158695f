"""Contact sheets and the page show every clip with all its maps; a real browser plays the page without an error."""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, require_chromium

from dreamdance.dancers.render import HELD_OUT_SEEDS
from dreamdance.data.curation.contact_sheet import draw_tile, join_tiles, write_contact_sheet
from dreamdance.data.curation.page import PageEntry, write_clip_video, write_page
from dreamdance.data.curation.scores import Scores
from dreamdance.data.curation.shown_clip import SHOWN_MAPS, ShownClip, score_texts, strip_frame
from dreamdance.data.writing.dancer_clips import render_record
from dreamdance.media.video import probe_video, read_frames
from dreamdance.recipe.schema import DancersSource

NUM_CLIPS = 3
SCORES = (
    Scores(cut=0.1, motion=0.3, sharpness=50.0, visible_joints=0.9, people=1, jitter=0.01, geometry_angle=9.5),
    Scores(cut=0.3, motion=0.1, sharpness=12345.678, visible_joints=0.7, people=2),
    Scores(cut=0.2, motion=0.2, people=1),
)
HOSTILE = 'evil </script><script>throw new Error("run")</script> & "name"'


@pytest.fixture(scope="module")
def clips() -> list[ShownClip]:
    source = DancersSource(num_train_clips=1, num_validation_clips=1, num_frames=10, width=64, height=96, fps=8.0)
    records = [render_record(HELD_OUT_SEEDS[seed], source) for seed in range(NUM_CLIPS)]
    return [
        ShownClip(f"clip_{number}", f"dance {number}.mp4, 0.0 to 1.2 s", record.fps, record.maps, SCORES[number])
        for number, record in enumerate(records)
    ]


@pytest.mark.parametrize("source", ["Танец.mp4, 0.0 to 1.2 s", "舞蹈.mp4", "café.mp4", "رقص.mp4"])
def test_a_name_that_the_font_cannot_show_leaves_the_id_alone(clips, source):
    alone, named = (draw_tile(replace(clips[0], source=text)) for text in ("", "dance.mp4"))
    np.testing.assert_array_equal(draw_tile(replace(clips[0], source=source)), alone)
    assert (named != alone).any()


def test_a_strip_shows_the_maps_in_their_order(clips):
    strip = strip_frame(clips[0], 4, height=96)
    assert strip.shape == (96, 5 * 64, 3)
    parts = dict(zip(SHOWN_MAPS, np.split(strip, 5, axis=1), strict=True))
    for name in ("rgb", "pose", "normal"):
        np.testing.assert_array_equal(parts[name], clips[0].maps[name][4])
    for name, scale in (("mask", 1), ("depth", 257)):
        expected = np.round(clips[0].maps[name][4] / scale)
        np.testing.assert_array_equal(parts[name], np.stack([expected] * 3, axis=-1))


def test_a_map_that_is_absent_is_grey(clips):
    bare = ShownClip("a", "", 8.0, {"rgb": clips[0].maps["rgb"]}, Scores())
    assert (strip_frame(bare, 0, height=48)[:, 32:] == 200).all()


def test_scores_are_short_texts():
    assert score_texts(SCORES[1]) == [
        "cut 0.3", "motion 0.1", "sharpness 1.23e+04", "visible_joints 0.7", "people 2", "jitter -", "geometry_angle -",
    ]  # fmt: skip


def test_a_sheet_holds_a_hundred_clips_in_order(tmp_path, clips):
    tiles = [draw_tile(clip) for clip in clips]
    path = tmp_path / "sheets" / "train_0000.png"
    write_contact_sheet(path, [tiles[number % NUM_CLIPS] for number in range(100)])
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    height, width = tiles[0].shape[:2]
    for number in (0, 1, 5, 99):
        top, left = 6 + (number // 4) * (height + 6), 6 + (number % 4) * (width + 6)
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], tiles[number % NUM_CLIPS])


def test_a_tile_shows_the_middle_frame_above_its_text(clips):
    tile = draw_tile(clips[0])
    strip = strip_frame(clips[0], 5, height=144)
    np.testing.assert_array_equal(tile[:144, : strip.shape[1]], strip)
    text = tile[144:]
    assert (text < 128).any()


def test_an_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="0 clips; 1 to 100"):
        join_tiles([])


def test_the_video_of_a_clip_is_its_strips(tmp_path, clips):
    entry = write_clip_video(tmp_path, clips[1])
    assert (entry.video, entry.width, entry.height) == ("clips/clip_1.mp4", 5 * 128, 192)
    video = probe_video(tmp_path / entry.video)
    assert (video.num_frames, video.width, video.height) == (10, 640, 192)
    difference = read_frames(video, [7])[0].astype(float) - strip_frame(clips[1], 7, height=192)
    assert np.abs(difference).mean() < 6


def test_the_page_names_no_outside_resource(tmp_path):
    page = write_page(tmp_path, [], title="Nothing").read_text()
    assert not re.search(r"https?:|//[a-z]", re.sub(r"//\s.*", "", page))


def write_dancer_page(folder: Path, clips: list[ShownClip]) -> Path:
    entries = [write_clip_video(folder, clip) for clip in clips]
    first = entries[0]
    entries[0] = PageEntry(first.clip_id, HOSTILE, first.video, first.width, first.height, first.scores)
    failures = {"cannot be decoded": ["a.mp4", HOSTILE], "no person": ["c.mp4"]}
    return write_page(folder, entries, title="Rendered dancers", failures=failures)


NAMES = "[...document.querySelectorAll('article h2')].map((one) => one.textContent)"


def sort_by(browser: Browser, key: int, *, descending: bool = False) -> list[str]:
    browser.evaluate(
        f"(() => {{ document.getElementById('key').value = '{key}';"
        f"document.getElementById('descending').checked = {str(descending).lower()};"
        "document.getElementById('key').dispatchEvent(new Event('change')); })()"
    )
    return list(browser.evaluate(NAMES))


def test_a_browser_plays_sorts_and_reports_no_error(tmp_path, clips):
    require_chromium()
    page = write_dancer_page(tmp_path / "a folder, with #odd%20 name", clips)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        videos = "[...document.querySelectorAll('video')]"
        browser.wait_for(f"{videos}.length === 3 && {videos}.every((one) => one.currentTime > 0.2 && !one.paused)")
        assert browser.evaluate(f"{videos}.map((one) => [one.videoWidth, one.videoHeight])") == [[640, 192]] * 3
        assert browser.evaluate("document.querySelector('article p').textContent") == HOSTILE
        assert browser.evaluate("document.querySelector('h1').textContent").startswith("Rendered dancers: rgb, pose")
        assert sort_by(browser, 1) == ["clip_1", "clip_2", "clip_0"]
        assert sort_by(browser, 1, descending=True) == ["clip_0", "clip_2", "clip_1"]
        assert sort_by(browser, 2) == ["clip_0", "clip_1", "clip_2"]  # the third has no sharpness: it comes last
        assert sort_by(browser, 2, descending=True) == ["clip_1", "clip_0", "clip_2"]
        failures = browser.evaluate("[...document.querySelectorAll('summary')].map((one) => one.textContent)")
        assert failures == ["cannot be decoded: 2", "no person: 1"]
        assert browser.evaluate("document.querySelectorAll('#failures li')[1].textContent") == HOSTILE
        browser.wait_for(f"{videos}.every((one) => one.currentTime > 0)")
        assert browser.errors == []


def test_the_controls_of_a_player_cover_nothing_of_its_picture(tmp_path, clips):
    require_chromium()
    page = write_dancer_page(tmp_path, clips)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        video = "document.querySelector('video')"
        note = "(_, frame) => { window.shown = Math.round(frame.mediaTime * 8); watch(); }"
        browser.evaluate(f"(function watch() {{ {video}.requestVideoFrameCallback({note}); }})()")
        browser.wait_for(f"{video}.currentTime > 0")
        browser.evaluate(f"{video}.pause()")
        browser.evaluate(f"{video}.currentTime = 0.3")
        browser.wait_for("window.shown === 2")
        rectangle = browser.evaluate(f"(() => {{ const r = {video}.getBoundingClientRect(); return [r.x, r.y]; }})()")
        left, top = map(round, rectangle)
        browser.move_mouse(left + 320, top + 96)
        time.sleep(0.5)  # the controls appear gradually
        browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        shown = np.asarray(picture.convert("RGB")).astype(float)
    feet = slice(192 - 70, 192)
    stored = read_frames(probe_video(tmp_path / "clips" / "clip_0.mp4"), [2])[0][feet].astype(float)
    difference = np.abs(shown[top + feet.start : top + feet.stop, left : left + 640] - stored)
    assert np.median(difference) < 4
    assert (difference.max(axis=-1) > 60).mean() < 0.01
    below = shown[top + 192 : top + 256, left : left + 640]
    assert (below > 200).any(), "the controls are there"


def test_many_clips_are_divided_into_pages(tmp_path, clips):
    require_chromium()
    entry = write_clip_video(tmp_path, clips[0])
    entries = [
        PageEntry(f"clip_{number:03d}", "", entry.video, entry.width, entry.height, Scores(motion=number / 1000))
        for number in range(130)
    ]
    page = write_page(tmp_path, entries, title="Many")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.evaluate(NAMES) == [f"clip_{number:03d}" for number in range(60)]
        for _ in range(2):
            browser.evaluate("document.getElementById('next').click()")
        assert browser.evaluate(NAMES) == [f"clip_{number:03d}" for number in range(120, 130)]
        assert browser.evaluate("document.getElementById('place').textContent") == "121 to 130 of 130"
        assert browser.evaluate("document.getElementById('next').disabled")
        assert browser.errors == []
