"""Pose drawing: colours and order of the convention, sizes relative to the picture, thresholds, small pictures."""

import time
from itertools import pairwise

import cv2
import numpy as np
import pytest

from dreamdance.dancers.render import render_clip
from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD, FACE, LEFT_HAND, flip_keypoints
from dreamdance.media.pose_drawing import draw_pose, draw_poses

RIGHT_SHOULDER, RIGHT_ELBOW = 2, 3
RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def no_key_points() -> np.ndarray:
    return np.zeros((128, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def dancer() -> np.ndarray:
    return render_clip(5, num_frames=1, width=16, height=24).keypoints[0]


def test_a_pose_without_points_is_an_empty_picture() -> None:
    picture = draw_pose(no_key_points(), width=40, height=60)
    assert picture.shape == (60, 40, 3)
    assert picture.dtype == np.uint8
    assert not picture.any()


def test_a_joint_is_a_disc_of_its_colour_at_its_place() -> None:
    points = no_key_points()
    points[0] = (0.25, 0.75, 1.0)  # the nose is red
    picture = draw_pose(points, width=512, height=512)
    rows, columns = np.nonzero(picture.any(axis=-1))
    assert (picture[rows, columns] == RED).all()
    # OpenCV rounds the ends of a disc's rows: a quarter of a pixel.
    assert columns.mean() + 0.5 == pytest.approx(128.0, abs=0.25)
    assert rows.mean() + 0.5 == pytest.approx(384.0, abs=0.25)
    assert np.ptp(rows) + 1 == pytest.approx(8, abs=1)  # radius 4 at 512, as in DWPose


def test_the_limb_from_neck_to_right_shoulder_is_red_at_six_tenths() -> None:
    points = no_key_points()
    points[1], points[RIGHT_SHOULDER] = (0.5, 0.5, 1.0), (0.3, 0.5, 1.0)
    picture = draw_pose(points, width=512, height=512)
    assert picture[255, 205].tolist() == [153, 0, 0]
    # Joints are drawn over limbs in their own, full colours.
    assert picture[255, 153].tolist() == [255, 170, 0]
    assert picture[255, 256].tolist() == [255, 85, 0]


def test_a_limb_is_an_ellipse_thickest_in_its_middle() -> None:
    points = no_key_points()
    points[RIGHT_SHOULDER], points[RIGHT_ELBOW] = (0.2, 0.5, 1.0), (0.8, 0.5, 1.0)
    picture = draw_pose(points, width=512, height=512)
    thickness = picture.any(axis=-1).sum(axis=0)
    assert thickness[256] == pytest.approx(8, abs=1)
    assert thickness[256] > thickness[140] > thickness[115]


def test_points_below_the_threshold_and_their_limbs_are_not_drawn() -> None:
    points = no_key_points()
    points[1] = (0.5, 0.5, CONFIDENCE_THRESHOLD)
    points[RIGHT_SHOULDER] = (0.3, 0.5, CONFIDENCE_THRESHOLD - 0.01)
    points[FACE] = (0.1, 0.1, 0.29)
    picture = draw_pose(points, width=512, height=512)
    assert picture[255, 256].tolist() == [255, 85, 0]
    assert not picture[:, :240].any()
    assert draw_pose(points, width=512, height=512, threshold=0.2)[255, 205].tolist() == [153, 0, 0]


def test_hands_have_coloured_edges_and_blue_joints_and_the_face_white_dots() -> None:
    points = no_key_points()
    points[LEFT_HAND.start], points[LEFT_HAND.start + 1] = (0.2, 0.2, 1.0), (0.4, 0.2, 1.0)
    points[FACE.start] = (0.7, 0.7, 1.0)
    picture = draw_pose(points, width=512, height=512)
    assert picture[102, 102].tolist() == list(BLUE)
    assert picture[102, 154].tolist() == list(RED)  # the first edge's hue
    assert picture[358, 358].tolist() == list(WHITE)
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), RED, BLUE, WHITE}


def test_sizes_follow_the_picture(dancer: np.ndarray) -> None:
    small = draw_pose(dancer, width=256, height=384).any(axis=-1).mean()
    large = draw_pose(dancer, width=1024, height=1536).any(axis=-1).mean()
    assert small == pytest.approx(large, rel=0.25)


def test_at_32_by_48_every_limb_can_still_be_identified_by_its_colour(dancer: np.ndarray) -> None:
    points = dancer.copy()
    points[18:] = 0
    points[BODY, 2] = 1.0
    picture = draw_pose(points, width=32, height=48).astype(int)
    for first, second, colour in ((2, 3, (255, 170, 0)), (9, 10, (0, 255, 170)), (12, 13, (0, 85, 255))):
        middle = (points[first, :2] + points[second, :2]) / 2 * (32, 48)
        pixel = picture[int(middle[1]), int(middle[0])]
        assert pixel.max() > 60
        cosine = pixel @ np.array(colour) / (np.linalg.norm(pixel) * np.linalg.norm(colour))
        assert cosine > 0.9


def test_small_pictures_are_large_ones_averaged(dancer: np.ndarray) -> None:
    large = cv2.resize(draw_pose(dancer, width=512, height=768), (64, 96), interpolation=cv2.INTER_AREA)
    small = draw_pose(dancer, width=64, height=96)
    lit = (large.max(axis=-1) > 40) | (small.max(axis=-1) > 40)
    assert np.corrcoef(large[lit].ravel(), small[lit].ravel())[0, 1] > 0.8


def test_a_slow_movement_changes_a_small_picture_gradually(dancer: np.ndarray) -> None:
    pictures = []
    for shift in np.linspace(0, 1 / 32, 9):  # one pixel in eight steps
        moved = dancer.copy()
        moved[:, 0] += shift
        pictures.append(draw_pose(moved, width=32, height=48).astype(float))
    steps = [np.abs(after - before).sum() for before, after in pairwise(pictures)]
    assert min(steps) > 0
    assert max(steps) < 0.4 * np.abs(pictures[-1] - pictures[0]).sum()


def test_drawing_flipped_points_mirrors_the_shape_but_not_the_colours(dancer: np.ndarray) -> None:
    drawn = draw_pose(dancer, width=256, height=384)
    flipped = draw_pose(flip_keypoints(dancer), width=256, height=384)
    mirrored = drawn[:, ::-1]
    shape = (flipped.any(axis=-1) != mirrored.any(axis=-1)).sum() / drawn.any(axis=-1).sum()
    assert shape < 0.1  # rounding at the edges of lines
    assert np.abs(flipped.astype(int) - mirrored).max() == 255


def test_points_far_outside_of_the_picture_are_not_drawn() -> None:
    points = no_key_points()
    points[BODY] = (1e6, -1e6, 1.0)
    points[1] = (0.5, 0.5, 1.0)
    assert draw_pose(points, width=64, height=96)[48, 32].any()


def test_a_clip_is_drawn_frame_by_frame(dancer: np.ndarray) -> None:
    pictures = draw_poses(np.stack([dancer, no_key_points()]), width=64, height=96)
    assert np.array_equal(pictures[0], draw_pose(dancer, width=64, height=96))
    assert not pictures[1].any()


def test_key_points_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(128, 3\); got \(18, 3\)"):
        draw_pose(np.zeros((18, 3)), width=8, height=8)


def test_thousands_of_small_drawings_are_cheap(dancer: np.ndarray) -> None:
    clip = np.stack([dancer] * 200)
    draw_poses(clip[:5], width=32, height=48)
    start = time.process_time()
    draw_poses(clip, width=32, height=48)
    milliseconds = (time.process_time() - start) / len(clip) * 1e3
    assert milliseconds < 5.0  # measured 0.7 on an idle core; the margin is for a shared machine
