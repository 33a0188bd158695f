"""Key points over time: noise on exact dancers falls, motion stays, gaps are filled or left."""

from functools import cache

import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.media.keypoint_filter import MAX_GAP_FRAMES, fill_gaps, filter_keypoints, measure_jitter
from dreamdance.media.keypoints import LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND, KeypointSequence

WIDTH, HEIGHT, FPS = 256, 384, 30.0
LEFT_WRIST, RIGHT_WRIST = 7, 4


@cache
def dancer(number):
    points = render_clip(HELD_OUT_SEEDS[300 + number], num_frames=60, width=24, height=36, fps=FPS).keypoints
    points[..., 2] = 1.0
    points.setflags(write=False)
    return points


def sequence(keypoints, fps=FPS):
    return KeypointSequence(keypoints, WIDTH, HEIGHT, fps)


def torso(points):
    places = points[..., :2].astype(np.float64) * [WIDTH, HEIGHT]
    return float(np.linalg.norm(places[:, 1] - places[:, [8, 11]].mean(axis=1), axis=-1).mean())


def with_noise(points, size, seed=0):
    """Independent noise on x and y, of a standard deviation in torsos."""
    noise = np.random.default_rng(seed).normal(0, size * torso(points), (*points.shape[:2], 2)) / [WIDTH, HEIGHT]
    changed = points.copy()
    changed[..., :2] += noise
    return changed.astype(np.float32)


def error(points, truth):
    """The mean distance of the body's joints, in torsos."""
    distance = (points[:, :18, :2] - truth[:, :18, :2]).astype(np.float64) * [WIDTH, HEIGHT]
    return float(np.linalg.norm(distance, axis=-1).mean() / torso(truth))


@pytest.mark.parametrize(("noise", "left"), [(0.005, 0.95), (0.01, 0.8), (0.02, 0.75)])
def test_errors_of_noisy_dancers_fall(noise, left):
    noisy = [with_noise(dancer(number), noise) for number in range(4)]
    before = np.array([error(points, dancer(number)) for number, points in enumerate(noisy)])
    after = np.array([error(filter_keypoints(sequence(points)), dancer(number)) for number, points in enumerate(noisy)])
    assert before.mean() == pytest.approx(noise * np.sqrt(np.pi / 2), rel=0.05)
    assert (after < before).all()
    assert after.mean() < left * before.mean()


def test_exact_dancers_move_by_less_than_a_hundredth_of_the_torso():
    for number in range(4):
        assert error(filter_keypoints(sequence(dancer(number))), dancer(number)) < 0.006


def wave(hertz, torsos):
    """A standing dancer whose right wrist waves from side to side."""
    points = np.repeat(dancer(0)[:1], 90, axis=0)
    swing = np.sin(2 * np.pi * hertz * np.arange(90) / FPS)
    points[:, RIGHT_WRIST, 0] += torsos * torso(dancer(0)[:1]) / WIDTH * swing
    return points


@pytest.mark.parametrize(("hertz", "torsos", "kept"), [(2.5, 0.5, 0.96), (1.0, 0.5, 0.99), (2.5, 0.05, 0.8)])
def test_a_fast_wave_keeps_its_amplitude_and_its_time(hertz, torsos, kept):
    truth = wave(hertz, torsos)
    paths = [points[15:-15, RIGHT_WRIST, 0].astype(np.float64) for points in (filter_keypoints(sequence(truth)), truth)]
    found, wanted = (path - path.mean() for path in paths)
    assert kept < np.abs(found).max() / np.abs(wanted).max() <= 1.001
    turning = np.exp(-2j * np.pi * hertz * np.arange(60) / FPS)  # whole periods
    lag = np.angle((wanted * turning).sum() / (found * turning).sum()) / (2 * np.pi * hertz) * FPS
    assert abs(lag) < 0.02, "frames"


@pytest.mark.parametrize("noise", [0.005, 0.01, 0.03])
def test_jitter_is_the_deviation_of_the_noise(noise):
    for number in range(3):
        noisy = with_noise(dancer(number), noise)
        assert measure_jitter(sequence(noisy)) == pytest.approx(noise, rel=0.12)
        assert measure_jitter(sequence(filter_keypoints(sequence(noisy)))) < 0.6 * noise
        assert measure_jitter(sequence(dancer(number))) < 0.001


def test_jitter_does_not_depend_on_the_size_in_the_frame():
    noisy = with_noise(dancer(1), 0.01)
    smaller = noisy.copy()
    smaller[..., :2] = 0.3 + 0.4 * noisy[..., :2]
    assert measure_jitter(sequence(smaller)) == pytest.approx(measure_jitter(sequence(noisy)), rel=1e-3)
    upper = noisy.copy()
    upper[:, 8:14, 2] = 0.0  # without hips the shoulders measure the body
    assert measure_jitter(sequence(upper)) == pytest.approx(0.01, rel=0.5)


def test_jitter_of_too_short_or_unseen_sequences_is_not_a_number():
    assert np.isnan(measure_jitter(sequence(dancer(0)[:4])))
    unseen = dancer(0).copy()
    unseen[::3, :, 2] = 0.0
    assert np.isnan(measure_jitter(sequence(unseen)))


@pytest.mark.parametrize("length", [1, MAX_GAP_FRAMES])
def test_a_short_gap_is_filled_with_lowered_confidence(length):
    points = dancer(2).copy()
    points[20 : 20 + length, LEFT_WRIST] = 0.0
    points[19, LEFT_WRIST, 2] = 0.8
    filled = fill_gaps(points)
    np.testing.assert_allclose(filled[20 : 20 + length, LEFT_WRIST, 2], 0.4, rtol=1e-6)
    frames = np.arange(20, 20 + length)
    for axis in (0, 1):
        ends = dancer(2)[[19, 20 + length], LEFT_WRIST, axis]
        np.testing.assert_allclose(
            filled[frames, LEFT_WRIST, axis], np.interp(frames, [19, 20 + length], ends), rtol=1e-5
        )
    untouched = np.ones(points.shape[:2], dtype=bool)
    untouched[frames, LEFT_WRIST] = False
    np.testing.assert_array_equal(filled[untouched], points[untouched])


def test_points_that_are_too_uncertain_to_be_drawn_are_filled_too():
    points = dancer(2).copy()
    points[19, LEFT_WRIST, 2] = 0.4
    points[20:23, LEFT_WRIST] = [0.0, 0.0, 0.29]
    filled = fill_gaps(points)
    for axis in (0, 1):
        expected = np.interp([20, 21, 22], [19, 23], points[[19, 23], LEFT_WRIST, axis])
        np.testing.assert_allclose(filled[20:23, LEFT_WRIST, axis], expected, rtol=1e-5)
    np.testing.assert_allclose(filled[20:23, LEFT_WRIST, 2], 0.3, rtol=1e-6)  # drawn, as its ends are


def test_longer_gaps_and_the_ends_of_a_clip_stay_and_nothing_missing_moves():
    points = with_noise(dancer(2), 0.01)
    gaps = [slice(20, 21 + MAX_GAP_FRAMES), slice(0, 2), slice(-3, None)]
    for gap in gaps:
        points[gap, LEFT_WRIST] = [0.123, 0.456, 0.0]
    points[:, 11] = [0.5, 0.6, 0.0]
    result = filter_keypoints(sequence(points))
    for gap in gaps:
        np.testing.assert_array_equal(result[gap, LEFT_WRIST], points[gap, LEFT_WRIST])
    np.testing.assert_array_equal(result[:, 11], points[:, 11])
    # The frames beside a gap are not drawn towards the meaningless place inside it.
    reach = np.abs(
        result[[19, 21 + MAX_GAP_FRAMES], LEFT_WRIST, :2] - points[[19, 21 + MAX_GAP_FRAMES], LEFT_WRIST, :2]
    )
    assert (reach * [WIDTH, HEIGHT]).max() < 0.05 * torso(dancer(2))


def test_hands_do_not_mix():
    points = with_noise(dancer(3), 0.01)
    others = points.copy()
    others[:, RIGHT_HAND] = with_noise(dancer(1), 0.05)[:, RIGHT_HAND]
    others[10:13, RIGHT_HAND] = 0.0
    first, second = filter_keypoints(sequence(points)), filter_keypoints(sequence(others))
    np.testing.assert_array_equal(first[:, LEFT_HAND], second[:, LEFT_HAND])
    assert not np.array_equal(first[:, RIGHT_HAND], second[:, RIGHT_HAND])


def test_a_clip_without_a_person_stays():
    nobody = np.zeros((3, NUM_KEYPOINTS, 3), np.float32)
    np.testing.assert_array_equal(filter_keypoints(sequence(nobody)), nobody)
    one = dancer(0)[:1]
    np.testing.assert_allclose(filter_keypoints(sequence(one)), one, atol=1e-6)
