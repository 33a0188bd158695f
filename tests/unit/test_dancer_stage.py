"""The stage: exact planes that no dancer touches, a camera that shows the whole dance, shadows away from the lamp."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dreamdance.dancers.motion import Skeleton, dance, draw_proportions
from dreamdance.dancers.stage import (
    Camera,
    Stage,
    aim_camera,
    build_backdrop,
    camera_light,
    cast_shadows,
    draw_stage,
    fit_focal,
    pixel_directions,
    see_planes,
)

TIMES = np.arange(6) / 8.0
WIDTH, HEIGHT = 60, 90


def dancer(seed: int) -> tuple[Skeleton, np.ndarray]:
    """A skeleton and all of its joints `(n, 3)`."""
    generator = np.random.default_rng(seed)
    skeleton = dance(generator, draw_proportions(generator), TIMES)
    joints = [skeleton.pelvis, skeleton.neck, skeleton.head, *skeleton.wrists, *skeleton.elbows, *skeleton.ankles]
    return skeleton, np.concatenate(joints)


def scene(seed: int) -> tuple[Skeleton, Stage, Camera, float]:
    skeleton, points = dancer(seed)
    stage = draw_stage(np.random.default_rng(seed), points)
    camera = aim_camera(stage.eye, points)
    seen = camera.to_camera(points)
    directions = seen[:, :2] / -seen[:, 2:]
    bounds = np.stack([directions.min(axis=0), directions.max(axis=0)], axis=1).reshape(-1)
    return skeleton, stage, camera, fit_focal(bounds, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def stages() -> list[tuple[np.ndarray, Stage]]:
    found = []
    for seed in range(60):
        _, points = dancer(seed)
        found.append((points, draw_stage(np.random.default_rng(seed), points)))
    return found


def test_the_floor_is_level_and_walls_stand_upright_facing_the_room(stages: list[tuple[np.ndarray, Stage]]) -> None:
    second_walls = 0
    for _, stage in stages:
        floor, *walls = stage.planes
        assert floor.offset == 0.0
        assert np.array_equal(floor.normal, [0.0, 1.0, 0.0])
        assert floor.skirting is None
        for plane in stage.planes:
            axes = np.stack([plane.across, plane.along, plane.normal])
            np.testing.assert_allclose(axes @ axes.T, np.eye(3), rtol=0, atol=1e-12)
        for wall in walls:
            assert wall.normal[1] == 0.0
            assert wall.skirting is not None
        assert walls[0].normal[2] > 0.8
        if len(walls) == 2:
            second_walls += 1
            assert abs(walls[0].normal @ walls[1].normal) < 1e-12  # a corner of a room
    assert 6 < second_walls < 30


def test_the_dancer_never_touches_a_wall(stages: list[tuple[np.ndarray, Stage]]) -> None:
    nearest = []
    for points, stage in stages:
        for wall in stage.planes[1:]:
            nearest.append((points @ wall.normal - wall.offset).min())
    assert min(nearest) >= 0.2 - 1e-12
    crowded = np.array([[0.0, 1.0, -5.0], [0.0, 1.0, 4.0]])  # a dancer who leaps further than the distance of any wall
    for seed in range(10):
        for wall in draw_stage(np.random.default_rng(seed), crowded).planes[1:]:
            assert (crowded @ wall.normal - wall.offset).min() >= 0.2 - 1e-12


def test_the_lamp_hangs_above_and_before_the_dancer_never_straight_ahead(
    stages: list[tuple[np.ndarray, Stage]],
) -> None:
    sides = set()
    for _, stage in stages:
        np.testing.assert_allclose(np.linalg.norm(stage.to_lamp), 1.0, rtol=1e-12)
        assert stage.to_lamp[1] > np.sin(0.6) - 1e-12
        assert stage.to_lamp[2] > 0
        assert abs(stage.to_lamp[0]) > 0.1  # light from the side makes shapes visible
        sides.add(np.sign(stage.to_lamp[0]))
        assert (stage.lamp > 0).all()
        assert (stage.ambient > 0).all()
        # White cloth that faces the lamp may be only a little brighter than white.
        assert (stage.lamp + stage.ambient < 1.25).all()
    assert sides == {-1.0, 1.0}


def test_plane_colours_are_distinct_and_can_be_shown(stages: list[tuple[np.ndarray, Stage]]) -> None:
    for _, stage in stages:
        for plane in stage.planes:
            colours = np.stack([plane.colour, plane.second])
            assert (colours >= 0).all()
            assert (colours <= 1).all()
            lightness = 0.5 * (colours.min(axis=1) + colours.max(axis=1))
            assert abs(lightness[1] - lightness[0]) == pytest.approx(0.13 if plane.skirting is not None else 0.12)


def test_the_camera_stands_level_and_looks_at_the_middle_of_the_dance() -> None:
    for seed in range(20):
        _, points = dancer(seed)
        eye = draw_stage(np.random.default_rng(seed), points).eye
        camera = aim_camera(eye, points)
        np.testing.assert_allclose(camera.rotation @ camera.rotation.T, np.eye(3), rtol=0, atol=1e-12)
        assert np.linalg.det(camera.rotation) == pytest.approx(1.0)
        assert camera.rotation[0, 1] == pytest.approx(0.0, abs=1e-12)  # the horizon is level
        assert np.array_equal(camera.to_camera(eye), np.zeros(3))
        seen = camera.to_camera(points)
        assert (seen[:, 2] < -1.0).all()
        directions = seen[:, :2] / -seen[:, 2:]
        middle = 0.5 * (directions.min(axis=0) + directions.max(axis=0))
        assert np.abs(middle).max() < 0.01 * np.ptp(directions, axis=0).max()


def test_the_focal_length_lets_the_dance_take_94_percent_of_the_tighter_side() -> None:
    bounds = np.array([[[-0.1, 0.25, -0.2, 0.3]], [[-0.2, 0.1, -0.35, 0.1]]])
    wide, tall = fit_focal(bounds, 1000, 100), fit_focal(bounds, 100, 1000)
    assert wide * 0.35 == pytest.approx(0.94 * 50)
    assert tall * 0.25 == pytest.approx(0.94 * 50)


def test_rays_pass_through_pixel_centres_and_double_size_splits_them_evenly() -> None:
    rays = pixel_directions(50.0, 8, 6)
    assert rays.shape == (6, 8, 3)
    assert (rays[..., 2] == -1).all()
    columns, rows = 50.0 * rays[..., 0] + 4, 3 - 50.0 * rays[..., 1]
    np.testing.assert_allclose(columns, np.broadcast_to(np.arange(8) + 0.5, (6, 8)), rtol=1e-12)
    np.testing.assert_allclose(rows, np.broadcast_to((np.arange(6) + 0.5)[:, None], (6, 8)), rtol=1e-12)
    fine = pixel_directions(100.0, 16, 12).reshape(6, 2, 8, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(fine, rays, rtol=1e-12)


def test_a_light_turns_with_the_camera() -> None:
    _, stage, camera, _ = scene(1)
    light = camera_light(stage, camera)
    np.testing.assert_allclose(camera.rotation.T @ light.direction, stage.to_lamp, rtol=0, atol=1e-12)
    np.testing.assert_allclose(camera.rotation.T @ light.up, [0.0, 1.0, 0.0], rtol=0, atol=1e-12)


def test_each_ray_ends_on_the_nearest_plane_in_front_of_the_camera() -> None:
    for seed in range(12):
        _, stage, camera, focal = scene(seed)
        rays = pixel_directions(focal, WIDTH, HEIGHT)
        depths, which = see_planes(stage, camera, rays)
        assert np.isfinite(depths).all()  # no hole beside or above the walls
        points = (rays * depths[..., None]) @ camera.rotation + camera.position
        for number, plane in enumerate(stage.planes):
            height = points @ plane.normal - plane.offset
            np.testing.assert_allclose(height[which == number], 0.0, rtol=0, atol=1e-9)
            assert (height > -1e-9).all()  # nothing lies behind a plane


def test_a_plane_behind_the_camera_is_not_seen() -> None:
    _, stage, camera, focal = scene(2)
    turned = replace(camera, rotation=camera.rotation * np.array([[-1.0], [1.0], [-1.0]]))
    walls_only = replace(stage, planes=stage.planes[1:2])
    depths, _ = see_planes(walls_only, turned, pixel_directions(focal, WIDTH, HEIGHT))
    assert np.isinf(depths).all()


def test_the_empty_stage_has_the_planes_own_depths_and_normals() -> None:
    _, stage, camera, focal = scene(3)
    backdrop = build_backdrop(stage, camera, focal=focal, width=WIDTH, height=HEIGHT, samples=2)
    depths, which = see_planes(stage, camera, pixel_directions(focal, WIDTH, HEIGHT))
    np.testing.assert_allclose(backdrop.depths, depths, rtol=1e-6)
    for number, plane in enumerate(stage.planes):
        normals = backdrop.normals[which == number]
        expected = np.broadcast_to(camera.rotation @ plane.normal, normals.shape)
        np.testing.assert_allclose(normals, expected, rtol=0, atol=1e-6)
    assert backdrop.colours.shape == (HEIGHT, WIDTH, 3)
    assert backdrop.colours.min() >= 0
    assert 0.05 < backdrop.colours.mean() < 1.0


def test_more_samples_change_edges_of_patterns_only() -> None:
    _, stage, camera, focal = scene(3)
    stage = replace(stage, planes=tuple(replace(plane, pattern="plain", skirting=None) for plane in stage.planes))
    coarse, fine = (
        build_backdrop(stage, camera, focal=focal, width=WIDTH, height=HEIGHT, samples=samples) for samples in (1, 3)
    )
    _, which = see_planes(stage, camera, pixel_directions(focal, WIDTH, HEIGHT))
    inner = np.ones_like(which, dtype=bool)
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(which, step, axis) == which
    assert inner.mean() > 0.8
    np.testing.assert_allclose(coarse.colours[inner], fine.colours[inner], rtol=2e-3)
    assert np.array_equal(coarse.depths, fine.depths)
    assert np.array_equal(coarse.normals, fine.normals)


def shifted(skeleton: Skeleton, by: np.ndarray) -> Skeleton:
    """The same dancer at another place."""
    moved = {}
    for entry in fields(skeleton):
        value = getattr(skeleton, entry.name)
        if isinstance(value, tuple):
            moved[entry.name] = tuple(part + by if part.shape[-2:] == (len(TIMES), 3) else part for part in value)
        else:
            moved[entry.name] = value + by if value.ndim == 2 else value
    return replace(skeleton, **moved)


def world_points(camera: Camera, focal: float, depths: np.ndarray) -> np.ndarray:
    rays = pixel_directions(focal, WIDTH, HEIGHT) * depths[..., None]
    return rays @ camera.rotation + camera.position


@pytest.mark.parametrize("seed", [0, 4, 7])
def test_points_behind_the_body_from_the_lamp_are_dark_and_the_rest_is_lit(seed: int) -> None:
    skeleton, stage, camera, focal = scene(seed)
    backdrop = build_backdrop(stage, camera, focal=focal, width=WIDTH, height=HEIGHT, samples=1)
    shadows = cast_shadows(stage, skeleton, 1.0, backdrop)
    assert shadows.shape == (len(TIMES), HEIGHT, WIDTH)
    assert shadows.min() >= 0
    assert shadows.max() <= 1 + 1e-6
    points = world_points(camera, focal, backdrop.depths.astype(np.float64))
    trunk = np.linspace(skeleton.pelvis, skeleton.neck, 9)  # (9, f, 3)
    joints = np.stack([skeleton.pelvis, skeleton.neck, skeleton.head, *skeleton.knees, *skeleton.wrists])
    for frame in range(len(TIMES)):

        def distance(to: np.ndarray) -> np.ndarray:
            """Distance of each pixel's line of light from the nearest of some points `(n, 3)`: `(H, W)`, metres."""
            offsets = to[:, None, None] - points
            along = offsets @ stage.to_lamp
            return np.linalg.norm(offsets - along[..., None] * stage.to_lamp, axis=-1).min(axis=0)

        behind = distance(trunk[:, frame]) < 0.04
        if behind.any():
            assert shadows[frame][behind].min() > 0.7
        assert shadows[frame][distance(joints[:, frame]) > 0.8].max(initial=0.0) < 0.01


def test_shadows_move_with_the_dancer_and_fall_away_from_the_lamp() -> None:
    skeleton, stage, _, _ = scene(5)
    stage = replace(stage, planes=stage.planes[:1])
    from_above, focal = aim_camera(np.array([0.0, 6.0, 6.0]), np.array([[0.0, 0.5, -0.5]])), 90.0  # shows only floor
    backdrop = build_backdrop(stage, from_above, focal=focal, width=WIDTH, height=HEIGHT, samples=1)
    points = world_points(from_above, focal, backdrop.depths.astype(np.float64))

    def middle(of: Skeleton) -> np.ndarray:
        shadow = cast_shadows(stage, of, 1.0, backdrop)[0]
        return (points * shadow[..., None]).sum(axis=(0, 1)) / shadow.sum()

    first, second = middle(skeleton), middle(shifted(skeleton, np.array([0.4, 0.0, 0.0])))
    assert second[0] - first[0] == pytest.approx(0.4, abs=0.06)
    fallen = first - skeleton.pelvis[0]
    assert fallen[[0, 2]] @ stage.to_lamp[[0, 2]] < -0.2


def test_stout_dancers_cast_wider_shadows() -> None:
    skeleton, stage, camera, focal = scene(5)
    backdrop = build_backdrop(stage, camera, focal=focal, width=WIDTH, height=HEIGHT, samples=1)
    slim, stout = (cast_shadows(stage, skeleton, girth, backdrop).sum() for girth in (0.8, 1.4))
    assert stout > 1.15 * slim
