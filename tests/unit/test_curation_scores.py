"""Each score has the value that follows from its definition; wrong values are refused by name."""

import json
from dataclasses import fields
from itertools import pairwise

import cv2
import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip
from dreamdance.data.curation.measures import measure_cut, measure_people, measure_sharpness, measure_visible_joints
from dreamdance.data.curation.scores import SCORE_KINDS, Scores


@pytest.fixture(scope="module")
def dancer() -> DancerClip:
    return render_clip(HELD_OUT_SEEDS[0], num_frames=3, width=128, height=192)


def test_every_score_has_a_meaning():
    assert [field.name for field in fields(Scores)] == list(SCORE_KINDS)


def test_scores_survive_json():
    scores = Scores(cut=0.1, motion=0.02, sharpness=88.5, visible_joints=0.9, people=2, geometry_angle=11.0)
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    assert scores.values()["jitter"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"visible_joints": 1.2}, "visible_joints is 1.2; finite values from 0 to 1"),
        ({"motion": -0.1}, "motion is -0.1"),
        ({"motion": float("nan")}, "motion is nan"),
        ({"geometry_angle": 181.0}, "from 0 to 180"),
        ({"beauty": 1.0}, "unknown scores: beauty"),
        ({"people": "two"}, "people is 'two'; a number or null"),
        ({"people": True}, "people is True"),
    ],
)
def test_wrong_scores_are_refused(content, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Scores.from_json(content)


def test_the_cut_at_the_end_of_a_clip_is_not_inside_it():
    assert measure_cut(np.array([0.1, 0.3, 0.2, 0.9])) == pytest.approx(0.3)
    assert measure_cut(np.array([0.9])) is None


def test_sharpness_of_a_checkerboard_is_exact():
    """The Laplacian of single pixels of 0 and 100 is +400 and -400: variance 160,000, and 0 beyond the mask's edge."""
    rows, columns = np.mgrid[:40, :40]
    board = np.repeat((100 * ((rows + columns) % 2)).astype(np.uint8)[..., None], 3, axis=-1)
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 4:36, 4:36] = True
    assert measure_sharpness(board[None], mask) == pytest.approx(160_000.0)
    outside = board.copy()
    outside[~mask[0]] = 255
    assert measure_sharpness(outside[None], mask) == pytest.approx(160_000.0)


def test_more_blur_is_less_sharp(dancer):
    blurred = [
        np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) if sigma else frame for frame in dancer.rgb])
        for sigma in (0, 0.5, 1, 2, 4)
    ]
    values = [measure_sharpness(frames, dancer.mask) for frames in blurred]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(values))


def test_what_surrounds_the_body_does_not_count(dancer):
    noisy = dancer.rgb.copy()
    noise = np.random.default_rng(0).integers(0, 256, noisy.shape, dtype=np.uint8)
    noisy[~dancer.mask] = noise[~dancer.mask]
    assert measure_sharpness(noisy, dancer.mask) == measure_sharpness(dancer.rgb, dancer.mask)


def test_frames_without_a_body_do_not_count(dancer):
    mask = dancer.mask.copy()
    mask[1:] = False
    assert measure_sharpness(dancer.rgb, mask) == measure_sharpness(dancer.rgb[:1], mask[:1])
    assert measure_sharpness(dancer.rgb, np.zeros_like(mask)) is None


def test_high_frames_are_reduced_first():
    frame = np.random.default_rng(0).integers(0, 256, (512, 40, 3), dtype=np.uint8)
    large = frame.repeat(2, axis=0).repeat(2, axis=1)
    mask = np.ones((1, 512, 40), bool)
    expected = measure_sharpness(frame[None], mask)
    assert measure_sharpness(large[None], mask.repeat(2, axis=1).repeat(2, axis=2)) == pytest.approx(expected, rel=1e-3)


def test_visible_joints_are_those_of_the_body_within_the_frame():
    keypoints = np.zeros((2, 128, 3), np.float32)
    keypoints[:, :, :2] = 0.5
    keypoints[:, 18:, 2] = 1.0  # hands and face do not count
    keypoints[0, :9, 2] = 0.31
    keypoints[1, :9, 2] = 0.29
    keypoints[0, 0, 0] = 1.01  # outside
    assert measure_visible_joints(keypoints) == pytest.approx(8 / 36)
    assert measure_visible_joints(keypoints[:0]) is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1] * 99 + [2], 1), ([1] * 95 + [2] * 5, 2), ([1] * 96 + [2] * 4, 1), ([0], 0), ([1, 3, 2], 3), ([], None)],
)
def test_rare_numbers_of_people_are_false_detections(counts, expected):
    assert measure_people(counts) == expected
