"""Regions of pictures: pixels into the square, points back to the picture."""

import math

import numpy as np
import pytest

from dreamdance.annotators.picture_regions import crop_region, paste_region, region_along, to_picture, whole_picture

REGIONS = [(60.0, 40.0, 64.0, 0.0), (60.0, 40.0, 50.0, 0.7), (50.5, 44.25, 96.0, -2.4), (64.0, 48.0, 128.0, math.pi)]


def blob_at(x, y, *, width=128, height=96):
    """A smooth spot whose centre of mass is x, y, with pixel centres at halves."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 4.0**2)).astype(np.float32)


def centre_of_mass(picture):
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    weights = picture.astype(np.float64) / picture.sum()
    return np.array([(weights * columns).sum(), (weights * rows).sum()])


@pytest.mark.parametrize("region", REGIONS)
def test_a_point_found_in_the_square_is_where_it_was_in_the_picture(region):
    # Within the region, whatever its rotation.
    place = np.array([region[0] + 7.3, region[1] - 4.6])
    square = crop_region(blob_at(*place), region, size=128)
    assert to_picture(centre_of_mass(square), region, size=128) == pytest.approx(place, abs=0.05)


@pytest.mark.parametrize("region", REGIONS)
def test_pasting_a_square_puts_its_values_back(region):
    picture = blob_at(region[0] + 7.3, region[1] - 4.6)
    pasted = paste_region(crop_region(picture, region, size=128), region, width=128, height=96, outside=0.0)
    assert np.abs(pasted - picture).max() < 0.03


def test_a_whole_upright_square_is_the_picture_itself():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(crop_region(picture, whole_picture(64, 64), size=64), picture)


def test_pixels_beyond_the_picture_have_the_given_value():
    square = crop_region(np.full((40, 80), 5.0, np.float32), whole_picture(80, 40), size=80, outside=-3.0)
    assert (square[:19] == -3.0).all()
    assert (square[21:59] == 5.0).all()


@pytest.mark.parametrize(
    ("direction", "rotation"),
    [((0, -1), 0.0), ((1, 0), math.pi / 2), ((0, 1), math.pi), ((-1, 0), -math.pi / 2), ((1, -1), math.pi / 4)],
)
def test_a_body_that_leans_to_the_right_has_a_positive_rotation(direction, rotation):
    assert region_along(np.zeros(2), np.array(direction, dtype=float)) == pytest.approx(rotation)
    up = to_picture(np.array([64.0, 0.0]), (0.0, 0.0, 2.0, rotation), size=128)
    assert up == pytest.approx(np.array(direction) / np.hypot(*direction), abs=1e-9)
