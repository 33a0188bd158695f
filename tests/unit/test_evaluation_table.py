"""The table of an evaluation: best rivals, directions of metrics, plain JSON; trivial answers; results on disk."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamdance.errors import MissingInputError
from dreamdance.evaluation.clips import Prediction, Result, ResultError, Truth, find_results, read_result
from dreamdance.evaluation.scores import (
    BODY_METRICS,
    DISCO_METRICS,
    GEOMETRY_METRICS,
    IMPROVEMENT_KEYS,
    METRICS,
    TABLES,
    as_bytes,
    mean_scores,
    score,
    score_disco,
)
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table, compare_with_trivial
from dreamdance.evaluation.times import pair_frames
from dreamdance.evaluation.trivial import (
    FACING_CAMERA,
    MEAN_COLOUR,
    MEAN_OF_TRAINING,
    REPEATED_REFERENCE,
    TrainingMean,
    trivial_answers,
)
from dreamdance.media.transforms import decode_normals

NUM_FRAMES, HEIGHT, WIDTH = 3, 16, 12


def random_truth(seed: int = 0, *, num_frames: int = NUM_FRAMES) -> Truth:
    generator = np.random.default_rng(seed)
    normals = generator.normal(size=(num_frames, HEIGHT, WIDTH, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    mask = np.zeros((num_frames, HEIGHT, WIDTH), dtype=bool)
    mask[:, 3:13, 2:10] = True
    return Truth(
        pictures=Prediction(
            frames=generator.uniform(size=(num_frames, HEIGHT, WIDTH, 3)).astype(np.float32),
            normals=normals.astype(np.float32),
            disparity=generator.uniform(0.1, 1.0, size=(num_frames, HEIGHT, WIDTH)).astype(np.float32),
        ),
        frame_mask=mask,
        map_mask=mask,
        depth_range=(0.2, 0.7),
        camera=None,
    )


def test_the_truth_is_never_the_best_rival() -> None:
    rows = {RESULT_ROW: {"l1": 0.2}, TRUTH_ROW: {"l1": 0.0}, "a": {"l1": 0.3}}
    assert compare_with_trivial(rows)["l1"].answer == "a"
    assert compare_with_trivial({RESULT_ROW: {"l1": 0.2}, TRUTH_ROW: {"l1": 0.0}}) == {}


@pytest.mark.parametrize("key", IMPROVEMENT_KEYS)
def test_the_best_rival_is_the_best_in_the_metrics_own_direction(key: str) -> None:
    higher = key.startswith("psnr")
    rows = {RESULT_ROW: {key: 4.0}, "low": {key: 2.0}, "high": {key: 8.0}}
    entry = compare_with_trivial(rows)[key]
    assert entry.answer == ("high" if higher else "low")
    assert entry.relative == pytest.approx(-0.5 if higher else -1.0)
    better = compare_with_trivial({**rows, RESULT_ROW: {key: 16.0 if higher else 1.0}})[key]
    assert better.relative > 0


def test_a_metric_that_a_row_lacks_is_shown_as_a_dash_and_compared_in_the_other_rows() -> None:
    rows = {RESULT_ROW: {"l1": 0.2, "psnr": 20.0}, "a": {"l1": 0.3}, "b": {"psnr": math.nan, "l1": 0.4}}
    table = Table({RESULT_ROW: rows[RESULT_ROW], "a": rows["a"]})
    assert set(table.improvements()) == {"l1"}
    lines = [line for line in table.as_markdown().splitlines() if line.startswith("| a ")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["a", "0.3000", "-"]
    assert Table(rows).as_json()["rows"]["b"] == {"l1": 0.4}, "metrics that could not be measured are absent"


def test_a_rival_without_any_error_leaves_no_share_and_the_json_stays_json() -> None:
    """In a clip without motion the repeated reference is perfect, so no share of its error exists."""
    rows = {RESULT_ROW: {"l1": 0.25}, REPEATED_REFERENCE: {"l1": 0.0}}
    table = Table(rows)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content = json.loads(json.dumps(table.as_json()), parse_constant=refuse)
    assert content["improvements"]["l1"] == {
        "value": 0.25, "best_trivial": 0.0, "best_trivial_answer": REPEATED_REFERENCE
    }  # fmt: skip
    (line,) = [line for line in table.as_markdown().splitlines() if line.startswith("| l1 ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["l1", "0.2500", "0.0000", REPEATED_REFERENCE, "-"]


def test_markdown_tables_are_rectangular_with_arrows_and_their_own_digits() -> None:
    rows = {RESULT_ROW: {metric.key: 0.123456 for metric in METRICS}, "a": {metric.key: 2.0 for metric in METRICS}}
    clips = {"clip_1": rows, "clip_2": rows}
    text = Table(rows, clips, {"frames": "few", "sizes": [1, 2]}).as_markdown()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == len(TABLES) + 2
    for block in blocks:
        assert len({len(line) for line in block}) == 1
        assert set(block[1]) <= set("|- ")
    for metric in METRICS:
        assert f"{metric.title} {metric.arrow}" in text
    assert {metric.key: metric.arrow for metric in METRICS if metric.key in ("l1", "psnr", "grain")} == {
        "l1": "↓",
        "psnr": "↑",
        "grain": "→ 1",
    }
    assert "0.1235" in blocks[0][2]
    assert "0.12 " in blocks[0][2]
    assert "1.23e-01" in blocks[list(TABLES.values()).index(DISCO_METRICS)][2]
    assert text.endswith("* frames: few\n* sizes: 1, 2\n")


def test_clips_are_shown_one_by_one_only_while_they_fit_on_a_page() -> None:
    rows = {RESULT_ROW: {"l1": 0.2, "psnr": 20.0}, "a": {"l1": 0.3, "psnr": 18.0}}
    for count, shown in ((1, False), (2, True), (12, True), (13, False)):
        text = Table(rows, {f"clip_{i}": rows for i in range(count)}).as_markdown()
        assert ("## Clip by clip" in text) == shown, count
    assert "| clip_11 | 0.2000 " in Table(rows, {f"clip_{i}": rows for i in range(12)}).as_markdown()


def test_a_mean_is_over_the_clips_that_have_the_number() -> None:
    clips = [{"l1": 0.1, "psnr_body": math.nan}, {"l1": 0.3, "psnr_body": 30.0}, {"l1": 0.5}]
    assert mean_scores(clips) == {"l1": pytest.approx(0.3), "psnr_body": 30.0}
    assert mean_scores([{"psnr_body": math.nan}]) == {}
    disco = [{"l1_disco": 0.7, "l1": 0.7}, {"l1_disco": 0.9, "l1": 0.9}, {"l1": 0.1}]
    assert mean_scores(disco[:2], [64, 20]) == {"l1": pytest.approx(0.8), "l1_disco": pytest.approx(62.8 / 84)}
    assert mean_scores(disco, [64, 20, 9])["l1_disco"] == pytest.approx(62.8 / 84)
    assert list(mean_scores([{"ssim": 1.0, "l1": 0.0, "abs_rel": 0.5}])) == ["abs_rel", "l1", "ssim"]


def test_the_truth_scores_perfectly_against_itself_in_every_metric_there_is() -> None:
    truth = random_truth()
    scores = score(truth.pictures, truth)
    expected = {metric.key for metric in (*GEOMETRY_METRICS, *BODY_METRICS)} - {"consistency_angle"}  # needs a camera
    assert set(scores) == expected | {"l1", "psnr", "ssim", "grain", "grain_distance"}
    bytes_of_truth = as_bytes(truth.pictures.frames)
    scores |= score_disco(bytes_of_truth, bytes_of_truth)
    for key in ("l1", "l1_body", "l1_disco", "abs_rel", "abs_rel_aligned_in_body", "grain_distance"):
        assert scores[key] == pytest.approx(0.0, abs=1e-6), key
    for key in ("ssim", "ssim_body", "ssim_disco", "delta_1.25", "grain"):
        assert scores[key] == pytest.approx(1.0, abs=1e-6), key
    assert scores["psnr"] == scores["psnr_body"] == scores["psnr_disco"] == 100
    assert scores["angular_error_mean"] < 0.1


def test_blur_in_one_clip_and_grain_in_another_do_not_cancel_in_the_distance_of_detail() -> None:
    truth = random_truth()
    middle, detail = 0.5, truth.pictures.frames - 0.5
    clips = [score(Prediction(frames=middle + factor * detail), truth) for factor in (np.sqrt(0.5), np.sqrt(1.5))]
    means = mean_scores(clips)
    assert means["grain"] == pytest.approx(1.0, abs=1e-6)
    assert means["grain_distance"] == pytest.approx(0.5, abs=1e-6)


def test_body_scores_look_inside_the_body_alone() -> None:
    truth = random_truth()
    frames = truth.pictures.frames.copy()
    frames[~truth.frame_mask] = 1.0 - frames[~truth.frame_mask]
    scores = score(Prediction(frames=frames), truth)
    assert scores["l1_body"] == 0.0
    assert scores["l1"] > 0.1
    assert "angular_error_mean" not in scores, "without maps there is nothing to measure"


def test_metrics_of_maps_that_the_shards_lack_are_not_measured() -> None:
    truth = random_truth()
    blind = Truth(Prediction(frames=truth.pictures.frames), None, None, None, None)
    of_frames = {"l1", "psnr", "ssim", "grain", "grain_distance"}
    assert set(score(truth.pictures, blind)) == {*of_frames, "consistency_parallel_frame"}
    assert blind.metric_disparity is None


@pytest.mark.parametrize("depth_range", [(0.2, 0.7), None])
def test_maps_of_a_clip_without_a_mask_are_measured_over_whole_frames(depth_range) -> None:
    """Real clips: no body mask, and often a disparity without a unit."""
    masked = random_truth()
    truth = Truth(masked.pictures, None, None, depth_range, None)
    scores = score(truth.pictures, truth)
    depth = "abs_rel_frame" if depth_range else "disparity_l1_frame"
    whole = {"angular_error_mean_frame", "angular_error_median_frame", depth, "consistency_parallel_frame"}
    assert set(scores) == {"l1", "psnr", "ssim", "grain", "grain_distance", *whole}
    assert scores[depth] == pytest.approx(0.0, abs=1e-6)
    turned = Prediction(normals=-truth.pictures.normals, disparity=truth.pictures.disparity[:, ::-1])
    assert score(turned, truth)["angular_error_mean_frame"] == pytest.approx(180.0, abs=0.1)
    assert score(turned, truth)[depth] > 0.1


def test_bytes_round_and_clamp() -> None:
    values = np.array([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 3.0], dtype=np.float32)
    assert as_bytes(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_disparity_is_metric_by_the_clips_own_range() -> None:
    truth = random_truth()
    metric = truth.metric_disparity
    assert metric is not None
    np.testing.assert_allclose(metric, 0.2 + 0.5 * truth.pictures.disparity, rtol=1e-6)


def test_choosing_frames_selects_from_every_array() -> None:
    truth, chosen = random_truth(), [2, 0, 2]
    part = truth.at(chosen)
    for whole, found in (
        (truth.pictures.frames, part.pictures.frames),
        (truth.pictures.normals, part.pictures.normals),
        (truth.pictures.disparity, part.pictures.disparity),
        (truth.frame_mask, part.frame_mask),
        (truth.map_mask, part.map_mask),
    ):
        assert np.array_equal(found, whole[chosen])
    assert part.depth_range == truth.depth_range
    assert Truth(Prediction(), None, None, None, None).at([0]).pictures.frames is None


def test_trivial_answers_look_at_the_reference_or_at_nothing() -> None:
    reference = random_truth(num_frames=1)
    answers = trivial_answers(reference, 4, None)
    assert list(answers) == [REPEATED_REFERENCE, MEAN_COLOUR, FACING_CAMERA]
    repeated = answers[REPEATED_REFERENCE]
    for part, one in (
        (repeated.frames, reference.pictures.frames),
        (repeated.normals, reference.pictures.normals),
        (repeated.disparity, reference.pictures.disparity),
    ):
        assert len(part) == 4
        assert all(np.array_equal(frame, one[0]) for frame in part)
    colours = answers[MEAN_COLOUR].frames
    body = reference.pictures.frames[reference.frame_mask]
    np.testing.assert_allclose(colours[3, 0, 0], body.mean(axis=0), rtol=1e-5)
    assert (colours == colours[0, 0, 0]).all()
    assert answers[MEAN_COLOUR].normals is None
    facing = answers[FACING_CAMERA]
    assert facing.normals.shape == repeated.normals.shape
    assert (facing.normals == decode_normals(torch.full((3, 1, 1), 0.5)).view(3).numpy()).all()
    assert facing.frames is None
    assert facing.disparity is None
    mean = TrainingMean(random_truth(seed=1, num_frames=1).pictures, 7)
    assert np.array_equal(trivial_answers(reference, 4, mean)[MEAN_OF_TRAINING].frames[2], mean.pictures.frames[0])


def write_result(folder: Path, details: str = '{"fps": 8}', **arrays: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(details)
    frames = np.zeros((2, 6, 4, 3), dtype=np.uint8)
    np.savez(folder / "arrays.npz", **{"frames": frames, **arrays})
    return folder


def test_a_result_has_its_sizes_its_reference_frame_and_its_folders_name(tmp_path: Path) -> None:
    normals, depths = np.zeros((2, 3, 2, 3), dtype=np.float16), np.zeros((2, 3, 2), dtype=np.float16)
    result = read_result(
        write_result(tmp_path / "clip", '{"fps": 8, "reference_frame": 5}', normals=normals, depths=depths)
    )
    assert (result.id, result.num_frames, result.reference_frame) == ("clip", 2, 5)
    assert (result.frame_size, result.map_size) == ((6, 4), (3, 2))
    assert result.prediction.normals.dtype == np.float32
    bare = read_result(write_result(tmp_path / "bare"))
    assert (bare.map_size, bare.reference_frame) == (bare.frame_size, None)


def test_frames_of_a_result_are_shares_of_full_brightness(tmp_path: Path) -> None:
    frames = np.arange(72, dtype=np.uint8).reshape(1, 6, 4, 3)
    found = read_result(write_result(tmp_path / "clip", frames=frames)).frames
    np.testing.assert_allclose(found, frames / 255.0, rtol=1e-6)


@pytest.mark.parametrize("damage", ["no json", "a list", "no arrays", "no frames", "pickled", "cut"])
def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path, damage: str) -> None:
    folder = write_result(tmp_path / "clip")
    arrays = folder / "arrays.npz"
    if damage in ("no json", "a list"):
        (folder / "result.json").write_text("{" if damage == "no json" else "[1]")
    elif damage == "no arrays":
        arrays.unlink()
    elif damage == "no frames":
        np.savez(arrays, normals=np.zeros(3))
    elif damage == "pickled":
        np.savez(arrays, frames=np.array([{"code": "runs"}], dtype=object))
    else:
        arrays.write_bytes(arrays.read_bytes()[:60])
    with pytest.raises(ResultError, match=r"result .*clip is damaged \(.*\); delete it and run animate again"):
        read_result(folder)


def test_results_are_found_by_name_without_those_being_written(tmp_path: Path) -> None:
    for name in ("b", "a", ".c.partial"):
        write_result(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert [path.name for path in find_results(tmp_path)] == ["a", "b"]
    with pytest.raises(MissingInputError, match=r"holds no results \(key: results\); run the animate recipe first"):
        find_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("num_result", "result_fps", "num_true", "true_fps"),
    [
        (10, 8, 10, 8),
        (7, 8, 10, 8),
        (12, 8, 10, 8),
        (5, 15, 10, 30),
        (20, 60, 10, 30),
        (8, 24, 11, 30),
        (9, 25, 10, 30),
    ],
)
def test_frames_are_compared_where_their_times_are_the_same(num_result, result_fps, num_true, true_fps):
    times = {Fraction(frame, true_fps): frame for frame in range(num_true)}
    same = [(i, times[time]) for i in range(num_result) if (time := Fraction(i, result_fps)) in times]
    assert len(same) > 1
    assert pair_frames(blank_result(num_result, result_fps), num_frames=num_true, fps=true_fps) == same


def test_a_rate_written_in_two_ways_is_one_rate():
    long = [(frame, frame) for frame in range(400)]
    assert pair_frames(blank_result(400, 30.0), num_frames=500, fps=30_000 / 1001) == long
    assert pair_frames(blank_result(400, 29.97), num_frames=400, fps=30_000 / 1001) == long


def test_rates_that_drift_apart_over_a_long_clip_are_two_rates():
    """29.95 and 30 differ by 0.17 %: five frames after 3,000."""
    pairs = pair_frames(blank_result(3000, 29.95), num_frames=3001, fps=30)
    assert pairs[0] == (0, 0)
    assert pairs[-1][1] - pairs[-1][0] == 5
    assert max(abs(Fraction(frame) / Fraction("29.95") - Fraction(true, 30)) for frame, true in pairs) < Fraction(
        1, 290
    )
    with pytest.raises(ResultError, match=r"plays the 3000 frames .* at 30 .* set it to 29\.97, and run animate"):
        pair_frames(blank_result(3000, 30.0), num_frames=3000, fps=30_000 / 1001)


def blank_result(num_frames: int, fps: float) -> Result:
    return Result("clip", Prediction(np.zeros((num_frames, 2, 2, 3), np.float32)), fps=fps, reference_frame=None)
