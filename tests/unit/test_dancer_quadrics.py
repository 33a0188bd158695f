"""Ray casting of quadrics against closed forms and brute force, in float64."""

import numpy as np
import pytest

from dreamdance.dancers.quadrics import ShapeList, cast, depth_along, leave_out, surface_normals, to_camera

FOCAL, WIDTH, HEIGHT = 150.0, 48, 64
ORIGIN, LEVEL = np.zeros(3), np.eye(3)


def rays() -> np.ndarray:
    x = (np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL
    y = (HEIGHT / 2 - 0.5 - np.arange(HEIGHT)) / FOCAL
    grid = np.stack(np.broadcast_arrays(x[None, :], y[:, None], -1.0), axis=-1)
    return grid.reshape(-1, 3)


def sphere_depths(centre: np.ndarray, radius: float) -> np.ndarray:
    directions = rays()
    a = (directions**2).sum(-1)
    b = directions @ centre
    inside = b * b - a * (centre @ centre - radius**2)
    return np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)


def picture(shapes: ShapeList, frame: int = 0) -> np.ndarray:
    quadrics = to_camera(shapes, ORIGIN, LEVEL)
    hits = cast(quadrics, focal=FOCAL, width=WIDTH, height=HEIGHT)
    depths = np.full(shapes.num_frames * HEIGHT * WIDTH, np.inf)
    depths[hits.pixels] = hits.depths
    return depths.reshape(shapes.num_frames, -1)[frame]


def assert_same_depths(found: np.ndarray, expected: np.ndarray) -> None:
    both = np.isfinite(found) & np.isfinite(expected)
    assert both.sum() > 50
    # Only a pixel whose centre lies on the outline, to rounding, may differ.
    assert (np.isfinite(found) != np.isfinite(expected)).sum() <= 2
    np.testing.assert_allclose(found[both], expected[both], rtol=2e-6)


def test_a_sphere_is_seen_where_the_closed_form_says() -> None:
    shapes = ShapeList(1)
    centre = np.array([0.11, -0.2, -4.0])
    shapes.add_sphere(0, centre[None], 0.23)
    assert_same_depths(picture(shapes), sphere_depths(centre, 0.23))


def test_the_nearest_of_several_shapes_is_seen() -> None:
    shapes = ShapeList(1)
    near, far = np.array([0.05, 0.0, -3.5]), np.array([0.0, 0.1, -4.2])
    shapes.add_sphere(5, far[None], 0.5)
    shapes.add_sphere(7, near[None], 0.12)
    assert_same_depths(picture(shapes), np.minimum(sphere_depths(near, 0.12), sphere_depths(far, 0.5)))
    quadrics = to_camera(shapes, ORIGIN, LEVEL)
    hits = cast(quadrics, focal=FOCAL, width=WIDTH, height=HEIGHT)
    middle = np.flatnonzero(hits.pixels == HEIGHT // 2 * WIDTH + WIDTH // 2)
    assert quadrics.skins[hits.quadrics[middle]].tolist() == [7]


@pytest.mark.parametrize(
    ("start", "end", "radii"),
    [
        ((-0.2, -0.3, -4.0), (0.25, 0.3, -3.7), (0.2, 0.08)),
        ((0.1, 0.0, -4.0), (-0.2, 0.05, -4.4), (0.05, 0.15)),
        ((0.0, 0.1, -4.5), (0.05, -0.05, -2.5), (0.3, 0.02)),  # points at the camera, which lies in its cone
        ((0.0, 0.2, -3.5), (0.0, -0.3, -3.5), (0.1, 0.1)),
    ],
)
def test_a_round_cone_is_the_hull_of_its_spheres(
    start: tuple[float, ...], end: tuple[float, ...], radii: tuple[float, float]
) -> None:
    a, b = np.array(start), np.array(end)
    shapes = ShapeList(1)
    shapes.add_cone(0, a[None], b[None], *radii)
    shapes.add_sphere(0, a[None], radii[0])
    shapes.add_sphere(0, b[None], radii[1])
    shares = np.linspace(0, 1, 1501)
    hull = np.min([sphere_depths(a + (b - a) * s, radii[0] + (radii[1] - radii[0]) * s) for s in shares], axis=0)
    found = picture(shapes)
    both = np.isfinite(found) & np.isfinite(hull)
    assert (np.isfinite(found) != np.isfinite(hull)).sum() <= 2
    # The hull is made of finitely many spheres, so that it lies up to (spacing^2 / radius) behind the cone.
    assert (found[both] <= hull[both] * (1 + 1e-6)).all()
    assert np.median(hull[both] - found[both]) < 1e-5


def test_stretching_the_world_stretches_the_shape() -> None:
    stretch = np.diag([1.5, 0.8, 1.0])
    plain, stretched = ShapeList(1), ShapeList(1)
    a, b = np.array([[0.1, -0.1, -4.0]]), np.array([[-0.1, 0.2, -4.0]])
    plain.add_cone(0, a, b, 0.1, 0.15)
    stretched.add_cone(0, a @ stretch, b @ stretch, 0.1, 0.15, stretch=stretch)
    directions = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 200, 2))
    moved = directions * (1.5, 0.8)
    expected = depth_along(to_camera(plain, ORIGIN, LEVEL), directions)
    found = depth_along(to_camera(stretched, ORIGIN, LEVEL), moved)
    assert np.isfinite(expected).sum() > 20
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_cut_ellipsoid_keeps_only_the_side_that_its_normal_points_to() -> None:
    shapes = ShapeList(1)
    shapes.add_ellipsoid(
        0, np.array([[0.0, 0.0, -4.0]]), 0.4 * np.eye(3)[None], cut_normal=np.array([[0.0, 1.0, 0.0]]), cut_offset=0.1
    )
    depths = picture(shapes)
    heights = rays()[:, 1] * depths
    whole = sphere_depths(np.array([0.0, 0.0, -4.0]), 0.4)
    kept = np.isfinite(whole) & (rays()[:, 1] * np.where(np.isfinite(whole), whole, 0.0) > 0.1)
    assert np.array_equal(np.isfinite(depths), kept)
    assert (heights[kept] > 0.1).all()


def test_normals_of_a_sphere_point_from_its_centre() -> None:
    shapes = ShapeList(1)
    centre = np.array([0.1, 0.05, -5.0])
    shapes.add_sphere(0, centre[None], 0.02)  # a fingertip: float32 must be exact enough
    quadrics = to_camera(shapes, ORIGIN, LEVEL)
    hits = cast(quadrics, focal=1500.0, width=96, height=96)
    x = (hits.pixels % 96 + 0.5 - 48) / 1500.0
    y = (47.5 - hits.pixels // 96) / 1500.0
    points = np.stack([x * hits.depths, y * hits.depths, -hits.depths]).astype(np.float32)
    normals = surface_normals(quadrics, hits.quadrics, points)
    expected = (points.T - centre) / np.linalg.norm(points.T - centre, axis=-1, keepdims=True)
    cosine = (normals.T * expected).sum(-1)
    assert len(cosine) > 50
    assert np.degrees(np.arccos(cosine.min().clip(-1, 1))) < 0.2


def test_single_rays_give_the_values_of_the_picture() -> None:
    generator = np.random.default_rng(3)
    shapes = ShapeList(2)
    for _ in range(12):
        ends = generator.uniform([-0.5, -0.6, -4.5], [0.5, 0.6, -3.5], (2, 2, 3))
        shapes.add_cone(0, ends[0], ends[1], 0.05, 0.09)
        shapes.add_sphere(1, ends[0], 0.05)
    directions = np.broadcast_to(rays()[:, :2], (2, WIDTH * HEIGHT, 2))
    traced = depth_along(to_camera(shapes, ORIGIN, LEVEL), directions)
    for frame in (0, 1):
        assert_same_depths(picture(shapes, frame), traced[frame])


def test_moving_camera_and_world_together_changes_nothing() -> None:
    angle = 0.4
    rotation = np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])
    position = np.array([0.3, 1.2, 2.0])
    still, moved = ShapeList(1), ShapeList(1)
    a, b = np.array([[0.1, -0.1, -4.0]]), np.array([[-0.1, 0.2, -3.8]])
    still.add_cone(0, a, b, 0.1, 0.15)
    moved.add_cone(0, a @ rotation + position, b @ rotation + position, 0.1, 0.15)
    directions = np.random.default_rng(1).uniform(-0.06, 0.06, (1, 200, 2))
    expected = depth_along(to_camera(still, ORIGIN, LEVEL), directions)
    assert np.isfinite(expected).sum() > 50
    np.testing.assert_allclose(depth_along(to_camera(moved, position, rotation), directions), expected, rtol=1e-5)


def test_a_cone_whose_one_sphere_holds_the_other_is_refused() -> None:
    shapes = ShapeList(1)
    shapes.add_sphere(0, np.array([[0.0, 0.0, -4.0]]), 0.5)
    shapes.add_cone(0, np.array([[0.0, 0.0, -4.0]]), np.array([[0.0, 0.1, -4.0]]), 0.5, 0.1)
    with pytest.raises(ValueError, match="holds the other"):
        to_camera(shapes, ORIGIN, LEVEL)


def test_a_cone_without_a_side_is_nowhere_if_allowed_and_only_in_its_frames() -> None:
    """The hull of two spheres, one in the other, is the larger sphere, which the caller adds."""
    shapes = ShapeList(2)
    start, end = np.array([[0.0, 0.0, -4.0]] * 2), np.array([[0.0, 0.05, -4.0], [0.0, 0.5, -4.0]])
    shapes.add_cone(0, start, end, 0.3, 0.1)
    alone = ShapeList(1)
    alone.add_cone(0, start[1:], end[1:], 0.3, 0.1)
    hits = cast(to_camera(shapes, ORIGIN, LEVEL, sideless=True), focal=FOCAL, width=WIDTH, height=HEIGHT)
    expected = cast(to_camera(alone, ORIGIN, LEVEL), focal=FOCAL, width=WIDTH, height=HEIGHT)
    assert len(expected.pixels) > 50
    np.testing.assert_array_equal(hits.pixels - WIDTH * HEIGHT, expected.pixels)
    np.testing.assert_array_equal(hits.depths, expected.depths)


def test_a_shape_that_is_left_out_of_a_frame_is_not_seen_there() -> None:
    shapes = ShapeList(2)
    centre = np.array([[0.0, 0.0, -4.0]] * 2)
    shapes.add_sphere(0, centre, 0.3)
    shapes.add_sphere(1, centre + np.array([0.0, 0.0, 1.0]), 0.1)
    quadrics = leave_out(to_camera(shapes, ORIGIN, LEVEL), np.array([[False, True], [False, False]]))
    hits = cast(quadrics, focal=FOCAL, width=WIDTH, height=HEIGHT)
    seen = [set(quadrics.skins[hits.quadrics[hits.pixels // (WIDTH * HEIGHT) == frame] % 2]) for frame in (0, 1)]
    assert seen == [{0}, {0, 1}]
