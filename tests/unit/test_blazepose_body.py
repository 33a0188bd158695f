"""What is computed from the outputs of BlazePose's body network."""

import numpy as np
import pytest

from dreamdance.annotators.blazepose_body import find_depths, refine_by_heatmap, region_around
from dreamdance.annotators.protocols import LANDMARK_NAMES


def test_the_region_of_an_upright_body_is_centred_on_its_hips_and_wider_than_its_circle():
    assert region_around(np.array([50.0, 80.0]), np.array([50.0, 20.0])) == pytest.approx((50.0, 80.0, 150.0, 0.0))
    assert region_around(np.array([50.0, 80.0]), np.array([80.0, 80.0])) == pytest.approx((50, 80, 75, np.pi / 2))


def test_a_point_moves_to_the_maximum_of_its_heat_map_and_stays_without_one():
    heatmap = np.full((64, 64, 3), -20.0, dtype=np.float32)
    heatmap[30, 21, 0] = 20.0  # row, column
    heatmap[30, 21, 1] = -2.0  # the confidence is 0.12
    places = np.array([[20.2 * 4, 28.6 * 4], [20.2 * 4, 28.6 * 4], [-3.0, 300.0]])
    refined = refine_by_heatmap(places, heatmap, size=256)
    assert refined[0] == pytest.approx((21 * 4, 30 * 4))
    assert refined[1:] == pytest.approx(places[1:])


@pytest.mark.parametrize("rotation", [0.0, 0.8, -2.0])
def test_depths_are_metres_at_the_scale_of_the_picture_from_the_hips_towards_the_camera(rotation):
    generator = np.random.default_rng(0)
    metres = generator.normal(size=(33, 3))
    cosine, sine = np.cos(rotation), np.sin(rotation)
    turned = np.stack([cosine * metres[:, 0] - sine * metres[:, 1], sine * metres[:, 0] + cosine * metres[:, 1]], 1)
    hips = [LANDMARK_NAMES.index(f"{side}_hip") for side in ("left", "right")]
    depths = find_depths(turned * 130.0 + (200.0, 300.0), metres, rotation)
    assert depths == pytest.approx(-130.0 * (metres[:, 2] - metres[hips, 2].mean()))
