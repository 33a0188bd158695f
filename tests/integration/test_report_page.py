"""The page of an evaluation: its videos hold the right pictures, and a real browser shows them in step."""

import io
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import Browser, require_chromium
from support.results import prepare_dancers, read_truths
from support.results import write_result as write_any_result

from dreamdance.evaluation.clips import ResultError, open_clips
from dreamdance.evaluation.evaluate import PartialTableError, evaluate
from dreamdance.evaluation.report_page import PAGE_FILE, SHOWN_FOLDER, write_report_page
from dreamdance.evaluation.scores import TABLES
from dreamdance.evaluation.shown_clip import Cell, cell_size
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table
from dreamdance.inference.results import ClipResult
from dreamdance.inference.results import write_result as write_clip_result
from dreamdance.media.video import read_frames
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.recipe.sections import Shards

NUM_FRAMES, HEIGHT, WIDTH, FPS = 6, 48, 32, 8.0
MAP_SIZE = (24, 16)
FACTOR = 4  # 32 pixels are shown as 128
BRIGHTER = {"dancer_1000000000": 0.1, "dancer_1000000001": 0.5, "dancer_1000000002": 0.3}
write_result = partial(write_any_result, reference_frame=NUM_FRAMES - 1, fps=FPS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = {"num_frames": NUM_FRAMES, "width": WIDTH, "height": HEIGHT, "fps": FPS}
    prepare_dancers(folder, num_train_clips=1, num_validation_clips=3, **sizes)
    return folder


@pytest.fixture(scope="module")
def truths(data):
    return read_truths(data / "validation", frame_size=(HEIGHT, WIDTH), map_size=MAP_SIZE)


@pytest.fixture(scope="module")
def run(data, truths, tmp_path_factory) -> Path:
    """A run with two results: `this run` with maps and poses as `animate` writes it, and `bare` with frames alone."""
    folder = tmp_path_factory.mktemp("a folder, with #odd%20 name")
    for name, truth in truths.items():
        pictures = truth.pictures
        frames = pictures.frames + BRIGHTER[name] * (1 - pictures.frames)
        write_clip_result(
            folder / "results" / name,
            ClipResult(
                reference=torch.zeros(3, HEIGHT, WIDTH),
                poses=as_clip(1 - poses_of(data, name) / 255),  # other poses than those of the truth
                frames=as_clip(frames),
                normals=as_clip(pictures.normals),
                depths=torch.from_numpy(1 - pictures.disparity)[:, None],
                fps=FPS,
            ),
            request={},
            details={"reference_frame": NUM_FRAMES - 1},
        )
        write_result(folder / "bare", name, pictures.frames * 0.9)
    evaluate(recipe_of(folder, data, bare=str(folder / "bare")), folder / "run")
    return folder / "run"


def poses_of(data, name):
    clips = open_clips(Shards(local=str(data / "validation")))
    return next(clip for clip in map(clips.clip, range(len(clips))) if clip.clip_id == name).frames("pose")


def as_clip(pictures) -> torch.Tensor:
    return torch.from_numpy(pictures.astype(np.float32)).movedim(-1, 1)


def recipe_of(folder: Path, data: Path, **compare: str) -> EvaluateRecipe:
    values = {"task": "evaluate", "name": "page", "results": str(folder / "results"), "compare": compare}
    values["metrics"] = {"protocols": ["disco"]}
    return EvaluateRecipe.model_validate_json(json.dumps({**values, "truth": {"local": str(data / "validation")}}))


def expected_cells(data, truths, name: str, frame: int) -> dict[tuple[str, str], np.ndarray]:
    """(row, kind) -> the picture `H W 3` in 0..255 at the frames' size, computed without the page's code."""
    truth = truths[name].pictures
    frames = truth.frames[frame]
    enlarged = partial(np.kron, b=np.ones((2, 2, 1)))
    normals = enlarged((truth.normals[frame] + 1) / 2)
    depth = enlarged(np.repeat(truth.disparity[frame][..., None], 3, axis=-1))
    cells = {
        ("", "reference"): truth.frames[NUM_FRAMES - 1],
        ("", "pose"): 1 - poses_of(data, name)[frame] / 255,
        (RESULT_ROW, "normals"): normals,
        (RESULT_ROW, "depth"): 1 - depth,
        (RESULT_ROW, "frames"): frames + BRIGHTER[name] * (1 - frames),
        ("bare", "frames"): frames * 0.9,
        (TRUTH_ROW, "normals"): normals,
        (TRUTH_ROW, "depth"): depth,
        (TRUTH_ROW, "frames"): frames,
    }
    return {key: 255 * picture for key, picture in cells.items()}


def test_the_video_of_a_clip_holds_every_picture_at_its_place(run, data, truths):
    for name in truths:
        described = json.loads((run / SHOWN_FOLDER / f"{name}.json").read_text())
        assert described["frames"] == list(range(NUM_FRAMES))
        video = read_frames(run / SHOWN_FOLDER / f"{name}.mp4")
        for frame in (0, 4):
            expected = expected_cells(data, truths, name, frame)
            assert [(cell["row"], cell["kind"]) for cell in described["cells"]] == list(expected)
            for place, picture in enumerate(expected.values()):
                line, column = divmod(place, described["columns"])
                top, left = line * described["height"], column * described["width"]
                found = video[frame, top : top + HEIGHT * FACTOR, left : left + WIDTH * FACTOR]
                assert np.abs(found[2::FACTOR, 2::FACTOR] - picture).mean() < 6, (name, frame, place)


def test_curves_are_the_scores_of_the_table_frame_by_frame(run, truths):
    table = json.loads((run / "table.json").read_text())
    for name, truth in truths.items():
        curves = json.loads((run / SHOWN_FOLDER / f"{name}.json").read_text())["curves"]
        scores = table["clips"][name]
        weights = {
            "l1": np.ones(NUM_FRAMES - 1),
            "l1_body": truth.frame_mask.sum(axis=(1, 2))[:-1],
            "abs_rel": truth.map_mask.sum(axis=(1, 2))[:-1],
        }
        for key, weight in weights.items():
            for row, curve in curves[key].items():
                assert curve[-1] is None, "the reference is not compared"
                assert np.average(curve[:-1], weights=weight) == pytest.approx(scores[row][key], rel=1e-4), (key, row)
        drift, means = curves["colour_drift"], 255 * truth.pictures.frames[:-1].mean(axis=(1, 2), dtype=np.float64)
        expected = np.abs(means - means[0]).mean(axis=-1)
        np.testing.assert_allclose(drift[TRUTH_ROW][:-1], expected, rtol=1e-4, atol=1e-4)
        # mixed with white, colours are nearer to each other; the result is stored as bytes
        np.testing.assert_allclose(drift[RESULT_ROW][:-1], (1 - BRIGHTER[name]) * expected, atol=0.1)
        assert set(drift["reference repeated"]) == {0.0, None}
    assert set(curves["abs_rel"]) == {RESULT_ROW, "reference repeated"}


NAMES = "cards.map((card) => card.clip.id)"


def choose(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.evaluate(
            f"(() => {{ const one = document.getElementById('{name}'); one.value = {json.dumps(value)};"
            "one.dispatchEvent(new Event('change')); })()"
        )


def test_a_browser_shows_all_pictures_of_a_frame_together_the_worst_clip_first(run, data, truths, tmp_path):
    require_chromium()
    worst = max(BRIGHTER, key=BRIGHTER.__getitem__)
    with Browser(tmp_path / "profile") as browser:
        browser.open(run / PAGE_FILE)
        assert browser.evaluate(NAMES) == sorted(BRIGHTER, key=BRIGHTER.__getitem__, reverse=True)
        browser.evaluate("cards[0].article.scrollIntoView()")
        browser.wait_for("cards[0].frame === 2")
        browser.wait_for("cards[0].frame === 1")  # it has begun again
        browser.evaluate("document.getElementById('play').click()")
        browser.evaluate("cards[0].seek(3)")
        browser.evaluate("document.getElementById('forth').click()")
        browser.wait_for("cards[0].frame === 4 && !cards[0].dirty")
        browser.screenshot(tmp_path / "page.png")
        boxes = browser.evaluate(
            "cards[0].canvases.map(({canvas}) => { const box = canvas.getBoundingClientRect();"
            "return [canvas.dataset.row, canvas.dataset.kind, box.x, box.y, box.width, box.height]; })"
        )
        assert browser.errors == []
    page = np.asarray(Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")).astype(float)
    expected = expected_cells(data, truths, worst, 4)
    checked = set()
    for row, kind, x, y, width, height in boxes:
        assert (width, height) == (WIDTH * FACTOR, HEIGHT * FACTOR)
        top, left = round(y), round(x)
        found = page[top : top + HEIGHT * FACTOR, left : left + WIDTH * FACTOR]
        if kind == "difference":
            gap = np.abs(expected[row, "frames"] - expected[TRUTH_ROW, "frames"])
            picture = np.minimum(4 * gap, 255)
        elif kind == "truth":
            picture = expected[TRUTH_ROW, "frames"]
        else:
            picture = expected["" if kind in ("reference", "pose") else row, kind]
        assert np.abs(found[2::FACTOR, 2::FACTOR] - picture).mean() < (16 if kind == "difference" else 6), (row, kind)
        checked.add((row, kind))
    assert len(checked) == 11  # 7 of this run, frames and difference of the other, two true maps


def test_the_page_sorts_by_any_score_and_difference_and_names_what_is_absent(run, tmp_path):
    require_chromium()
    with Browser(tmp_path / "profile") as browser:
        browser.open(run / PAGE_FILE)
        notes = browser.evaluate("document.getElementById('notes').textContent")
        assert "bare: 3 of 3 clips have no normals." in notes
        assert "3 of 3 results were made" not in notes, "these have their poses"
        empty = browser.evaluate("[...cards[0].article.querySelectorAll('.nothing')].map((one) => one.textContent)")
        assert empty == ["no normals", "no depth"]
        table = json.loads((run / "table.json").read_text())
        for metric, sign in (("psnr", 1), ("l1", -1)):
            choose(browser, metric=metric, of=json.dumps([RESULT_ROW, "bare"], separators=(",", ":")))
            gaps = {name: rows[RESULT_ROW][metric] - rows["bare"][metric] for name, rows in table["clips"].items()}
            assert browser.evaluate(NAMES) == sorted(gaps, key=lambda name: sign * gaps[name])
        choose(browser, metric="grain", of=json.dumps([RESULT_ROW, None], separators=(",", ":")))
        off = {name: abs(np.log(rows[RESULT_ROW]["grain"])) for name, rows in table["clips"].items()}
        assert browser.evaluate(NAMES) == sorted(off, key=lambda name: -off[name]), "1 is the best value"
        assert browser.evaluate("[0.5, 1.2, 1].map((value) => loss({ is_relative: true }, value))") == pytest.approx(
            [np.log(2), np.log(1.2), 0.0]
        )
        cells = browser.evaluate(
            "[...document.querySelectorAll('#tables table')[0].rows[1].cells].map((c) => c.textContent)"
        )
        assert cells[:2] == [RESULT_ROW, f"{table['rows'][RESULT_ROW]['angular_error_mean']:.2f}"]
        curves = "cards[0].article.querySelectorAll('svg').length"
        assert browser.evaluate(curves) == 5
        assert browser.evaluate("cards[0].article.querySelectorAll('path.truth').length") == 1, "only drift has one"
        assert browser.errors == []


def test_all_scores_of_a_clip_stand_under_the_heading_of_their_own_table(run, tmp_path):
    """L1 of the true protocol and that of DisCo's are not rows of one group."""
    require_chromium()
    with Browser(tmp_path / "profile") as browser:
        browser.open(run / PAGE_FILE)
        rows = browser.evaluate(
            "[...cards[0].article.querySelectorAll('.every tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
    groups: dict[str, list[str]] = {}
    heading = "none"
    for first, *others in rows[1:]:
        if others:
            groups[heading].append(first)
        else:
            heading = first
            assert groups.setdefault(heading, []) == [], "every heading stands once"
    titles = {title: [f"{metric.title} {metric.arrow}" for metric in metrics] for title, metrics in TABLES.items()}
    disco = "DisCo's protocol: bytes at 256x256, over the frames of all clips"
    assert groups[disco] == titles[disco][:4], "those that need no network"
    assert groups["Over time"] == titles["Over time"][:2]
    assert groups["Whole frames"][0] == "L1 of whole frames ↓"
    assert list(groups) == [title for title in TABLES if title in groups]


def test_a_page_of_a_hundred_clips_holds_few_videos_at_a_time_and_names_a_lost_one(run, tmp_path):
    require_chromium()
    name = next(iter(BRIGHTER))
    scores = json.loads((run / "table.json").read_text())["clips"][name]
    (tmp_path / SHOWN_FOLDER).mkdir()
    for number in range(100):
        for suffix in (".json", ".mp4"):
            os.link(run / SHOWN_FOLDER / f"{name}{suffix}", tmp_path / SHOWN_FOLDER / f"clip_{number}{suffix}")
    (tmp_path / SHOWN_FOLDER / "clip_7.mp4").unlink()
    clips = {f"clip_{number}": {**scores, RESULT_ROW: {"l1": 1 - number / 1000}} for number in range(100)}
    page = write_report_page(Table(clips["clip_0"], clips, compared=["bare"]), tmp_path)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        choose(browser, metric="l1")
        videos = "document.querySelectorAll('video').length"
        browser.evaluate("cards[7].article.scrollIntoView()")
        browser.wait_for("!cards[7].problem.hidden")
        browser.evaluate("cards[8].article.scrollIntoView()")
        browser.wait_for("cards[8].frame > 0")
        assert browser.evaluate("cards[7].problem.textContent").startswith("report/clip_7.mp4 is missing")
        browser.evaluate("cards[99].article.scrollIntoView()")
        browser.wait_for("cards[99].frame > 0 && !cards[8].video")
        assert 1 <= browser.evaluate(videos) <= 8
        assert browser.evaluate("cards[99].clip.id") == "clip_99"


def test_a_restarted_evaluation_makes_a_lost_video_again(data, truths, tmp_path):
    (first, truth), (second, other), _ = truths.items()
    write_result(tmp_path / "results", first, truth.pictures.frames)
    (tmp_path / "results" / ".entries.json").write_text(json.dumps([first, second]))
    with pytest.raises(PartialTableError):
        evaluate(recipe_of(tmp_path, data), tmp_path / "run")
    content = (tmp_path / "run" / PAGE_FILE).read_text()
    assert "This table is partial: 1 of 2 clips have no result yet" in content
    assert "results were made by a version that did not write the poses" in content
    video = tmp_path / "run" / SHOWN_FOLDER / f"{first}.mp4"
    before = video.read_bytes()
    video.unlink()
    write_result(tmp_path / "results", second, other.pictures.frames)
    (tmp_path / "results" / ".entries.json").unlink()
    evaluate(recipe_of(tmp_path, data), tmp_path / "run")
    assert video.read_bytes() == before
    assert "This table is partial" not in (tmp_path / "run" / PAGE_FILE).read_text()


def test_a_large_frame_is_reduced_and_a_small_one_enlarged_by_a_whole_factor():
    """Larger than the limit, a cell is the mean of the pixels that it covers; sizes stay even, as H.264 wants."""
    assert [cell_size(size) for size in ((96, 64), (768, 512), (384, 256), (45, 33))] == [
        (192, 128), (384, 256), (384, 256), (180, 132),
    ]  # fmt: skip
    ramp = np.linspace(0, 1, 12 * 8 * 3, dtype=np.float32).reshape(1, 12, 8, 3)
    drawn = Cell.of("", "frames", ramp, (6, 4)).draw(0, (6, 4))
    assert np.abs(drawn - 255 * ramp.reshape(6, 2, 4, 2, 3).mean(axis=(1, 3))).max() <= 1


def test_a_result_that_lacks_frames_is_refused_by_name(data, truths, tmp_path):
    name, truth = next(iter(truths.items()))
    write_result(tmp_path / "results", name, truth.pictures.frames)
    write_result(tmp_path / "short", name, truth.pictures.frames[:4])
    with pytest.raises(ResultError, match=f"result '{name}' of 'short' lacks 2 of the 6 frames"):
        evaluate(recipe_of(tmp_path, data, short=str(tmp_path / "short")), tmp_path / "run")
