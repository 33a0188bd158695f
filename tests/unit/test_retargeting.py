"""Retargeting bone by bone, against dancers with exact truth: the same motion on another body."""

import itertools
from functools import cache

import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.media.alignment import AlignmentError, align_keypoints
from dreamdance.media.keypoints import BODY_NAMES, FACE, LEFT_HAND, RIGHT_HAND, KeypointSequence
from dreamdance.media.retargeting import retarget_bones

WIDTH, HEIGHT, NUM_FRAMES, NUM_PAIRS = 256, 384, 32, 12
SMALL = {"num_frames": NUM_FRAMES, "width": 24, "height": 36}  # key points do not depend on the number of pixels
REFERENCE_FRAMES = range(0, NUM_FRAMES, 8)
HIPS, ANKLES = [8, 11], [10, 13]
PARENTS = {2: 1, 5: 1, 3: 2, 6: 5, 4: 3, 7: 6, 9: 8, 12: 11, 10: 9, 13: 12}


def sequence(keypoints):
    return KeypointSequence(keypoints, WIDTH, HEIGHT, 8.0)


def pixels(keypoints):
    return keypoints[..., :2].astype(np.float64) * [WIDTH, HEIGHT]


def body_errors(found, truth, points=slice(0, 18)):
    """The mean distance of the points, and with both hips put on each other, in lengths of the true torso."""
    found, truth = pixels(found), pixels(truth)
    torso = np.linalg.norm(truth[:, 1] - truth[:, HIPS].mean(axis=1), axis=-1).mean()
    centred = (found - found[:, HIPS].mean(axis=1, keepdims=True)) - (truth - truth[:, HIPS].mean(axis=1)[:, None])
    return np.array([np.linalg.norm(part[:, points], axis=-1).mean() / torso for part in (found - truth, centred)])


@cache
def pair(number):
    """The key points of a dancer, and of another body in the same motion."""
    driver, other = HELD_OUT_SEEDS[500 + number], HELD_OUT_SEEDS[700 + number]
    return render_clip(driver, **SMALL).keypoints, render_clip(driver, **SMALL, identity_seed=other).keypoints


def test_another_body_in_the_same_motion_is_met_within_a_small_part_of_the_torso():
    """12 pairs, 4 reference frames of each; the mean error is .089 with scale alone and .011 with bones."""
    errors = {retarget_bones: [], align_keypoints: []}
    for driving, truth in map(pair, range(NUM_PAIRS)):
        for retarget, found in errors.items():
            results = [retarget(sequence(driving), sequence(truth[frame : frame + 1])) for frame in REFERENCE_FRAMES]
            found.append(np.mean([body_errors(result, truth) for result in results], axis=0))
    with_bones, with_scale = (np.array(errors[retarget]) for retarget in (retarget_bones, align_keypoints))
    assert (with_bones[:, 0] < 0.06).all()
    assert with_bones[:, 0].mean() < 0.02
    assert (with_bones < with_scale).all()
    assert with_bones[:, 1].mean() < 0.4 * with_scale[:, 1].mean()


def test_a_reference_in_another_pose_gives_nearer_proportions_than_one_scale_does():
    """The reference comes from another dance of the same person; its place and size in the picture mean nothing here.

    So errors are those of the body around the hips, after the best common scale: .0185 against .0214 of one scale.
    """
    errors = {retarget_bones: [], align_keypoints: []}
    for number in range(NUM_PAIRS):
        driving, truth = pair(number)
        elsewhere = render_clip(HELD_OUT_SEEDS[700 + number], **SMALL).keypoints
        for (retarget, found), frame in itertools.product(errors.items(), REFERENCE_FRAMES):
            result = retarget(sequence(driving), sequence(elsewhere[frame : frame + 1]))
            centred, wanted = (
                pixels(points)[:, :18] - pixels(points)[:, HIPS].mean(1)[:, None] for points in (result, truth)
            )
            best = (centred * wanted).sum() / (centred**2).sum()
            torso = np.linalg.norm(wanted[:, 1], axis=-1).mean()
            found.append(np.linalg.norm(best * centred - wanted, axis=-1).mean() / torso)
    assert np.mean(errors[retarget_bones]) < 0.95 * np.mean(errors[align_keypoints])
    assert np.max(errors[retarget_bones]) < 0.04


def test_hands_and_face_follow():
    for driving, truth in map(pair, range(4)):
        result = retarget_bones(sequence(driving), sequence(truth[5:6]))
        for part in (LEFT_HAND, RIGHT_HAND, FACE):
            assert body_errors(result, truth, part)[0] < 0.06


def other_proportions(joints, factors):
    """Exact joints `(f, 128, 3)` of a body whose bones are longer by factors; the lower ankle keeps its height."""
    hips = joints[:, HIPS].mean(axis=1, keepdims=True)
    changed = joints.copy()
    changed[:, 1] = hips[:, 0] + factors["trunk"] * (joints[:, 1] - hips[:, 0])
    for name, points in {"hips": HIPS}.items():
        changed[:, points] = hips + factors[name] * (joints[:, points] - hips)
    for point, parent in PARENTS.items():
        group = BODY_NAMES[point].split("_")[1]
        changed[:, point] = changed[:, parent] + factors[group] * (joints[:, point] - joints[:, parent])
    for point in (0, 14, 15, 16, 17):
        changed[:, point] = changed[:, 1] + joints[:, point] - joints[:, 1]
    lift = joints[:, ANKLES, 1].min(axis=1) - changed[:, ANKLES, 1].min(axis=1)
    changed[..., 1] += lift[:, None]
    return changed


def project(joints, confidence):
    """Seen from far away: one scale for all depths."""
    x, y = 0.5 + 0.25 * joints[..., 0] * HEIGHT / WIDTH, 0.5 - 0.25 * joints[..., 1]
    return np.stack([x, y, confidence], axis=-1).astype(np.float32)


LONG_LEGS = {"trunk": 0.85, "hips": 1.0, "knee": 1.25, "ankle": 1.25, "shoulder": 1.1, "elbow": 0.85, "wrist": 0.85}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("frame", [0, 20])
def test_a_body_of_quite_other_proportions_is_met(number, frame):
    clip = render_clip(HELD_OUT_SEEDS[500 + number], **SMALL)
    shown = np.ones(clip.keypoints.shape[:2])
    driving, truth = project(clip.joints, shown), project(other_proportions(clip.joints, LONG_LEGS), shown)
    reference = sequence(truth[frame : frame + 1])
    with_bones = body_errors(retarget_bones(sequence(driving), reference), truth)
    with_scale = body_errors(align_keypoints(sequence(driving), reference), truth)
    assert with_bones[0] < 0.06
    assert (with_bones < 0.5 * with_scale).all()


def test_a_foot_on_the_floor_stays_where_the_scaled_floor_is():
    """The height of the lower ankle above its place in the reference changes as in the driver, times the scale."""
    clip = render_clip(HELD_OUT_SEEDS[501], **SMALL)
    shown = np.ones(clip.keypoints.shape[:2])
    driving, truth = project(clip.joints, shown), project(other_proportions(clip.joints, LONG_LEGS), shown)
    result = retarget_bones(sequence(driving), sequence(truth[:1]))
    lowest = pixels(result)[:, ANKLES, 1].max(axis=1)
    np.testing.assert_allclose(lowest - lowest[0], pixels(truth)[:, ANKLES, 1].max(axis=1) - lowest[0], atol=1.0)


def test_a_body_that_differs_only_in_size_and_place_is_met_exactly():
    driving, _ = pair(3)
    smaller = driving.copy()
    smaller[..., :2] = [0.1, 0.2] + 0.7 * driving[..., :2]
    smaller[..., 2] = driving[..., 2] = 1.0
    result = retarget_bones(sequence(driving), sequence(smaller[7:8]))
    # Frames that resemble frame 7 count as well as it; bones shrink towards the whole body's scale, which is theirs.
    assert body_errors(result, smaller)[0] < 0.02
    assert body_errors(result, smaller)[1] < 0.005
    np.testing.assert_array_equal(result[..., 2], driving[..., 2])


def test_black_bars_around_the_reference_change_nothing():
    driving, truth = pair(0)
    without = retarget_bones(sequence(driving), sequence(truth[:1]))
    framed, (width, height) = truth[:1].copy(), (WIDTH + 300, HEIGHT + 120)
    framed[..., :2] = (pixels(framed) + np.array([150, 60])) / [width, height]
    result = retarget_bones(sequence(driving), KeypointSequence(framed, width, height, 1.0))
    np.testing.assert_allclose(result[..., :2] * [width, height] - [150, 60], pixels(without), atol=0.05)


@pytest.mark.parametrize("lost", ["left_knee", "right_shoulder", "right_hip", "neck"])
def test_a_joint_that_is_lost_for_a_while_moves_no_other_joint_far(lost):
    driving, truth = pair(0)
    whole = retarget_bones(sequence(driving), sequence(truth[:1]))
    gaps = driving.copy()
    gaps[8:16, BODY_NAMES.index(lost)] = 0.0
    result = retarget_bones(sequence(gaps), sequence(truth[:1]))
    others = [point for point in range(18) if point != BODY_NAMES.index(lost)]
    assert body_errors(result, whole, others)[0] < 0.02
    assert np.abs(pixels(result)[:, others] - pixels(whole)[:, others]).max() < 0.1 * HEIGHT * 0.25
    assert (result[8:16, BODY_NAMES.index(lost), 2] == 0).all()


def test_an_upper_body_follows_its_neck():
    driving, truth = (points.copy() for points in pair(2))
    for points in (driving, truth):
        points[:, 8:14] = 0.0
    result = retarget_bones(sequence(driving), sequence(truth[4:5]))
    upper = [0, 1, 2, 3, 4, 5, 6, 7]
    difference = pixels(result)[:, upper] - pixels(pair(2)[1])[:, upper]
    torso = np.linalg.norm(pixels(pair(2)[1])[:, 1] - pixels(pair(2)[1])[:, HIPS].mean(axis=1), axis=-1).mean()
    assert np.linalg.norm(difference, axis=-1).mean() / torso < 0.06


def test_a_walk_through_the_picture_is_moved_inside():
    driving, truth = pair(1)
    walking = driving.copy()
    walking[..., 0] = 0.5 + 0.5 * (driving[..., 0] - 0.5) + np.linspace(-0.2, 0.2, NUM_FRAMES)[:, None]
    walking[..., 1] = 0.5 + 0.5 * (driving[..., 1] - 0.5)
    reference = truth[:1].copy()  # alike to the first frame, which is at the left
    reference[..., :2] = 0.5 + 0.5 * (reference[..., :2] - 0.5) + [0.2, 0.0]
    result = retarget_bones(sequence(walking), sequence(reference))
    shown = result[:, :18, 0][result[:, :18, 2] >= 0.3]
    assert shown.min() >= -1e-6
    assert shown.max() <= 1 + 1e-6


def test_what_cannot_be_retargeted_is_refused():
    driving, truth = pair(0)
    nobody = driving.copy()
    nobody[:, :18, 2] = 0.0
    with pytest.raises(AlignmentError, match=r"bones needs both hips or the neck, .* set 'align' to scale"):
        retarget_bones(sequence(nobody), sequence(truth[:1]))
    with pytest.raises(AlignmentError, match="hips or the neck"):
        retarget_bones(sequence(driving), sequence(nobody[:1]))
    few = truth[:1].copy()
    few[:, [0, *range(2, 8), 9, 10, 12, 13], 2] = 0.0
    with pytest.raises(AlignmentError, match=r"shows more than 3 of the bones .* 4 are needed"):
        retarget_bones(sequence(driving), sequence(few))
    tiny = truth[:1].copy()
    tiny[..., :2] = 0.5 + 0.1 * (tiny[..., :2] - 0.5)
    with pytest.raises(AlignmentError, match=r"scaled by 0.099., which is not between 0.2 and 5"):
        retarget_bones(sequence(driving), sequence(tiny))
