"""Colours of dancers: patterns averaged over a pixel, a painted face, light that shows the shape."""

from dataclasses import replace

import numpy as np
import pytest

from dreamdance.dancers.body import HAIR, HEAD, PATTERNS, SKIN, Identity, Pattern, Skins, draw_identity
from dreamdance.dancers.shading import Light, pattern_share, shade, surface_colours, tabulate_skins

SHARES = {"plain": 0.0, "rings": 0.5, "stripes": 0.5, "checks": 0.5, "gingham": 0.5, "dots": np.pi * 0.3**2}
SHARP = 1e-6


def grid(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spread coordinates over two repeats in both directions."""
    steps = (np.arange(count) + 0.5) / count * 2
    u, v = np.meshgrid(steps, steps)
    return u.ravel(), v.ravel()


def share(pattern: Pattern, u: np.ndarray, v: np.ndarray, width: float) -> np.ndarray:
    return pattern_share(pattern, u, v, np.full_like(u, width), np.full_like(u, width))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_shows_its_share_of_the_second_colour_whatever_the_pixels_size(pattern: Pattern) -> None:
    u, v = grid()
    # The round edge of a dot is softened, not averaged: its share is exact only for pixels much smaller than the dot.
    for width in (SHARP, 0.05) if pattern == "dots" else (SHARP, 0.05, 0.4):
        values = share(pattern, u, v, width)
        assert values.min() >= 0
        assert values.max() <= 1
        assert values.mean() == pytest.approx(SHARES[pattern], abs=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_repeat_and_shift_according_to_their_names(pattern: Pattern) -> None:
    u, v = grid(50)
    here = share(pattern, u, v, SHARP)
    np.testing.assert_allclose(share(pattern, u + 1, v, SHARP), here, rtol=0, atol=1e-6)
    np.testing.assert_allclose(share(pattern, u, v + 2, SHARP), here, rtol=0, atol=1e-6)
    if pattern == "stripes":
        assert np.array_equal(share(pattern, u, v + 0.37, SHARP), here)
    if pattern == "rings":
        assert np.array_equal(share(pattern, u + 0.37, v, SHARP), here)
    if pattern in ("stripes", "checks"):
        np.testing.assert_allclose(share(pattern, u + 0.5, v, SHARP), 1 - here, rtol=0, atol=1e-6)
    if pattern == "dots":  # every other row is shifted by half a repeat
        np.testing.assert_allclose(share(pattern, u + 0.5, v + 1, SHARP), here, rtol=0, atol=1e-6)
        assert not np.array_equal(share(pattern, u, v + 1, SHARP), here)
    if pattern == "gingham":
        assert set(here.round(6)) == {0.0, 0.5, 1.0}


def test_a_pixel_shows_the_mean_of_the_stripes_within_it() -> None:
    centres = np.linspace(0.0, 2.0, 101)
    for width in (0.05, 0.2, 0.5):
        inside = np.linspace(-0.5, 0.5, 4001) * width
        u = centres[:, None] + inside
        expected = share("stripes", u.ravel(), np.zeros(u.size), SHARP).reshape(u.shape).mean(axis=1)
        found = share("stripes", centres, np.zeros_like(centres), width)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_patterns_smaller_than_a_pixel_fade_instead_of_flickering() -> None:
    u, v = grid(50)
    for pattern in ("rings", "stripes", "checks", "gingham"):
        for width, ripple in ((2.0, 0.13), (20.0, 0.013)):
            assert np.abs(share(pattern, u, v, width) - 0.5).max() <= ripple


@pytest.fixture
def person() -> Identity:
    return draw_identity(np.random.default_rng(1))


def paint(person: Identity, x: np.ndarray, y: np.ndarray, *, pixel: float = 1e-4, z: float = 0.1) -> np.ndarray:
    """Colours `(3, n)` of a head of factor 1 before the camera, one metre away, at x and y of its own frame."""
    skins = Skins()
    skins.add(np.array([[0.0, 0.0, -1.0 - z]]), np.eye(3)[None], 0.08, SKIN)
    table = tabulate_skins(skins, np.zeros(3), np.eye(3))
    points = np.stack([x, y, np.full_like(x, -1.0)]).astype(np.float32)
    sized = replace(person, body=replace(person.body, head=1.0))
    colours, _ = surface_colours(table, sized, np.full(len(x), HEAD), points, pixel)
    return colours


def test_a_face_is_symmetric_with_dark_pupils_in_white_eyes_and_a_mouth(person: Identity) -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(0, 0.06, 31), np.linspace(-0.1, 0.05, 61)))
    np.testing.assert_allclose(paint(person, x, y), paint(person, -x, y), rtol=0, atol=1e-6)

    def at(x: float, y: float) -> np.ndarray:
        return paint(person, np.array([x]), np.array([y]))[:, 0]

    skin = np.array(person.materials[SKIN].colour)
    np.testing.assert_allclose(at(0.0, 0.045), skin, rtol=1e-6)  # the forehead
    assert at(0.0315, 0.0045).max() < 0.12  # a pupil
    assert at(0.0425, 0.004).min() > 0.9  # the white beside it
    np.testing.assert_allclose(at(0.032, 0.0285), 0.7 * np.array(person.materials[HAIR].colour), atol=1e-6)  # a brow
    upper_lip, cheek = at(0.0, -0.065), at(0.042, -0.032)
    assert upper_lip[0] - upper_lip[1] > skin[0] - skin[1] - 0.05
    assert (cheek[1:] < skin[1:]).all()
    assert cheek[0] == pytest.approx(skin[0], rel=1e-5)


def test_the_back_of_a_head_has_no_face(person: Identity) -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(-0.06, 0.06, 31), np.linspace(-0.1, 0.05, 31)))
    behind = paint(person, x, y, z=-0.1)
    np.testing.assert_allclose(behind, np.broadcast_to(np.array(person.materials[SKIN].colour)[:, None], behind.shape),
                               rtol=1e-6)  # fmt: skip


def test_a_distant_face_keeps_its_mean_colour_as_its_features_blur(person: Identity) -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(-0.055, 0.055, 111), np.linspace(-0.095, 0.05, 146)))
    near, far = (paint(person, x, y, pixel=pixel) for pixel in (1e-4, 4e-3))
    np.testing.assert_allclose(far.mean(axis=1), near.mean(axis=1), rtol=0, atol=0.02)
    assert far.std(axis=1).max() < near.std(axis=1).max()


def test_skins_move_with_the_camera_and_keep_their_frames() -> None:
    generator = np.random.default_rng(0)
    angle = 0.5
    rotation = np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])
    position = generator.normal(size=3)
    skins = Skins()
    for number in range(3):
        skins.add(generator.normal(size=(2, 3)), np.eye(3)[None].repeat(2, axis=0), 0.1 * (number + 1), number, 4, 0.2)
    assert (skins.below, skins.above) == ([0, 1, 2], [4, 4, 4])
    assert skins.add(np.zeros((2, 3)), np.eye(3)[None].repeat(2, axis=0), 1.0, 3) == 3
    assert skins.above[3] == 3  # without a second material the whole part has one
    table = tabulate_skins(skins, position, rotation)
    assert table.num_parts == 4
    rows = table.values.T.reshape(2, 4, 12)
    for part in range(4):
        expected = (skins.origins[part] - position) @ rotation.T
        np.testing.assert_allclose(rows[:, part, 9:], expected, rtol=1e-6)
        np.testing.assert_allclose(
            rows[:, part, :9].reshape(2, 3, 3), np.broadcast_to(rotation.T, (2, 3, 3)), atol=1e-7
        )


LIGHT = Light(
    direction=np.array([0.6, 0.8, 0.0]),
    up=np.array([0.0, 1.0, 0.0]),
    lamp=np.array([0.7, 0.7, 0.7]),
    ambient=np.array([0.4, 0.4, 0.4]),
)


def lit(normals: np.ndarray, *, colour: float = 0.5, gloss: float = 0.0, light: Light = LIGHT) -> np.ndarray:
    """Brightness `(n,)` of points three metres straight ahead, with normals `(n, 3)`."""
    count = len(normals)
    points = np.tile(np.array([[0.0], [0.0], [-3.0]], dtype=np.float32), count)
    colours = np.full((3, count), colour, dtype=np.float32)
    return shade(colours, np.full(count, gloss, dtype=np.float32), normals.T.astype(np.float32), points, light)[0]


def turned(degrees: np.ndarray) -> np.ndarray:
    """Normals `(n, 3)` that turn from the camera towards the lamp's side."""
    angles = np.radians(degrees)
    return np.stack([np.sin(angles), np.zeros_like(angles), np.cos(angles)], axis=-1)


def test_surfaces_facing_the_lamp_are_brightest_and_those_facing_away_have_ambient_light_alone() -> None:
    generator = np.random.default_rng(0)
    normals = generator.normal(size=(500, 3))
    normals[:, 2] = np.abs(normals[:, 2])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    facing = normals @ LIGHT.direction
    dark = replace(LIGHT, lamp=np.zeros(3))
    away = facing < -0.2
    rimless = normals[:, 2] > 0.8
    np.testing.assert_allclose(
        lit(normals[away & rimless]), lit(normals[away & rimless], light=dark), rtol=0, atol=0.16 * 0.2**3
    )
    assert (lit(normals) >= lit(normals, light=dark)).all()
    steps = lit(turned(np.arange(-10.0, 45.0, 5.0)))
    assert (np.diff(steps) > 0).all()


def test_light_from_above_is_brighter_than_light_from_the_floor() -> None:
    dark = replace(LIGHT, lamp=np.zeros(3))
    up, down = lit(np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]), light=dark)
    assert up == pytest.approx(0.5 * 0.4)
    assert down == pytest.approx(0.24 * up)


def test_light_scales_colours_and_adds_up_over_lamps() -> None:
    normals = turned(np.linspace(-60, 60, 25))
    dark, only_lamp = replace(LIGHT, lamp=np.zeros(3)), replace(LIGHT, ambient=np.zeros(3))
    np.testing.assert_allclose(lit(normals), lit(normals, light=dark) + lit(normals, light=only_lamp), rtol=1e-5)
    black = lit(normals, colour=0.0)
    np.testing.assert_allclose(lit(normals, colour=0.8) - black, 2 * (lit(normals, colour=0.4) - black), rtol=1e-5)


def test_shine_is_where_the_surface_mirrors_the_lamp() -> None:
    degrees = np.arange(-80.0, 81.0, 1.0)
    light = replace(LIGHT, direction=np.array([np.sin(np.radians(60)), 0.0, np.cos(np.radians(60))]))
    shine = lit(turned(degrees), gloss=0.4, light=light) - lit(turned(degrees), gloss=0.0, light=light)
    assert degrees[shine.argmax()] == 30.0  # half way between the lamp at 60 degrees and the eye
    assert shine.max() == pytest.approx(0.4 * 0.7, rel=1e-3)
    assert shine[degrees < -30].max() < 0.02


def test_outlines_have_a_bright_rim_and_the_middle_has_none() -> None:
    middle, rim = lit(turned(np.array([0.0, 89.9])), colour=0.0)
    assert middle == pytest.approx(0.0, abs=1e-6)
    assert rim == pytest.approx(0.16 * 0.62 * 0.7, rel=0.01)
