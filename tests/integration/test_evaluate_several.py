"""`evaluate` of several results: one table with a row for each, paired differences, and refusals of what differs."""

import json
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.results import prepare_dancers, read_truths
from support.results import write_result as write_any_result

from dreamdance.evaluation.clips import ResultError
from dreamdance.evaluation.evaluate import PartialTableError, evaluate
from dreamdance.evaluation.paired_differences import paired_differences
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW
from dreamdance.evaluation.trivial import FACING_CAMERA, MEAN_COLOUR, REPEATED_REFERENCE
from dreamdance.launch.finished import digest_inputs, is_finished, mark_finished
from dreamdance.recipe.schema import EvaluateRecipe

NUM_FRAMES, HEIGHT, WIDTH, FPS = 4, 48, 32, 8.0
MAP_SIZE = (24, 16)
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


def write_brighter(folder: Path, truths, amounts, **options) -> None:
    """Results whose frames are the truth, mixed with white by an amount for each clip."""
    for (name, truth), amount in zip(truths.items(), amounts, strict=True):
        pictures = truth.pictures
        frames = pictures.frames + amount * (1 - pictures.frames)
        write_result(folder, name, frames, pictures.normals, pictures.disparity, **options)


def make_recipe(tmp_path: Path, data: Path, **compare: str) -> EvaluateRecipe:
    values = {
        "task": "evaluate",
        "name": "several",
        "results": str(tmp_path / "new"),
        "compare": {name: str(tmp_path / folder) for name, folder in compare.items()},
        "truth": {"local": str(data / "validation")},
    }
    return EvaluateRecipe.model_validate_json(json.dumps(values))


def run(tmp_path: Path, data: Path, **compare: str) -> dict:
    evaluate(make_recipe(tmp_path, data, **compare), tmp_path / "run")
    return json.loads((tmp_path / "run" / "table.json").read_text())


def test_each_result_has_the_row_that_it_has_alone(tmp_path, data, truths):
    write_brighter(tmp_path / "new", truths, [0.1, 0.3, 0.2])
    write_brighter(tmp_path / "old", truths, [0.2, 0.2, 0.4])
    table = run(tmp_path, data, old="old", same="new")
    trivial = [REPEATED_REFERENCE, MEAN_COLOUR, FACING_CAMERA]
    assert list(table["rows"]) == [RESULT_ROW, "old", "same", *trivial, TRUTH_ROW]
    assert table["rows"]["same"] == table["rows"][RESULT_ROW]
    (tmp_path / "new").rename(tmp_path / "kept")
    (tmp_path / "old").rename(tmp_path / "new")
    evaluate(make_recipe(tmp_path, data), tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "table.json").read_text())
    assert table["rows"]["old"] == alone["rows"][RESULT_ROW]
    assert {name: rows["old"] for name, rows in table["clips"].items()} == {
        name: rows[RESULT_ROW] for name, rows in alone["clips"].items()
    }
    assert table["improvements"]["l1"]["best_trivial_answer"] in (REPEATED_REFERENCE, MEAN_COLOUR)
    assert table["protocol"]["results of old"] == str(tmp_path / "old")


def test_differences_are_paired_by_clips_in_the_table_too(tmp_path, data, truths):
    write_brighter(tmp_path / "new", truths, [0.1, 0.3, 0.2])
    write_brighter(tmp_path / "old", truths, [0.2, 0.2, 0.4])
    table = run(tmp_path, data, old="old")
    own, other = ([rows[name]["l1"] for rows in table["clips"].values()] for name in (RESULT_ROW, "old"))
    found = table["compared"]["old"]["l1"]
    assert found["difference"] == pytest.approx(np.mean(own) - np.mean(other), abs=1e-12)
    assert found["standard_error"] == pytest.approx(statistics.stdev(np.subtract(own, other)) / 3**0.5, rel=1e-9)
    assert (found["num_better"], found["num_clips"]) == (2, 3)
    lines = (tmp_path / "run" / "table.md").read_text().split("## Against the other results")[1].splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| l1 ")).split("|")[1:-1]]
    assert cells[3:5] == ["old", f"{np.mean(own) - np.mean(other):+.4f}"]
    assert cells[-1] == "2 of 3 clips"


def test_a_higher_score_is_better_where_the_metric_says_so_and_clips_without_it_do_not_count():
    clips = {
        "a": {"x": {"psnr": 20.0, "l1": 0.1}, "y": {"psnr": 22.0, "l1": 0.2}},
        "b": {"x": {"psnr": 25.0}, "y": {"psnr": 21.0, "l1": 0.2}},
    }
    found = paired_differences(clips, "x", "y")
    assert (found["psnr"].difference, found["psnr"].num_better, found["psnr"].num_clips) == (1.0, 1, 2)
    assert (found["l1"].num_better, found["l1"].num_clips, found["l1"].standard_error) == (1, 1, None)
    assert set(found) == {"psnr", "l1"}


def test_what_cannot_be_compared_is_refused_by_name(tmp_path, data, truths):
    write_brighter(tmp_path / "new", truths, [0.1] * 3)
    write_brighter(tmp_path / "other", truths, [0.1] * 3, reference_frame=0)
    with pytest.raises(ResultError, match="of 'odd' has other frames, or another reference, than that of `results`"):
        run(tmp_path, data, odd="other")
    for name, truth in truths.items():
        write_result(tmp_path / "small", name, truth.pictures.frames[:, ::2, ::2])
    with pytest.raises(
        ResultError, match=r"results of 'small' have frames of \(24, 16\).*\(48, 32\).*\(key: compare\)"
    ):
        run(tmp_path, data, small="small")


def test_results_without_maps_stand_beside_those_with_maps(tmp_path, data, truths):
    write_brighter(tmp_path / "new", truths, [0.1] * 3)
    for name, truth in truths.items():
        write_result(tmp_path / "bare", name, truth.pictures.frames)
    table = run(tmp_path, data, bare="bare")
    assert "abs_rel" in table["rows"][RESULT_ROW]
    assert table["rows"]["bare"]["l1"] < 1e-6
    assert "abs_rel" not in table["rows"]["bare"]
    assert "abs_rel" not in table["compared"]["bare"]


def test_a_clip_that_one_result_lacks_is_left_out_or_awaited_by_name(tmp_path, data, truths, caplog):
    write_brighter(tmp_path / "new", truths, [0.1] * 3)
    (first, truth), (second, _), (third, _) = truths.items()
    write_result(tmp_path / "old", first, truth.pictures.frames)
    table = run(tmp_path, data, old="old")
    assert list(table["clips"]) == [first]
    assert f"result '{second}' is left out: ['old'] lack it" in caplog.text
    (tmp_path / "old" / ".entries.json").write_text(json.dumps([first, third]))
    with pytest.raises(PartialTableError, match=f"1 of 2 clips have no result yet \\('{third}'\\)"):
        run(tmp_path, data, old="old")


def test_a_new_result_in_any_folder_makes_the_table_out_of_date(tmp_path, data, truths):
    write_brighter(tmp_path / "new", truths, [0.1] * 3)
    write_brighter(tmp_path / "old", truths, [0.2] * 3)
    recipe = make_recipe(tmp_path, data, old="old")
    run(tmp_path, data, old="old")
    mark_finished(recipe, tmp_path / "run", digest_inputs(recipe, tmp_path))
    assert is_finished(recipe, tmp_path / "run")
    write_result(tmp_path / "old", "new_clip", np.zeros((2, 8, 8, 3)))
    assert not is_finished(recipe, tmp_path / "run")
