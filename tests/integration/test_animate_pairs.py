"""Cross-identity: `animate` drives a rendered dancer by another's poses, and `evaluate` knows the exact truth."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.recipes import HEIGHT, WIDTH
from support.results import prepare_dancers
from support.tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.evaluation.evaluate import evaluate
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW
from dreamdance.inference.animate import animate
from dreamdance.media.video import read_frames
from dreamdance.recipe.schema import AnimateRecipe, EvaluateRecipe

pytestmark = pytest.mark.slow

NUM_FRAMES = 5
SIZES = {"num_frames": NUM_FRAMES, "width": 2 * WIDTH, "height": 2 * HEIGHT, "fps": 8.0}
DRIVERS = HELD_OUT_SEEDS[:2]
# Id of the pair -> seeds of the motion, and of the person with its place.
PAIRS = {
    f"dancer_{person}_as_{driver}": (driver, person) for driver, person in zip(DRIVERS, DRIVERS[::-1], strict=True)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rendered pairs, tiny networks, and what they make of `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("pairs")
    prepare_dancers(folder / "data", num_train_clips=1, num_validation_clips=2, pairs=True, **SIZES)
    tiny_geometry_pipeline().save_pretrained(folder / "stage1" / "exports" / "step_00000001")
    tiny_animation_pipeline().save_pretrained(folder / "stage2" / "exports" / "step_00000001")
    sampling = {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1}
    values = {
        "task": "animate",
        "name": "pairs",
        "manifest": str(folder / "data" / "pairs.jsonl"),
        "output": str(folder / "results"),
        "geometry_from": "stage1",
        "animation_from": "stage2",
        "precision": "fp32",
        "width": 2 * WIDTH,
        "height": 2 * HEIGHT,
        "geometry_width": WIDTH,
        "geometry_height": HEIGHT,
        "geometry": sampling,
        "animation": sampling,
    }
    animate(AnimateRecipe.model_validate_json(json.dumps(values)), folder / "run")
    return folder


def measure(folder: Path, results: Path) -> dict:
    values = {"task": "evaluate", "name": "e", "results": str(results)}
    values["truth"] = {"local": str(folder / "data" / "validation")}
    evaluate(EvaluateRecipe.model_validate_json(json.dumps(values)), results.parent / "table")
    return json.loads((results.parent / "table" / "table.json").read_text())


def true_frames(name: str) -> np.ndarray:
    driver, person = PAIRS[name]
    return render_clip(driver, identity_seed=person, place_seed=person, **SIZES).rgb


def test_a_pair_is_animated_and_scored_against_the_driven_dancer_in_its_own_place(folder):
    assert {path.parent.name for path in (folder / "results").glob("*/result.json")} == set(PAIRS)
    table = measure(folder, folder / "results")
    assert table["protocol"]["reference"] == f"frame {NUM_FRAMES - 1} of each clip, its last"
    for name in PAIRS:
        with np.load(folder / "results" / name / "arrays.npz") as arrays:
            errors = np.abs(arrays["frames"].astype(float) - true_frames(name))[:-1] / 255
        assert table["clips"][name][RESULT_ROW]["l1"] == pytest.approx(errors.mean(), rel=1e-5)
        assert errors.mean() > 0.05, "untrained networks"


def test_the_poses_of_a_pairs_result_lie_on_the_driven_dancer(folder):
    poses = {name: read_frames(folder / "results" / name / "pose.mp4").max(axis=-1) > 64 for name in PAIRS}
    for name, other in (tuple(PAIRS), tuple(PAIRS)[::-1]):
        driver, person = PAIRS[name]
        mask = render_clip(driver, identity_seed=person, **SIZES).mask
        inside = {key: (mask & drawn).sum() / drawn.sum() for key, drawn in poses.items()}
        assert inside[name] > inside[other] + 0.05, "the other pair has the other motion"


def test_the_truth_of_a_pair_as_its_result_has_no_error(folder, tmp_path):
    shutil.copytree(folder / "results", tmp_path / "results")
    for name in PAIRS:
        path = tmp_path / "results" / name / "arrays.npz"
        with np.load(path) as arrays:
            kept = dict(arrays)
        np.savez_compressed(path, **{**kept, "frames": true_frames(name)})
    table = measure(folder, tmp_path / "results")
    row = table["rows"][RESULT_ROW]
    assert row["l1"] == row["l1_body"] == 0.0
    assert (row["psnr"], row["ssim"]) == (100.0, pytest.approx(1.0))
    assert row["colour_drift"] == table["rows"][TRUTH_ROW]["colour_drift"]
