"""Flicker of disparity: true disparities of a rendered dancer, each frame with a scale and a shift of its own."""

from itertools import pairwise

import numpy as np
import pytest

from dreamdance.annotators.depth_windows import (
    align_frames,
    fit,
    join_windows,
    split_windows,
    steady_disparity,
    steady_person,
)
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.media.surfaces import align_disparity


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return (1 / render_clip(11, num_frames=75, width=48, height=64, fps=15.0).depth).astype(np.float32)


def error_after_one_alignment(values: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square difference, as a share of the truth's deviation, after one scale and shift for all frames."""
    scale, shift = align_disparity(values.reshape(-1), truth.reshape(-1))
    return float(np.sqrt(((scale * values + shift - truth) ** 2).mean()) / truth.std())


@pytest.mark.parametrize("num_frames", [1, 9, 10, 11, 32, 33, 54, 55, 100])
def test_windows_cover_all_frames_and_overlap_by_ten(num_frames):
    windows = split_windows(num_frames)
    assert (windows[0].start, windows[-1].stop) == (0, num_frames)
    assert all(1 <= window.stop - window.start <= 32 for window in windows)
    assert all(before.stop - after.start == 10 for before, after in pairwise(windows))


def test_windows_of_different_scale_and_shift_join_without_a_trace(truth):
    places = split_windows(len(truth))
    assert len(places) == 3
    changed = [
        truth[place] * scale + shift for place, scale, shift in zip(places, (1, 4, 0.2), (0, -2, 5), strict=True)
    ]
    np.testing.assert_allclose(join_windows(changed, places), truth, atol=2e-5)


def test_a_step_between_windows_is_faded_over_the_frames_that_they_share():
    base = np.tile(np.linspace(0, 1, 50, dtype=np.float32), (54, 2, 1))
    places = split_windows(54)
    bent = base.copy()
    bent[..., 25:] += 0.3 * base[..., 25:]  # no scale and shift undoes this
    joined = join_windows([base[places[0]], bent[places[1]]], places)
    steps = np.abs(np.diff(joined, axis=0)).max(axis=(1, 2))
    jump = np.abs(joined[-1] - joined[0]).max()
    assert steps.max() < 0.15 * jump
    assert np.count_nonzero(steps > 1e-6) == 11


def test_flicker_is_removed_while_the_dancer_moves(truth):
    generator = np.random.default_rng(0)
    scales, shifts = generator.uniform(0.6, 1.6, (75, 1, 1)), generator.uniform(-1, 1, (75, 1, 1))
    flickering = (truth * scales + shifts).astype(np.float32)
    assert error_after_one_alignment(flickering, truth) > 0.9
    assert error_after_one_alignment(steady_disparity(flickering), truth) < 0.05


def test_what_does_not_flicker_stays(truth):
    assert error_after_one_alignment(steady_disparity(truth), truth) < 0.03


def test_one_frame_and_frames_without_relief_stay_as_they_are(truth):
    np.testing.assert_allclose(steady_disparity(truth[:1]), truth[:1], rtol=1e-5)
    flat = np.full((4, 6, 5), 2.0, np.float32)
    np.testing.assert_array_equal(steady_disparity(flat), flat)


def test_the_fit_ignores_what_moves_and_never_turns_depth_round():
    generator = np.random.default_rng(0)
    values = generator.random(1000).astype(np.float32)
    reference = 3 * values + 1
    reference[:200] = generator.random(200) * 10
    assert fit(values, reference) == (pytest.approx(3, abs=1e-4), pytest.approx(1, abs=1e-4))
    scale, shift = fit(values, -values)
    assert scale == 1.0
    assert shift == pytest.approx(-2 * values.mean(), abs=1e-5)
    aligned = align_frames(np.stack([values, -values, values]).reshape(3, 10, 100))
    assert np.corrcoef(aligned[0].reshape(-1), values)[0, 1] > 0.99


@pytest.fixture(scope="module")
def people() -> list[tuple[np.ndarray, np.ndarray]]:
    """Disparities and masks of dancers who move."""
    clips = [render_clip(seed, num_frames=24, width=48, height=72, fps=15.0) for seed in HELD_OUT_SEEDS[:4]]
    return [((1 / clip.depth).astype(np.float32), clip.mask) for clip in clips]


def test_flicker_of_a_person_is_mostly_removed_where_pixels_do_not_correspond(people):
    generator, errors = np.random.default_rng(0), []
    for truth, mask in people:
        scales, shifts = generator.uniform(0.6, 1.6, (24, 1, 1)), generator.uniform(-1, 1, (24, 1, 1))
        flickering = np.where(mask, truth * scales + shifts, generator.normal(size=truth.shape)).astype(np.float32)
        steady = steady_person(flickering, mask)
        errors.append([error_after_one_alignment(one[mask], truth[mask]) for one in (flickering, steady)])
    before, after = np.mean(errors, axis=0)
    assert before > 0.9
    assert after < 0.3


def test_frames_with_no_or_hardly_any_person_are_not_scaled(people):
    truth, mask = people[0]
    few = mask.copy()
    few[3] = False
    few[5] = False
    few[5, 30:35, 20:25] = True
    steady = steady_person(truth, few)
    np.testing.assert_array_equal(steady[3], truth[3])
    moved = steady[5] - truth[5]
    assert np.ptp(moved) < 1e-5
    assert steady[5][few[5]].mean() == pytest.approx(steady[0][mask[0]].mean(), rel=1e-4)
    np.testing.assert_array_equal(steady_person(truth, np.zeros_like(mask)), truth)
