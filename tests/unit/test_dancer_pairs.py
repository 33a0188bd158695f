"""Pairs of dancers: one's motion on another's body, clothes and place, as the renderer makes it; all held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.results import prepare_dancers, write_result
from support.video_folders import stored_clips

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS, render_clip
from dreamdance.data.shards.columns import metric_disparity
from dreamdance.errors import RecipeError
from dreamdance.evaluation.evaluate import evaluate
from dreamdance.evaluation.table import RESULT_ROW
from dreamdance.inference.entry_inputs import Size, load_inputs
from dreamdance.inference.manifest import read_entries
from dreamdance.launch.prepared import is_prepared
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.recipe import load_recipe
from dreamdance.recipe.schema import EvaluateRecipe, PrepareRecipe

NUM_FRAMES, WIDTH, HEIGHT, NUM_CLIPS = 8, 48, 72, 3
SIZES = {"num_frames": NUM_FRAMES, "width": WIDTH, "height": HEIGHT, "fps": 8.0}
SMALL = {"num_frames": 3, "width": 24, "height": 36}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "data"
    prepare_dancers(folder, num_train_clips=2, num_validation_clips=NUM_CLIPS, pairs=True, **SIZES)
    return folder


def render_pair(number: int):
    seed, person = HELD_OUT_SEEDS[number], HELD_OUT_SEEDS[(number + 1) % NUM_CLIPS]
    return render_clip(seed, identity_seed=person, place_seed=person, **SIZES)


def test_another_place_keeps_the_body_and_the_side_from_which_it_is_seen():
    at_home, away = (render_clip(4, identity_seed=9, place_seed=place, **SMALL) for place in (4, 9))
    for name in ("joints", "keypoints", "mask", "intrinsics"):
        np.testing.assert_array_equal(getattr(at_home, name), getattr(away, name))
    np.testing.assert_array_equal(at_home.normal[at_home.mask], away.normal[at_home.mask])
    assert np.abs(at_home.rgb[~at_home.mask].astype(float) - away.rgb[~away.mask]).mean() > 10
    with pytest.raises(ValueError, match=r"place_seed .* one is held out, the other is for training"):
        render_clip(4, place_seed=HELD_OUT_SEEDS[0], **SMALL)


def test_pairs_follow_the_dancers_themselves_and_all_are_held_out(data):
    assert [clip.metadata["seed"] for clip in stored_clips(data, "train")] == list(TRAINING_SEEDS[:2])
    clips = stored_clips(data, "validation")
    seeds = HELD_OUT_SEEDS[:NUM_CLIPS]
    assert [clip.clip_id for clip in clips] == [f"dancer_{seed}" for seed in seeds] + [
        f"dancer_{person}_as_{seed}" for seed, person in zip(seeds, [*seeds[1:], seeds[0]], strict=True)
    ]
    for clip in clips[NUM_CLIPS:]:
        assert clip.metadata["driven_by"] == f"dancer_{clip.metadata['seed']}"
        for key in ("seed", "identity_seed", "place_seed"):
            assert clip.metadata[key] in HELD_OUT_SEEDS


def test_the_truth_of_a_pair_is_what_the_renderer_makes(data):
    for number, clip in enumerate(stored_clips(data, "validation")[NUM_CLIPS:]):
        rendered = render_pair(number)
        np.testing.assert_array_equal(clip.frames("rgb"), rendered.rgb)
        np.testing.assert_array_equal(clip.frames("mask") > 0, rendered.mask)
        np.testing.assert_array_equal(clip.keypoints, rendered.keypoints)
        disparity = metric_disparity(clip.frames("depth") / 65535, clip.metadata["depth_range"])
        np.testing.assert_allclose(1 / disparity, rendered.depth, rtol=1e-3)


def test_the_manifest_of_pairs_drives_one_dancers_picture_by_anothers_poses(data):
    own = [json.loads(line)["id"] for line in (data / "manifest.jsonl").read_text().splitlines()]
    assert own == [f"dancer_{seed}" for seed in HELD_OUT_SEEDS[:NUM_CLIPS]]
    entries = read_entries(data / "pairs.jsonl")
    assert len(entries) == NUM_CLIPS
    for number, entry in enumerate(entries):
        truth, driver = render_pair(number), render_clip(HELD_OUT_SEEDS[number], **SIZES)
        np.testing.assert_array_equal(np.asarray(Image.open(entry.image)), truth.rgb[-1])
        assert (entry.align, entry.reference_frame) == ("bones", NUM_FRAMES - 1)
        size = Size(WIDTH, HEIGHT)
        poses = load_inputs(entry, aspect=size, pose_sizes={size}).poses[size].movedim(1, -1).numpy()
        wanted, given = (draw_poses(clip.keypoints, width=WIDTH, height=HEIGHT) / 255 for clip in (truth, driver))
        assert np.abs(poses - wanted).mean() < 0.7 * np.abs(given - wanted).mean(), "bones bring the poses nearer"


def test_a_pairs_result_is_compared_with_its_truth(data, tmp_path):
    for number, entry in enumerate(read_entries(data / "pairs.jsonl")):
        frames = render_pair(number).rgb / 255
        write_result(tmp_path / "results", entry.id, frames, reference_frame=entry.reference_frame, fps=8.0)
    recipe = {"task": "evaluate", "name": "e", "results": str(tmp_path / "results")}
    recipe["truth"] = {"local": str(data / "validation")}
    evaluate(EvaluateRecipe.model_validate_json(json.dumps(recipe)), tmp_path / "run")
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert len(table["clips"]) == NUM_CLIPS
    assert table["rows"][RESULT_ROW]["l1"] < 1e-6
    assert table["missing"] == []


def test_a_lost_manifest_or_reference_of_pairs_is_written_again(data):
    dancers = {"num_train_clips": 2, "num_validation_clips": NUM_CLIPS, "pairs": True, **SIZES}
    values = {"task": "prepare", "name": "p", "output": str(data), "dancers": dancers}
    recipe = PrepareRecipe.model_validate_json(json.dumps(values))
    lost = (data / "pairs.jsonl", read_entries(data / "pairs.jsonl")[1].image)
    for path in lost:
        before = path.read_bytes()
        assert is_prepared(recipe)
        path.unlink()
        assert not is_prepared(recipe)
        prepare_dancers(data, **dancers)
        assert path.read_bytes() == before


def test_a_single_held_out_dancer_makes_no_pair(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "task: prepare\nname: p\noutput: data\ndancers: {num_train_clips: 1, num_validation_clips: 1, pairs: true}\n"
    )
    with pytest.raises(RecipeError, match=r"dancers\.pairs needs dancers\.num_validation_clips of at least 2"):
        load_recipe(tmp_path / "p.yaml")
