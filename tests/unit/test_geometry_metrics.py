"""Geometry metrics on predictions whose errors are known in closed form."""

import numpy as np
import pytest

from dreamdance.evaluation.geometry_metrics import (
    angular_error,
    depth_error,
    disparity_error,
    parallel_consistency,
)


def tilted(degrees_x: float, degrees_y: float) -> np.ndarray:
    normal = np.array([np.sin(np.radians(degrees_x)), np.sin(np.radians(degrees_y)), 0.0])
    normal[2] = np.sqrt(1 - (normal**2).sum())
    return normal


def test_a_known_rotation_is_the_angular_error():
    truth = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (2, 4, 5, 3))
    turned = np.broadcast_to(tilted(20, 0), truth.shape)
    error = angular_error(turned, truth, np.ones((2, 4, 5), dtype=bool))
    assert (error.mean, error.median) == (pytest.approx(20.0), pytest.approx(20.0))


def test_mean_and_median_angle_count_only_the_body():
    truth = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (1, 1, 4, 3))
    prediction = np.stack([tilted(0, 0), tilted(10, 0), tilted(50, 0), tilted(-80, 0)])[None, None]
    error = angular_error(prediction, truth, np.array([[[True, True, True, False]]]))
    assert (error.mean, error.median) == (pytest.approx(20.0), pytest.approx(10.0))


def test_scale_and_shift_of_disparity_do_not_count():
    truth = np.random.default_rng(0).uniform(0.2, 0.5, (3, 8, 6))
    mask = np.ones(truth.shape, dtype=bool)
    error = depth_error(7.0 * truth - 1.3, truth, mask, min_disparity=0.1)
    assert error.abs_rel < 1e-12
    assert error.delta == 1.0


def test_flicker_counts_since_one_alignment_serves_the_whole_clip():
    truth = np.random.default_rng(0).uniform(0.2, 0.5, (2, 8, 6))
    flickering = truth * np.array([1.0, 1.4]).reshape(2, 1, 1)
    mask = np.ones(truth.shape, dtype=bool)
    for frame in range(2):
        one = slice(frame, frame + 1)
        assert depth_error(flickering[one], truth[one], mask[one], min_disparity=0.1).abs_rel < 1e-12
    assert depth_error(flickering, truth, mask, min_disparity=0.1).abs_rel > 0.05


def test_fitted_to_whole_frames_a_body_at_the_wrong_distance_counts_and_fitted_to_the_body_it_does_not():
    truth = np.random.default_rng(0).uniform(0.2, 0.3, (1, 20, 20))
    mask = np.zeros(truth.shape, dtype=bool)
    mask[:, 5:9, 5:9] = True
    truth[mask] += 0.4
    prediction = np.where(mask, truth - 0.2, truth)
    assert depth_error(prediction, truth, mask, min_disparity=0.1).abs_rel > 0.1
    assert depth_error(prediction, truth, mask, min_disparity=0.1, fit_mask=mask).abs_rel < 1e-12


def test_abs_rel_and_delta_have_their_textbook_values():
    """A constant prediction is aligned to the mean disparity 0.375: depth 8/3 against true depths 2 and 4."""
    truth = np.array([[[0.5, 0.25]]])
    error = depth_error(np.zeros((1, 1, 2)), truth, np.ones((1, 1, 2), dtype=bool), min_disparity=0.1)
    assert error.abs_rel == pytest.approx((abs(8 / 3 - 2) / 2 + abs(8 / 3 - 4) / 4) / 2)
    assert error.delta == 0.0
    near = depth_error(np.zeros((1, 1, 2)), np.array([[[0.5, 0.45]]]), np.ones((1, 1, 2), bool), min_disparity=0.1)
    assert near.delta == 1.0


def test_a_prediction_that_aligns_below_zero_is_clamped_to_the_farthest_point():
    truth = np.full((1, 1, 101), 0.5)
    truth[..., :50] = 0.3
    prediction = truth.copy()
    prediction[..., 100] = -20.0  # one wild pixel
    error = depth_error(prediction, truth, np.ones(truth.shape, dtype=bool), min_disparity=0.25)
    assert error.abs_rel <= 0.5 / 0.25 - 1
    assert np.isfinite(error.abs_rel)


def test_depth_outside_the_body_changes_nothing_where_it_is_not_fitted():
    truth = np.random.default_rng(0).uniform(0.2, 0.5, (1, 8, 6))
    mask = np.zeros(truth.shape, dtype=bool)
    mask[:, 2:6, 1:5] = True
    prediction = np.where(mask, 2 * truth + 1, -1e6)
    assert depth_error(prediction, truth, mask, min_disparity=0.1, fit_mask=mask).abs_rel < 1e-12


def test_an_empty_mask_gives_no_number():
    empty = np.zeros((1, 4, 4), dtype=bool)
    maps, normals = np.ones((1, 4, 4)), np.ones((1, 4, 4, 3))
    assert np.isnan(depth_error(maps, maps, empty, min_disparity=0.1).abs_rel)
    assert np.isnan(angular_error(normals, normals, empty).mean)


def test_disparity_that_is_no_disparity_is_refused():
    maps, mask = np.zeros((1, 4, 4)), np.ones((1, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="must be positive inside the mask"):
        depth_error(maps, maps, mask, min_disparity=0.1)
    with pytest.raises(ValueError, match="min_disparity"):
        depth_error(maps + 1, maps + 1, mask, min_disparity=0.0)
    with pytest.raises(ValueError, match="both maps must be"):
        depth_error(maps[:, :2], maps, mask, min_disparity=0.1)


def test_disparity_without_a_unit_is_compared_over_whole_frames_up_to_scale_and_shift():
    truth = np.random.default_rng(4).uniform(0.0, 1.0, (3, 8, 6))
    assert disparity_error(3 * truth - 2, truth) == pytest.approx(0.0, abs=1e-12)
    flat = np.full_like(truth, 0.7)
    assert disparity_error(flat, truth) == pytest.approx(np.abs(truth - truth.mean()).mean())


def test_normals_agree_with_the_relief_that_they_belong_to_without_a_camera():
    rows, columns = np.mgrid[:48, :48] / 24.0 - 1
    inside = (rows**2 + columns**2 < 0.8)[None]
    height = np.sqrt(np.maximum(1 - rows**2 - columns**2, 0))[None]
    sphere = np.stack([columns, -rows, height[0]], axis=-1)[None]
    mask = inside & (height > 0.5)
    disparity = 0.3 + 0.1 * height
    assert parallel_consistency(sphere, disparity, mask) < 1.0
    assert parallel_consistency(sphere, 1 - disparity, mask) > 20, "near and far exchanged"
    many = [np.repeat(part, 2000, axis=0) for part in (sphere, disparity, mask)]
    assert parallel_consistency(*many) == pytest.approx(parallel_consistency(sphere, disparity, mask), rel=1e-3)
