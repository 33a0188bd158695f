"""Normals, angles and alignment of surfaces that are known in closed form."""

import numpy as np
import pytest

from dreamdance.media.surfaces import (
    PinholeCamera,
    align_disparity,
    angles,
    consistency_angle,
    erode,
    normals_from_depth,
    normals_from_relief,
)

CAMERA = PinholeCamera(focal_x=60.0, focal_y=55.0, centre_x=19.5, centre_y=23.5)
HEIGHT, WIDTH = 48, 40


def plane_depth(normal: np.ndarray, distance: float = 3.0) -> np.ndarray:
    """Depth of the plane through (0, 0, -distance) with the given normal, `1 H W`."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ray = np.stack(
        [
            (columns - CAMERA.centre_x) / CAMERA.focal_x,
            -(rows - CAMERA.centre_y) / CAMERA.focal_y,
            -np.ones((HEIGHT, WIDTH)),
        ],
        axis=-1,
    )
    return (-distance * normal[2] / (ray @ normal))[None]


def tilted(degrees_x: float, degrees_y: float) -> np.ndarray:
    normal = np.array([np.sin(np.radians(degrees_x)), np.sin(np.radians(degrees_y)), 0.0])
    normal[2] = np.sqrt(1 - (normal**2).sum())
    return normal


@pytest.mark.parametrize("tilt", [(0, 0), (25, 0), (0, -30), (-20, 35)])
def test_the_normals_of_a_planes_depth_are_the_planes_normal(tilt):
    normal = tilted(*tilt)
    derived = normals_from_depth(plane_depth(normal), CAMERA)
    assert angles(derived[:, 1:-1, 1:-1], np.broadcast_to(normal, derived[:, 1:-1, 1:-1].shape)).max() < 1e-3


def test_a_wall_facing_the_camera_has_normals_towards_it():
    derived = normals_from_depth(np.full((1, HEIGHT, WIDTH), 2.0), CAMERA)
    np.testing.assert_allclose(derived, np.broadcast_to([0.0, 0.0, 1.0], derived.shape), atol=1e-12)


def test_consistency_is_zero_for_a_true_plane_and_the_tilt_for_a_wrong_one():
    normal = tilted(25, -10)
    mask = np.ones((1, HEIGHT, WIDTH), dtype=bool)
    normals = np.broadcast_to(normal, (1, HEIGHT, WIDTH, 3))
    assert consistency_angle(normals, plane_depth(normal), mask, CAMERA) < 1e-3
    wall = plane_depth(np.array([0.0, 0.0, 1.0]))
    expected = np.degrees(np.arccos(normal[2]))
    assert consistency_angle(normals, wall, mask, CAMERA) == pytest.approx(expected, rel=1e-9)


def test_consistency_does_not_look_across_the_outline_of_the_body():
    depth = np.full((1, HEIGHT, WIDTH), 9.0)
    depth[:, 10:30, 10:30] = 2.0
    mask = depth < 5
    normals = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (1, HEIGHT, WIDTH, 3))
    assert consistency_angle(normals, depth, mask, CAMERA) < 1e-9


def test_angles_of_nearly_parallel_float32_normals_are_not_lost_to_arccos():
    tiny = np.radians(1e-3)
    vectors = np.array([0.0, np.sin(tiny), np.cos(tiny)])
    assert angles(np.float32(vectors), np.array([0.0, 0.0, 1.0], np.float32)) == pytest.approx(1e-3, rel=1e-4)


def test_alignment_is_numpys_least_squares():
    generator = np.random.default_rng(0)
    prediction, truth = generator.normal(size=50), generator.normal(size=50)
    np.testing.assert_allclose(align_disparity(prediction, truth), np.polyfit(prediction, truth, 1), rtol=1e-10)


def test_a_resized_camera_sees_the_same_plane():
    normal = tilted(15, 10)
    half = CAMERA.resized((HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2))
    blocks = plane_depth(normal).reshape(1, HEIGHT // 2, 2, WIDTH // 2, 2)
    inverse = (1 / blocks).mean(axis=(2, 4))  # disparity of a plane is linear in the picture
    derived = normals_from_depth(1 / inverse, half)[:, 1:-1, 1:-1]
    assert angles(derived, np.broadcast_to(normal, derived.shape)).max() < 1e-3


def test_erosion_drops_the_rim_and_holes():
    mask = np.ones((1, 5, 7), dtype=bool)
    mask[0, 2, 1] = False
    eroded = erode(mask)
    assert eroded[0, 1:4, 3:6].all()
    assert eroded.sum() == 9


def test_a_consistency_without_pixels_is_no_number():
    maps, normals = np.ones((1, 4, 4)), np.ones((1, 4, 4, 3))
    assert np.isnan(consistency_angle(normals, maps, np.zeros((1, 4, 4), dtype=bool), CAMERA))


def test_the_normals_of_a_hemisphere_in_parallel_projection_point_from_its_centre():
    rows, columns = np.mgrid[-30:31, -30:31].astype(float)
    height = np.sqrt(np.maximum(60.0**2 - columns**2 - rows**2, 0))
    expected = np.stack([columns, -rows, height], axis=-1) / 60.0
    assert angles(normals_from_relief(height)[1:-1, 1:-1], expected[1:-1, 1:-1]).max() < 0.05
