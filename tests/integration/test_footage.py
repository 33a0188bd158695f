"""Real dance videos without any map, all tasks by the command: shards, both stages, held-out parts, a photo, the table.

A short run of recipes/footage, small enough for a test; those recipes state the scores of a longer one. No frame of the
videos is kept: everything is written to the folder of the test.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.networks import require_weights
from support.real_clips import CLIPS, needs_clips
from support.tool_modules import load_tool

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.evaluation.table import RESULT_ROW
from dreamdance.evaluation.trivial import MEAN_COLOUR, MEAN_OF_TRAINING, REPEATED_REFERENCE
from dreamdance.media.keypoints import BODY_NAMES, CONFIDENCE_THRESHOLD
from dreamdance.media.pose_drawing import _BODY_COLOURS
from dreamdance.media.video import probe_video, read_frames, write_video
from dreamdance.recipe.sections import Shards
from dreamdance.runs.layout import newest_export, progress_file

ROOT = Path(__file__).parents[2]
LAUNCHER = (sys.executable, ROOT / "launchers" / "slurm.py")
RECIPES = ROOT / "recipes" / "footage"
NAMES = ("dance_01", "dance_02", "dance_03")
WIDTH, HEIGHT, CLIP_FRAMES, STRIDE = 24, 40, 20, 2
# Only the beginning of each video is read.
NUM_FRAMES = 176
STEPS = 70

pytestmark = [
    pytest.mark.clips,
    pytest.mark.slow,
    pytest.mark.distributed,
    needs_clips(*NAMES),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder in which the recipes of recipes/footage have run, with the sizes of a test."""
    weights = require_weights("mediapipe/pose_landmark_full.tflite")
    folder = tmp_path_factory.mktemp("footage")
    for name in NAMES:
        cut_video(CLIPS / f"{name}.rgb.mp4", folder / "videos" / f"{name}.rgb.mp4", num_frames=NUM_FRAMES)
    size = [f"width={WIDTH}", f"height={HEIGHT}"]
    large = [f"videos.width={4 * WIDTH}", f"videos.height={4 * HEIGHT}", f"smaller_sizes=[[{WIDTH},{HEIGHT}]]"]
    frames = [f"videos.frame_stride={STRIDE}", f"videos.clip_frames={CLIP_FRAMES}", "videos.min_clip_frames=8"]
    launch(folder, "prepare", "videos.folder=videos", f"videos.annotators.weights={weights}", *frames, *large)
    # One process each, two at a time: the start of a process takes longer than its work.
    alone = "cluster.tasks_per_node=1"
    training = [*(f"data.{word}" for word in size), "optimizer.warmup_steps=5", "checkpoint.every_steps=1000", alone]
    training += ["validation.sample_every_steps=1000"]
    first = [*training, "max_steps=20", "validation.loss_every_steps=1000"]
    second = [*training, "data.num_frames=3", f"max_steps={STEPS}", "optimizer.ema_decay=0.9", "logging.every_steps=1"]
    launch_both(folder, ("stage1_domains", first), ("stage2", [*second, f"validation.loss_every_steps={STEPS}"]))
    size += [f"geometry_{word}" for word in size]
    photo = {"id": "photo", "image": str(folder / "person.png"), "video": str(folder / "dance.mp4"), "align": "bones"}
    Image.fromarray(read_frames(probe_video(CLIPS / "dance_01.rgb.mp4"), [0])[0]).save(folder / "person.png")
    cut_video(CLIPS / "dance_03.rgb.mp4", folder / "dance.mp4", num_frames=8)
    (folder / "photo.jsonl").write_text(json.dumps(photo) + "\n")
    words = ["name=photo", "manifest=photo.jsonl", "output=results/photo", f"annotators.weights={weights}"]
    launch_both(folder, ("animate", [*size, alone]), ("animate", [*words, *size, alone]))
    # Not VGG16, which takes a minute. AlexNet needs larger frames than these.
    metrics = ["networks=[lpips_alex,fvd]", f"width={2 * WIDTH}", f"height={2 * HEIGHT}", f"weights={weights}"]
    launch(folder, "evaluate", *(f"metrics.{word}" for word in metrics))
    return folder


def cut_video(source, target, *, num_frames):
    """The first frames of a video, encoded again."""
    video = probe_video(source)
    write_video(target, read_frames(video, list(range(num_frames))), fps=video.fps)


def launch_both(folder, *commands):
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(launch, folder, name, *words) for name, words in commands]:
            done.result()


def launch(folder, name, *words):
    surrounding = ("SUBMITIT", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(surrounding)}
    done = subprocess.run(
        [*LAUNCHER, RECIPES / f"{name}.yaml", *words, "--cluster", "local", "--follow"],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def stored(folder, split):
    clips = StoredClips(Shards(local=str(folder / "data" / "footage" / split)))
    return [clips.clip(number) for number in range(len(clips))]


def results(folder):
    return sorted((folder / "results" / "footage").iterdir())


def table(folder):
    return json.loads((folder / "runs" / "footage_evaluate" / "table.json").read_text())


def test_the_first_four_fifths_train_and_the_rest_is_held_out(folder):
    for name in NAMES:
        boundary = NUM_FRAMES - round(0.2 * NUM_FRAMES)
        spans = {
            split: [
                (clip.metadata["first_frame"], clip.metadata["first_frame"] + STRIDE * clip.num_frames)
                for clip in stored(folder, split)
                if clip.clip_id.startswith(name)
            ]
            for split in ("train", "validation")
        }
        assert spans["train"][0][0] == 0
        assert 0 <= boundary - spans["train"][-1][1] + STRIDE - 1 < STRIDE * CLIP_FRAMES
        assert spans["validation"][0][0] >= boundary
        assert spans["validation"][-1][1] in (NUM_FRAMES, NUM_FRAMES + STRIDE - 1)


def test_clips_have_all_maps_of_the_person_and_scores(folder):
    for clip in (*stored(folder, "train"), *stored(folder, "validation")):
        mask = clip.frames("mask") > 0
        assert 0.05 < mask.mean() < 0.6
        points = clip.keypoints[:, :18]
        visible = points[points[..., 2] >= 0.3]
        assert len(visible) > 0.7 * points.shape[0] * 18
        assert ((visible[:, :2] >= -0.05) & (visible[:, :2] <= 1.05)).all(), "the crop cuts a visible joint"
        depth, normal = clip.frames("depth"), clip.frames("normal").astype(int)
        assert depth[mask].mean() > depth[~mask].mean() + 6000, "the person is nearer than the wall"
        assert np.abs(normal[~mask] - (128, 128, 255)).max() <= 1
        assert normal[mask].std(axis=0).min() > 10
        scores = clip.metadata["scores"]
        assert None not in scores.values()
        assert scores["geometry_angle"] < 20
        assert len(clip.reference_positions) == 12


def test_poses_are_those_of_another_network(folder):
    """The drawings beside the videos are DWPose's. Errors are in lengths of the torso, of the joints of the body."""
    tool = load_tool("measure_keypoints")
    # The points of hands have the colour of the left knee, and the face hides eyes and ears.
    errors = {name: [] for name in BODY_NAMES[:14] if name != "left_knee"}
    for clip in stored(folder, "train"):
        drawing = CLIPS / clip.metadata["source"].replace(".rgb.", ".pose.")
        if not drawing.is_file():
            continue
        first, crop = clip.metadata["first_frame"], clip.metadata["crop"]
        places = range(0, clip.num_frames, 4)
        drawn = read_frames(probe_video(drawing), [first + STRIDE * place for place in places])
        rgb = probe_video(CLIPS / clip.metadata["source"])
        points = clip.keypoints[list(places)]
        pixels = points[..., :2] * crop[2:] + crop[:2]
        torsos = np.linalg.norm(pixels[:, 1] - pixels[:, [8, 11]].mean(axis=1), axis=-1)
        scale = np.array([rgb.width / drawn.shape[2], rgb.height / drawn.shape[1]])
        for name in errors:
            index = BODY_NAMES.index(name)
            for picture, found, torso, confidence in zip(
                drawn, pixels[:, index], torsos, points[:, index, 2], strict=True
            ):
                spot = tool.find_spot(picture, _BODY_COLOURS[index])
                if spot is not None and confidence >= CONFIDENCE_THRESHOLD:
                    errors[name].append(np.linalg.norm(spot * scale - found) / torso)
    medians = {name: np.median(values) for name, values in errors.items()}
    assert min(len(values) for values in errors.values()) > 20
    assert max(medians.values()) < 0.08, medians


def test_a_photo_moves_as_the_person_of_another_video(folder):
    video = probe_video(folder / "results" / "photo" / "photo" / "video.mp4")
    assert (video.num_frames, video.width, video.height) == (8, WIDTH, HEIGHT)


def test_the_loss_falls(folder):
    lines = [json.loads(line) for line in progress_file(folder / "runs" / "footage_stage2").read_text().splitlines()]
    losses = {line["done"]: line["loss"] for line in lines if line.get("loss") is not None}
    assert max(losses) == STEPS
    first, last = (
        [losses[step] for step in losses if low < step <= high] for low, high in ((0, 10), (STEPS - 20, STEPS))
    )
    assert np.mean(last) < 0.6 * np.mean(first)
    assert newest_export(folder / "runs" / "footage_stage2").name == f"step_{STEPS:08d}"


def test_every_held_out_clip_is_animated(folder):
    clips = {clip.clip_id: clip for clip in stored(folder, "validation")}
    assert [result.name for result in results(folder)] == sorted(clips)
    for result in results(folder):
        clip = clips[result.name]
        with np.load(result / "arrays.npz", allow_pickle=False) as arrays:
            assert set(arrays) == {"frames", "normals", "depths"}
            assert arrays["frames"].shape == (clip.num_frames, HEIGHT, WIDTH, 3)
        for name in ("video.mp4", "side_by_side.mp4"):
            assert probe_video(result / name).num_frames == clip.num_frames
        assert Image.open(result / "contact_sheet.png").width > 4 * 128


def test_the_table_measures_body_and_whole_frames(folder):
    found = table(folder)
    assert {RESULT_ROW, REPEATED_REFERENCE, MEAN_COLOUR, MEAN_OF_TRAINING} <= set(found["rows"])
    assert {"l1", "l1_body", "angular_error_mean", "abs_rel"} <= set(found["rows"][RESULT_ROW])
    assert set(found["clips"]) == {result.name for result in results(folder)}


def test_lpips_and_fvd_are_measured_where_their_networks_are_and_the_windows_are_too_few(folder):
    names = {"lpips_alex": "lpips/alexnet.ckpt", "fvd": "i3d/i3d-kinetics-400.ckpt"}
    weights = require_weights(*names.values())
    found = table(folder)
    for row in (RESULT_ROW, REPEATED_REFERENCE):
        scores = found["rows"][row]
        assert 0 < scores["lpips_alex"] < 2
        assert 0 < scores["fvd"] < 1e5
    for name, file in names.items():
        digest = hashlib.sha256((weights / file).read_bytes()).hexdigest()
        assert f"{file}, SHA-256 {digest[:16]}" in found["protocol"][name]
    text = (folder / "runs" / "footage_evaluate" / "table.md").read_text()
    assert f"{found['rows'][RESULT_ROW]['fvd']:.1f} (too few)" in text


def test_a_minute_of_training_is_better_than_trivial_answers(folder):
    """A repeated reference reproduces the still background; the recipe's header states what it takes to be better."""
    rows = table(folder)["rows"]
    for trivial in (MEAN_COLOUR, MEAN_OF_TRAINING):
        assert rows[RESULT_ROW]["l1"] < rows[trivial]["l1"]
