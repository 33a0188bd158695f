"""Flicker, colour drift and seams of sequences whose changes are known exactly."""

import numpy as np
import pytest

from dreamdance.evaluation.temporal_metrics import colour_drift, colour_drift_curve, flicker, seam_ratio

NUM_FRAMES, SIZE = 8, 12
RUN = [list(range(NUM_FRAMES))]


def standing() -> np.ndarray:
    """A picture that does not move, with a square of random values where a body is."""
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.uniform(0.2, 0.8, (1, SIZE, SIZE, 3)), NUM_FRAMES, axis=0)
    frames[:, 4:8, 4:8] = generator.uniform(0.2, 0.8, (NUM_FRAMES, 4, 4, 3))
    return frames.astype(np.float32)


def test_flicker_is_the_change_of_pixels_that_stand_still_in_grey_levels():
    truth = standing()
    assert flicker(truth, truth, runs=RUN) == 0.0
    flickering = truth + np.float32(5 / 255) * (np.arange(NUM_FRAMES) % 2).astype(np.float32)[:, None, None, None]
    assert flicker(flickering, truth, runs=RUN) == pytest.approx(5.0, rel=1e-4)
    moving = truth.copy()
    moving[:, 5:7, 5:7] = np.random.default_rng(1).uniform(size=(NUM_FRAMES, 2, 2, 3))
    assert flicker(moving, truth, runs=RUN) == 0.0, "the body moves in the truth too"


def test_flicker_leaves_out_the_body_and_its_rim_and_steps_over_a_gap():
    truth = standing()
    truth[:] = truth[:1]
    frames, mask = truth.copy(), np.zeros(truth.shape[:3], dtype=bool)
    mask[:, 4:8, 4:8] = True
    frames[::2, 3:9, 3:9] += 0.1
    assert flicker(frames, truth, mask, runs=RUN) == 0.0
    assert flicker(frames, truth, runs=RUN) == pytest.approx(25.5 * 36 / SIZE**2, rel=1e-4)
    stepped = truth.copy()
    stepped[4:] += 0.1
    assert flicker(stepped, truth, runs=[[0, 1, 2, 3], [4, 5, 6, 7]]) == 0.0
    assert flicker(stepped, truth, runs=RUN) == pytest.approx(25.5 / 7, rel=1e-4)


def test_where_nothing_stands_still_there_is_no_flicker():
    frames = np.random.default_rng(2).uniform(size=(4, 6, 6, 3))
    assert np.isnan(flicker(frames, frames, runs=[[0, 1, 2, 3]]))


def test_drift_is_that_of_the_mean_colour_over_a_thousand_frames():
    steps = np.arange(1000) / 999
    frames = np.full((1000, 2, 2, 3), 0.25) + steps[:, None, None, None] * np.array([0.3, -0.06, 0.0])
    curve = colour_drift_curve(frames)
    np.testing.assert_allclose(curve, steps * 255 * 0.12, atol=1e-9)
    assert colour_drift(frames) == pytest.approx(255 * 0.12 * steps[900:].mean())
    assert colour_drift(frames[:1]) == 0.0
    swapped = np.repeat([[[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]], 2, axis=0)
    swapped[1] = swapped[1, :, ::-1]
    assert colour_drift(swapped) == 0.0, "a picture that moves does not drift"


def test_the_seam_ratio_compares_steps_at_seams_with_the_others_and_with_the_truth():
    truth = np.repeat(np.linspace(0.1, 0.5, NUM_FRAMES)[:, None, None, None], 3, axis=3)
    assert seam_ratio(truth, truth, runs=RUN, seams=[4]) == pytest.approx(1.0)
    jumping = truth.copy()
    jumping[4:] += truth[1] - truth[0]
    assert seam_ratio(jumping, truth, runs=RUN, seams=[4]) == pytest.approx(2.0)
    fast = truth.copy()
    fast[4:] += 0.3  # the truth jumps too
    assert seam_ratio(fast, fast, runs=RUN, seams=[4]) == pytest.approx(1.0)
    for seams in ([], list(range(1, NUM_FRAMES))):
        assert np.isnan(seam_ratio(truth, truth, runs=RUN, seams=seams))
