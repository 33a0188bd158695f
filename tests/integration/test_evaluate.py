"""The evaluation of results against rendered truth: perfect answers score perfectly, trivial ones like their rows."""

import json
import logging
import os
import re
import shutil
import signal
import time
import zipfile
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from support.fault_log import record_fault
from support.faulty_shares import STEP_TIMEOUT_SECONDS, FaultInShare, fail_and_start_again, start_task
from support.networks import require_weights
from support.random_shards import stored_clip
from support.results import prepare_dancers, read_truths
from support.results import write_result as write_any_result

from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.errors import MissingInputError
from dreamdance.evaluation.clips import Prediction, Result, ResultError, open_clips, read_result
from dreamdance.evaluation.compared_frames import ComparedFrames
from dreamdance.evaluation.evaluate import PartialTableError, evaluate, evaluate_clip
from dreamdance.evaluation.measured import EvaluatedClip, MeasuredClips, read_result_states
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table
from dreamdance.evaluation.trivial import (
    FACING_CAMERA,
    MEAN_COLOUR,
    MEAN_COLOUR_OF_FRAME,
    MEAN_OF_TRAINING,
    REPEATED_REFERENCE,
    average_training_set,
)
from dreamdance.inference.results import ClipResult
from dreamdance.inference.results import write_result as write_clip_result
from dreamdance.launch.finished import digest_inputs, is_finished, mark_finished
from dreamdance.media.grids import GridRow
from dreamdance.recipe.schema import EvaluateRecipe
from dreamdance.recipe.sections import Shards

NUM_FRAMES, HEIGHT, WIDTH, FPS = 5, 48, 32, 8.0
MAP_SIZE = (24, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of rendered dancers, written by the real task: four for training, three held out."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"num_frames": NUM_FRAMES, "width": WIDTH, "height": HEIGHT, "fps": FPS}
    prepare_dancers(folder, num_train_clips=4, num_validation_clips=3, **sizes)
    return folder


@pytest.fixture
def truths(data):
    return read_truths(data / "validation", frame_size=(HEIGHT, WIDTH), map_size=MAP_SIZE)


write_result = partial(write_any_result, reference_frame=NUM_FRAMES - 1, fps=FPS)


def make_recipe(tmp_path, data, *, training_set: bool = False, **more) -> EvaluateRecipe:
    values = {
        "task": "evaluate",
        "name": "tiny_evaluate",
        "results": str(tmp_path / "results"),
        "truth": {"local": str(data / "validation")},
        "training_set": {"local": str(data / "train")} if training_set else None,
        **more,
    }
    return EvaluateRecipe.model_validate_json(json.dumps(values))


def run(tmp_path, data, *, training_set: bool = False, **more) -> dict:
    evaluate(make_recipe(tmp_path, data, training_set=training_set, **more), tmp_path / "run")
    return json.loads((tmp_path / "run" / "table.json").read_text())


def test_a_perfect_result_has_no_error_beyond_its_half_precision(tmp_path, data, truths):
    for name, truth in truths.items():
        pictures = truth.pictures
        write_result(tmp_path / "results", name, pictures.frames, pictures.normals, 0.5 * pictures.disparity + 0.2)
    row = run(tmp_path, data)["rows"][RESULT_ROW]
    assert row["angular_error_mean"] < 0.05
    assert row["abs_rel"] < 1e-3
    assert row["abs_rel_aligned_in_body"] < 1e-3
    assert row["delta_1.25"] == 1.0
    assert row["l1_body"] < 1e-6
    assert row["psnr_body"] > 60
    assert row["ssim"] == pytest.approx(1.0, abs=1e-6)


def test_results_are_read_as_the_animate_task_writes_them(tmp_path, data, truths):
    name, truth = next(iter(truths.items()))
    frames, normals = (
        torch.from_numpy(part).movedim(-1, 1) for part in (truth.pictures.frames, truth.pictures.normals)
    )
    depths = torch.from_numpy(truth.pictures.disparity)[:, None]
    result = ClipResult(frames[-1], poses=frames, frames=frames, normals=normals, depths=depths, fps=8.0)
    write_clip_result(
        tmp_path / "results" / name, result, request={"seed": 0}, details={"reference_frame": NUM_FRAMES - 1}
    )
    row = run(tmp_path, data)["rows"][RESULT_ROW]
    assert row["angular_error_mean"] < 0.05
    assert row["psnr"] > 60


def test_repeating_the_reference_scores_as_that_trivial_answer_and_improves_on_nothing(tmp_path, data, truths):
    for name, truth in truths.items():
        last = truth.at([NUM_FRAMES - 1] * NUM_FRAMES).pictures
        write_result(tmp_path / "results", name, last.frames, last.normals, last.disparity)
    table = run(tmp_path, data)
    result, trivial = table["rows"][RESULT_ROW], table["rows"][REPEATED_REFERENCE]
    assert set(result) == set(trivial)
    for key, value in trivial.items():
        assert result[key] == pytest.approx(value, rel=2e-2, abs=2e-3), key
    assert abs(table["improvements"]["angular_error_mean"]["relative_improvement"]) < 0.01


def test_the_reference_frame_itself_is_left_out(tmp_path, data, truths):
    """Only the reference frame is right: the score must not show that."""
    for name, truth in truths.items():
        frames = np.zeros_like(truth.pictures.frames)
        frames[-1] = truth.pictures.frames[-1]
        write_result(tmp_path / "results", name, frames)
    row = run(tmp_path, data)["rows"][RESULT_ROW]
    expected = np.mean([np.abs(truth.pictures.frames[:-1]).mean(dtype=np.float64) for truth in truths.values()])
    assert row["l1"] == pytest.approx(expected, rel=1e-5)


def test_all_rows_are_there_and_the_best_trivial_answer_is_chosen(tmp_path, data, truths):
    for name, truth in truths.items():
        pictures = truth.pictures
        write_result(tmp_path / "results", name, pictures.frames, pictures.normals, pictures.disparity)
    table = run(tmp_path, data, training_set=True)
    rows = table["rows"]
    trivial = [REPEATED_REFERENCE, MEAN_COLOUR, FACING_CAMERA, MEAN_OF_TRAINING]
    assert list(rows) == [RESULT_ROW, *trivial, TRUTH_ROW]
    assert set(rows[TRUTH_ROW]) == {"consistency_angle", "flicker", "colour_drift"}
    assert rows[TRUTH_ROW]["consistency_angle"] == pytest.approx(rows[RESULT_ROW]["consistency_angle"], abs=0.5)
    assert "angular_error_mean" not in rows[MEAN_COLOUR]
    improvement = table["improvements"]["angular_error_mean"]
    assert improvement["best_trivial"] == min(
        rows[name]["angular_error_mean"] for name in (REPEATED_REFERENCE, FACING_CAMERA, MEAN_OF_TRAINING)
    )
    assert set(rows[FACING_CAMERA]) == {key for key in rows[RESULT_ROW] if key.startswith("angular_error")}
    assert improvement["relative_improvement"] > 0.99
    assert table["improvements"]["psnr_body"]["best_trivial"] == max(
        rows[name]["psnr_body"] for name in (REPEATED_REFERENCE, MEAN_COLOUR, MEAN_OF_TRAINING)
    )
    assert set(table["clips"]) == set(truths)


def test_the_table_is_logged_and_saved_and_the_overview_is_large_enough_to_look_at(tmp_path, data, truths, caplog):
    for name, truth in truths.items():
        pictures = truth.pictures
        write_result(tmp_path / "results", name, pictures.frames, pictures.normals, pictures.disparity)
    with caplog.at_level(logging.INFO):
        run(tmp_path, data)
    markdown = (tmp_path / "run" / "table.md").read_text()
    assert markdown in caplog.text
    for expected in (
        "depth: AbsRel ↓",
        "colour drift (of 255) ↓",
        "one scale and shift per clip",
        "* reference: frame 4 of each clip, its last",
        "against that of frame 0 of each clip",
        "fvd, fid_vid: metrics.networks",
    ):
        assert expected in markdown
    overview = Image.open(tmp_path / "run" / "overview.png")
    assert overview.height >= 3 * 192
    assert overview.width >= 7 * 128


def test_networks_protocols_a_split_and_the_first_frame_as_reference_make_the_table_of_a_benchmark(
    tmp_path, data, truths
):
    weights = require_weights("lpips/alexnet.ckpt", "i3d/i3d-kinetics-400.ckpt")
    for name, truth in truths.items():
        write_result(tmp_path / "results", name, 0.5 * truth.pictures.frames, reference_frame=None)
    (tmp_path / "split.txt").write_text("\n".join(list(truths)[:2]))
    networks = ["lpips_alex", "fvd", "fid_vid"]
    metrics = {"networks": networks, "protocols": ["disco"], "weights": str(weights), "width": 40, "height": 64}
    table = run(tmp_path, data, split=str(tmp_path / "split.txt"), reference_frame=0, metrics=metrics)
    assert list(table["clips"]) == list(truths)[:2]
    row, repeated = table["rows"][RESULT_ROW], table["rows"][REPEATED_REFERENCE]
    expected = np.mean([0.5 * truth.pictures.frames[1:].mean() for truth in list(truths.values())[:2]])
    assert row["l1"] == pytest.approx(expected, rel=0.01), "all frames but the first"
    assert row["lpips_alex"] > 0
    assert repeated["lpips_alex"] > 0
    assert row["l1_disco"] == pytest.approx(expected * 255 / 256**2, rel=0.02)
    assert "flicker" in table["rows"][TRUTH_ROW]
    protocol = table["protocol"]
    assert protocol["frames"].endswith("both then at 40x64")
    assert protocol["reference"] == "frame 0 of each clip, its first"
    assert "against that of frame 1 of each clip, since frame 0 is the reference" in protocol["over time"]
    assert "papers" not in protocol["protocol disco"]
    assert protocol["fvd"].endswith("not measured: no clip has 16 frames that follow one another")
    assert "SHA-256 443c5bc35326b81e" in protocol["lpips_alex"]
    if not (weights / "resnet3d").is_dir():
        assert "resnet-50-kinetics.pth: the weights of 3D ResNet-50 (FID-VID) are missing" in protocol["fid_vid"]


def test_frames_without_maps_are_measured_as_frames(tmp_path, data, truths):
    for name, truth in truths.items():
        write_result(tmp_path / "results", name, truth.pictures.frames)
    table = run(tmp_path, data)
    assert "abs_rel" not in table["rows"][RESULT_ROW]
    assert "psnr_body" in table["rows"][RESULT_ROW]
    assert "angular_error_mean" not in table["improvements"]
    assert "inside the true body mask" in table["protocol"]["body"]
    assert table["protocol"]["geometry"].startswith("not measured")


def test_footage_without_mask_or_maps_is_measured_over_whole_frames():
    """The output of `prepare` for plain videos: rgb and pose alone."""
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    clip = stored_clip(ClipRecord(clip_id="video", fps=8.0, maps={"rgb": frames}))
    result = Result("video", Prediction(frames=frames.astype(np.float32) / 255), fps=8.0, reference_frame=0)
    scores = evaluate_clip(result, clip, None).scores
    without_trivial = {row: scores[row] for row in (RESULT_ROW, TRUTH_ROW)}  # compared as text: a flicker is NaN here
    assert repr(evaluate_clip(result, clip, None, has_trivial=False).scores) == repr(without_trivial)
    assert scores[RESULT_ROW]["psnr"] == 100
    assert set(scores[RESULT_ROW]) == {"l1", "psnr", "ssim", "grain", "grain_distance", "flicker", "colour_drift"}
    assert list(scores) == [RESULT_ROW, REPEATED_REFERENCE, MEAN_COLOUR_OF_FRAME, TRUTH_ROW]
    assert scores[MEAN_COLOUR_OF_FRAME]["l1"] < scores[REPEATED_REFERENCE]["l1"]


def test_results_of_a_shorter_or_smaller_kind_are_compared_at_their_own_size(tmp_path, data, truths):
    for name, truth in truths.items():
        small = truth.pictures.frames[:3].reshape(3, HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(2, 4))
        write_result(tmp_path / "results", name, small)
    row = run(tmp_path, data)["rows"][RESULT_ROW]
    assert row["l1"] < 0.02


def test_a_result_of_half_the_frame_rate_is_compared_at_the_times_that_it_has(tmp_path, data, truths):
    for name, truth in truths.items():
        write_result(tmp_path / "results", name, truth.pictures.frames[::2], fps=FPS / 2)
    table = run(tmp_path, data)
    assert table["rows"][RESULT_ROW]["l1"] < 1e-6, "by number, frame 1 would be compared with frame 2's picture"
    assert table["protocol"]["clips"].endswith(f"; {2 * len(truths)} frames"), "0 and 2; 4 is the reference"


def test_a_result_that_plays_its_clips_frames_at_another_rate_is_refused_by_name(tmp_path, data, truths):
    name, truth = next(iter(truths.items()))
    write_result(tmp_path / "results", name, truth.pictures.frames, fps=2 * FPS)
    with pytest.raises(
        ResultError, match=rf"'{name}' plays the 5 frames of its clip at 16 .* set it to 8, and run animate"
    ):
        run(tmp_path, data)


def test_a_table_is_out_of_date_when_its_inputs_were_replaced(tmp_path, data, truths):
    local = shutil.copytree(data / "validation", tmp_path / "data" / "validation")
    for name, truth in truths.items():
        write_result(tmp_path / "results", name, truth.pictures.frames)
    recipe = make_recipe(tmp_path, tmp_path / "data")
    run(tmp_path, tmp_path / "data")
    mark_finished(recipe, tmp_path / "run", digest_inputs(recipe, tmp_path))
    assert is_finished(recipe, tmp_path / "run")
    shard = next(local.glob("*.mds*"))
    for path in (tmp_path / "results" / name / "arrays.npz", shard):
        content, before = path.read_bytes(), path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not is_finished(recipe, tmp_path / "run"), path
        path.write_bytes(content)
    run(tmp_path, tmp_path / "data")
    assert is_finished(recipe, tmp_path / "run")


def test_a_measured_result_is_known_by_its_content_and_one_that_changed_meanwhile_is_named(tmp_path, data):
    """A `chmod` or a hard link changes times; rank 0 must neither measure again because of that nor wait for ever."""
    paths = [tmp_path / "results" / name for name in ("kept", "replaced")]
    measured = MeasuredClips(tmp_path / "measured", make_recipe(tmp_path, data))
    for path in paths:
        write_result(path.parent, path.name, np.zeros((2, 4, 4, 3)))
        assert not measured.holds(path)
        measured.write(
            path,
            EvaluatedClip(
                {RESULT_ROW: {"l1": 0.5}},
                GridRow(path.name, []),
                ComparedFrames((0, 1), None, 2),
                read_result_states(path),
            ),
        )
        (path / "arrays.npz").chmod(0o640)
        os.link(path / "result.json", tmp_path / f"{path.name}.json")
        os.utime(path / "result.json")
        assert measured.holds(path)
    shown = []
    measured.check(paths, shown.append)
    assert shown == [path.name for path in paths]
    arrays = paths[1] / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
    assert not measured.holds(paths[1])
    with pytest.raises(ResultError, match=r"1 of the 2 results changed while they were measured \('replaced'\)"):
        measured.check(paths, shown.append)
    assert measured.read(paths[0]).scores == {RESULT_ROW: {"l1": 0.5}}


def test_results_without_truth_are_reported_and_left_out(tmp_path, data, truths, caplog):
    name, truth = next(iter(truths.items()))
    write_result(tmp_path / "results", name, truth.pictures.frames, reference_frame=None)
    write_result(tmp_path / "results", "somebody_else", truth.pictures.frames)
    table = run(tmp_path, data)
    assert set(table["clips"]) == {name}
    assert "'somebody_else' is left out: no clip in " in caplog.text
    assert "the last frame is assumed" in caplog.text


def test_a_table_made_before_animate_has_ended_names_the_missing_clips_and_is_completed_later(
    tmp_path, data, truths, caplog
):
    (first, truth), (second, other), (third, _) = truths.items()
    write_result(tmp_path / "results", first, truth.pictures.frames)
    entries = tmp_path / "results" / ".entries.json"  # `somebody_else` has no truth, and can never be compared
    entries.write_text(json.dumps([first, second, third, "somebody_else"]))
    note = f"This table is partial: 2 of 3 clips have no result yet ('{second}', '{third}'); when animate has made"
    with caplog.at_level(logging.INFO), pytest.raises(PartialTableError, match=re.escape(note)):
        run(tmp_path, data)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert (table["missing"], list(table["clips"])) == ([second, third], [first])
    assert (tmp_path / "run" / "table.md").read_text().startswith(note)
    shown = json.loads((tmp_path / "run" / "logs" / "progress.jsonl").read_text().splitlines()[-1])["message"]
    assert shown.index(note) < shown.index("| this run")
    assert caplog.text.index(note) < caplog.text.index("| this run")
    write_result(tmp_path / "results", second, other.pictures.frames)
    entries.write_text(json.dumps([first, second]))
    table = run(tmp_path, data)
    assert (table["missing"], list(table["clips"])) == ([], [first, second])
    assert "partial" not in (tmp_path / "run" / "table.md").read_text()
    entries.write_text("{}")
    with pytest.raises(ResultError, match=r"is damaged .*must be a list of ids.*give the command of animate again"):
        run(tmp_path, data)


def test_unusable_results_are_named(tmp_path, data, truths):
    with pytest.raises(MissingInputError, match="holds no results"):
        run(tmp_path, data)
    (name, truth), (other, _), *_ = truths.items()
    write_result(tmp_path / "results", "somebody_else", truth.pictures.frames)
    with pytest.raises(MissingInputError, match="none of the 1 results"):
        run(tmp_path, data)
    write_result(tmp_path / "results", name, truth.pictures.frames)
    write_result(tmp_path / "results", other, truth.pictures.frames[:, ::2, ::2])
    with pytest.raises(ResultError, match="has another size"):
        run(tmp_path, data)
    (tmp_path / "results" / name / "arrays.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ResultError, match="is damaged"):
        run(tmp_path, data)


class _Runs:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


def hostile_arrays(path, kind: str, ran) -> None:
    """An archive of arrays that `animate` never writes."""
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    match kind:
        case "pickle":
            np.savez(path, frames=np.array([_Runs(ran)], dtype=object))
            np.load(path, allow_pickle=True)["frames"]
            assert ran.is_dir(), "the pickle does run code when it is unpickled"
            ran.rmdir()
            return
        case "other type":
            np.savez(path, frames=frames.astype(np.float64))
            return
        case "bomb":  # 64 MiB of zeros in 64 KiB, and a header that claims 3 TB of them
            shape, filler = (1_000_000, 1000, 1000, 3), bytes(1 << 26)
        case "claims more than it holds":
            shape, filler = (10, 1000, 1000, 3), b"few"
        case "holds more than it claims":
            shape, filler = (1, 1, 1, 3), bytes(1 << 26)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("frames.npy", "w") as stored:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stored, header)
        stored.write(filler)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pickle", "'frames' is object .* it must be uint8 of 4 dimensions"),
        ("other type", "'frames' is float64"),
        ("bomb", "'frames' would take 3000000000000 bytes; up to 8589934592 are read"),
        ("claims more than it holds", "'frames' holds 3 bytes, but its shape .* needs 30000000"),
        ("holds more than it claims", "'frames' holds 67108864 bytes, but its shape .* needs 3"),
    ],
)
def test_hostile_arrays_are_refused_before_they_run_or_fill_the_memory(tmp_path, kind, expected):
    folder, ran = tmp_path / "results" / "clip", tmp_path / "ran"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    hostile_arrays(folder / "arrays.npz", kind, ran)
    with pytest.raises(ResultError, match=rf"result .*clip is damaged \({expected}.*run animate again") as raised:
        read_result(folder)
    assert not ran.exists()
    record_fault(
        "hostile arrays in a result",
        how=kind,
        promised="refused because of the header, nothing unpickled or unpacked",
        happened=str(raised.value),
    )


REFERENCES, RATES = ('"1"', "-1", "1.5"), ("0", '"8"', "NaN", "Infinity", "true", "null")


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, "[]", "\0", '{"reference_frame": 1}'),
        *(f'{{"fps": 8, "reference_frame": {number}}}' for number in REFERENCES),
        *(f'{{"fps": {number}}}' for number in RATES),
    ],
)
def test_an_invalid_description_is_named(tmp_path, text):
    write_result(tmp_path, "clip", np.zeros((2, 4, 4, 3)))
    assert read_result(tmp_path / "clip").reference_frame == NUM_FRAMES - 1
    (tmp_path / "clip" / "result.json").write_text(text)
    with pytest.raises(ResultError, match="clip is damaged"):
        read_result(tmp_path / "clip")


def test_the_training_sets_mean_has_unit_normals_and_the_mean_of_the_frames(data):
    mean = average_training_set(Shards(local=str(data / "train")), frame_size=(HEIGHT, WIDTH), map_size=MAP_SIZE)
    assert mean.num_clips == 4
    np.testing.assert_allclose(np.linalg.norm(mean.pictures.normals, axis=-1), 1, atol=1e-5)
    clips = open_clips(Shards(local=str(data / "train")))
    frames = np.concatenate([clips.clip(number).frames("rgb") for number in range(4)])
    np.testing.assert_allclose(mean.pictures.frames[0], frames.mean(axis=0) / 255, atol=1e-5)


def test_an_improvement_is_a_share_of_the_best_trivial_answer_in_the_metrics_own_direction():
    rows = {
        RESULT_ROW: {"abs_rel": 0.06, "psnr": 22.0},
        "a": {"abs_rel": 0.1, "psnr": 20.0},
        "b": {"abs_rel": 0.08, "psnr": 10.0},
        TRUTH_ROW: {"consistency_angle": 1.0},
    }
    found = Table(rows).improvements()
    assert (found["abs_rel"].answer, found["abs_rel"].relative) == ("b", pytest.approx(0.25))
    assert (found["psnr"].answer, found["psnr"].relative) == ("a", pytest.approx(0.1))
    markdown = Table(rows).as_markdown()
    assert "25.0 % better" in markdown
    assert "2.00 dB better" in markdown
    assert "2.00 dB worse" in Table({**rows, RESULT_ROW: {"psnr": 18.0}}).as_markdown()


def test_a_few_clips_are_listed_singly_each_with_its_best_trivial_answer():
    good = {RESULT_ROW: {"l1": 0.01, "psnr": 30.0}, "a": {"l1": 0.02, "psnr": 25.0}, "b": {"l1": 0.03, "psnr": 26.0}}
    bad = {RESULT_ROW: {"l1": 0.09, "psnr": 10.0}, "a": {"l1": 0.02, "psnr": 25.0}, "b": {"l1": 0.01, "psnr": 27.0}}
    markdown = Table(good, clips={"good": good, "bad": bad}).as_markdown()
    lines = {
        line.split("|")[1].strip(): line for line in markdown.split("## Clip by clip")[1].splitlines() if "|" in line
    }
    assert [cell.strip() for cell in lines["good"].split("|")[2:-1]] == ["0.0100", "0.0200 (a)", "30.00", "26.00 (b)"]
    assert [cell.strip() for cell in lines["bad"].split("|")[2:-1]] == ["0.0900", "0.0100 (b)", "10.00", "27.00 (b)"]
    many = {f"clip {number}": good for number in range(100)}
    assert "Clip by clip" not in Table(good, clips=many).as_markdown()


def test_where_there_are_masks_single_clips_are_compared_inside_the_body():
    rows = {RESULT_ROW: {"l1": 0.5, "l1_body": 0.01, "psnr_body": 30.0}, "a": {"l1": 0.5, "l1_body": 0.02}}
    lines = Table(rows, clips={"one": rows, "two": rows}).as_markdown().split("## Clip by clip")[1].splitlines()
    (one,) = [line for line in lines if "| one" in line]
    assert [cell.strip() for cell in one.split("|")[2:-1]] == ["0.0100", "0.0200 (a)", "-", "-"]


@dataclass(frozen=True)
class ChangeTimes(FaultInShare):
    """After the other rank has measured its two clips, files of all results change their times and permissions."""

    def __call__(self) -> None:
        while len(list(self.flag.glob("run/measured/[!.]*.npz"))) < 2:
            time.sleep(0.05)
        for path in self.flag.glob("results/*/arrays.npz"):
            path.chmod(0o640)


@pytest.mark.slow
@pytest.mark.distributed
def test_rights_that_change_between_a_measurement_and_the_table_keep_no_rank_waiting(tmp_path, data, truths):
    for name, truth in truths.items():
        write_result(tmp_path / "results", name, truth.pictures.frames)
    fault = ChangeTimes(rank=0, number=None, piece=1, flag=tmp_path)
    with start_task(make_recipe(tmp_path, data), tmp_path, fault=fault) as ranks:
        for process in ranks.processes:
            process.join(60)
            assert process.exitcode == 0, ranks.output()
    assert set(json.loads((tmp_path / "run" / "table.json").read_text())["clips"]) == set(truths)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (1, r"LostWorkerError: rank 1 has given no sign for \d+ s: the other ranks have done its share"),
        (0, r"LostWorkerError: rank 0 has given no sign for \d+ s: the other ranks have done its share"),
    ],
    ids=["rank 1", "rank 0"],
)
def test_the_share_of_a_stopped_rank_is_measured_by_the_other(tmp_path, data, truths, rank, expected):
    for name, truth in truths.items():
        last = truth.at([NUM_FRAMES - 1] * NUM_FRAMES).pictures
        write_result(tmp_path / "results", name, last.frames, last.normals, last.disparity)
    alone = run(tmp_path, data)
    for made in ("measured", "logs/done"):
        shutil.rmtree(tmp_path / "run" / made, ignore_errors=True)
    table = tmp_path / "run" / "table.json"
    table.unlink()
    fault = FaultInShare(rank, signal.SIGSTOP, 1, tmp_path / "faulty")
    detection = fail_and_start_again(make_recipe(tmp_path, data), tmp_path, fault, table.is_file)
    assert re.search(expected, detection.output), detection.output
    assert json.loads(table.read_text()) == alone
    assert not (tmp_path / "run" / "measured").exists()
    record_fault(
        f"rank {rank} of evaluate stopped (SIGSTOP)",
        how=f"in the middle of its share, on 2 ranks; cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}",
        promised="the other measures its clips and ends; the next start finds all done",
        happened="as promised, nothing was measured twice, and the table equals that of an undisturbed run",
        detected_seconds=detection.seconds,
    )
