"""Legs whose sides a network exchanged: found and put right in rendered dancers; legs that truly cross stay."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from support.true_maps import NAME, TrueMaps, write_truth
from support.video_folders import videos_recipe

from dreamdance.annotators.driving_video import to_sequence
from dreamdance.annotators.protocols import LANDMARK_NAMES, PersonPoses
from dreamdance.annotators.video_person import exchange_leg_landmarks
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.writing.annotated_clips import AnnotatedVideoPart
from dreamdance.inference.entry_inputs import Size, load_inputs
from dreamdance.inference.manifest import read_entries
from dreamdance.media.keypoint_filter import filter_keypoints, measure_jitter
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.leg_sides import describe_exchanged_legs, exchange_legs, find_exchanged_legs
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import probe_video, write_video

WIDTH, HEIGHT = 192, 288
RIGHT, LEFT = [9, 10], [12, 13]  # knee, ankle in OpenPose's order


@cache
def dancer(number, fps):
    points = render_clip(HELD_OUT_SEEDS[800 + number], num_frames=48, width=8, height=12, fps=fps).keypoints
    points[..., 2] = 1.0
    points.setflags(write=False)
    return points


def sequence(points, fps=24.0):
    return KeypointSequence(points, WIDTH, HEIGHT, fps)


def with_exchanged(points, frames, joints=((9, 12), (10, 13))):
    changed = points.copy()
    for right, left in joints:
        changed[frames, right], changed[frames, left] = points[frames, left], points[frames, right]
    return changed


@pytest.mark.parametrize("fps", [8.0, 24.0])
@pytest.mark.parametrize("number", range(3))
def test_the_truth_stays_and_exchanged_frames_are_found(number, fps):
    truth = dancer(number, fps)
    assert not find_exchanged_legs(sequence(truth, fps)).any()
    frames = [0, 9, 20, 21, 22, 30, 47]
    noise = np.random.default_rng(number).normal(0, 0.01, truth[..., :2].shape).astype(np.float32)
    noisy = truth.copy()
    noisy[..., :2] += noise
    found = find_exchanged_legs(sequence(with_exchanged(noisy, frames), fps))
    assert np.flatnonzero(found[:, 1]).tolist() == frames
    assert not found[:, 0].any()
    np.testing.assert_array_equal(exchange_legs(with_exchanged(noisy, frames), found), noisy)


@pytest.mark.parametrize("speed", [0.02, 0.05, 0.1, 0.2, 0.4])
def test_legs_that_cross_are_not_exchanged(speed):
    """The ankles pass each other at a speed in torsos per frame, and stay crossed."""
    points = np.repeat(dancer(0, 24.0)[:1], 41, axis=0)
    torso = np.linalg.norm((points[0, 1, :2] - points[0, [8, 11], :2].mean(axis=0)) * [WIDTH, HEIGHT])
    apart = np.clip((np.arange(41) - 20) * speed / 2, -0.4, 0.4) * torso / WIDTH
    for right, left, share in ((9, 12, 0.5), (10, 13, 1.0)):
        middle = points[:, [right, left], 0].mean(axis=1)
        points[:, right, 0], points[:, left, 0] = middle + share * apart, middle - share * apart
        points[:, right, 1] = points[:, left, 1]
    assert not find_exchanged_legs(sequence(points)).any()


def test_unseen_legs_stay_and_do_not_join_what_lies_before_and_after():
    points = with_exchanged(dancer(1, 24.0), [10, 12])
    points[10, 10, 2] = 0.1
    found = find_exchanged_legs(sequence(points))
    assert np.flatnonzero(found[:, 1]).tolist() == [12]
    assert not find_exchanged_legs(sequence(points[:1])).any()
    points[..., 2] = 0.0
    assert not find_exchanged_legs(sequence(points)).any()


def test_given_key_points_stay_as_they_are_and_a_warning_names_the_frames_with_exchanged_legs(tmp_path, caplog):
    truth, wrong = dancer(0, 8.0), with_exchanged(dancer(0, 8.0), [5, 9])
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "person.png")
    size = Size(WIDTH, HEIGHT)
    poses = []
    for points in (truth, wrong):
        write_keypoint_file(tmp_path / "keypoints.json", sequence(points, 8.0))
        entry = {"id": "a", "image": "person.png", "keypoints": "keypoints.json"}
        (tmp_path / "manifest.jsonl").write_text(json.dumps(entry))
        caplog.clear()
        inputs = load_inputs(read_entries(tmp_path / "manifest.jsonl")[0], aspect=size, pose_sizes={size})
        poses.append(inputs.poses[size].movedim(1, -1).numpy())
        assert ("exchange the left and the right leg in frames 5, 9; they are taken" in caplog.text) == (
            points is wrong
        )
    drawn = draw_poses(wrong, width=WIDTH, height=HEIGHT)
    assert (np.rint(poses[1] * 255) != drawn).mean() < 1e-5  # the file rounds coordinates
    assert (poses[0] != poses[1]).any(axis=(1, 2, 3)).nonzero()[0].tolist() == [5, 9]
    assert describe_exchanged_legs(sequence(wrong), range(100, 148)).count("105, 109;") == 1


def test_landmarks_of_the_feet_follow_their_legs():
    landmarks = np.random.default_rng(0).random((2, 33, 4), dtype=np.float32)
    moved = exchange_leg_landmarks(landmarks, np.array([[False, True], [True, False]]))
    changed = [
        {LANDMARK_NAMES[place] for place in np.flatnonzero((new != old).any(axis=-1))}
        for new, old in zip(moved, landmarks, strict=True)
    ]
    both = ("left", "right")
    assert changed[0] == {f"{side}_{name}" for side in both for name in ("knee", "ankle", "heel", "foot_index")}
    assert changed[1] == {"left_hip", "right_hip"}
    heels = [LANDMARK_NAMES.index(f"{side}_heel") for side in both]
    np.testing.assert_array_equal(moved[0, heels], landmarks[0, heels[::-1]])


def test_jitter_shows_a_single_exchanged_frame():
    truth = dancer(2, 24.0)
    exchanged = with_exchanged(truth, [20])
    assert measure_jitter(sequence(exchanged)) > 10 * measure_jitter(sequence(truth))


class ExchangesLegs(TrueMaps):
    """Knows the truth, but takes the left leg for the right one in two frames."""

    def annotate_pose(self, rgb, people):
        found = super().annotate_pose(rgb, people)
        rows = [
            row
            for row, points in enumerate(found.keypoints)
            if np.abs(self._truth["keypoints"][[5, 9]] - points).max(axis=(1, 2)).min() == 0
        ]
        exchanged = np.zeros((len(rgb), 2), dtype=bool)
        exchanged[rows, 1] = True
        return PersonPoses(
            exchange_legs(found.keypoints, exchanged), exchange_leg_landmarks(found.landmarks, exchanged)
        )


_FOLDER = []


def open_exchanging():
    return ExchangesLegs(_FOLDER[0])


def test_stored_and_driving_poses_have_their_own_legs(tmp_path, monkeypatch):
    clip = render_clip(HELD_OUT_SEEDS[801], num_frames=16, width=48, height=72, fps=8.0)
    write_truth(tmp_path / "truth", "one", clip)
    write_video(tmp_path / "videos" / "one.mp4", clip.rgb, fps=8.0)
    monkeypatch.setenv("DREAMDANCE_TRUE_MAPS", str(tmp_path / "truth"))
    monkeypatch.setattr(f"{__name__}._FOLDER", [tmp_path / "truth"])
    stored = []
    for number, pose in enumerate((NAME, f"{__name__}:open_exchanging")):
        open_networks.cache_clear()
        annotators = {"pose": pose, "mask": NAME, "depth": NAME, "normal": NAME}
        source = videos_recipe(
            tmp_path / "data",
            tmp_path / "videos",
            annotators=annotators,
            validation_fraction=0.0,
            crop_letterbox=False,
            clip_frames=16,
        ).videos
        part = AnnotatedVideoPart(source, "one", "one", "train", tmp_path / f"side_{number}")
        stored += [found for found in part() if found is not None]
    open_networks.cache_clear()
    exact, repaired = stored
    np.testing.assert_array_equal(repaired.keypoints, exact.keypoints)
    assert repaired.metadata["scores"]["jitter"] == exact.metadata["scores"]["jitter"]

    video = probe_video(tmp_path / "videos" / "one.mp4")
    wrong = with_exchanged(clip.keypoints, [5, 9])
    driving = to_sequence(video, wrong, fps=8.0, smooth=True)
    np.testing.assert_array_equal(driving.keypoints, filter_keypoints(replace(driving, keypoints=clip.keypoints)))
    np.testing.assert_array_equal(to_sequence(video, wrong, fps=8.0, smooth=False).keypoints, wrong)
