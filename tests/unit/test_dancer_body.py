"""Appearance of dancers: people differ, clothes cover the right parts, shapes lie on the skeleton."""

import colorsys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dreamdance.dancers.body import (
    BOTTOM,
    HAIR,
    HEAD,
    PATTERNS,
    SHOES,
    SKIN,
    TOP,
    Identity,
    Material,
    build_body,
    draw_identity,
    limb_frame,
)
from dreamdance.dancers.motion import Skeleton, dance
from dreamdance.dancers.shading import surface_colours, tabulate_skins

TIMES = np.arange(4) / 8.0
COLOURS = {number: (number / 10, 0.5, 1 - number / 10) for number in (SKIN, HAIR, TOP, BOTTOM, SHOES)}


@pytest.fixture(scope="module")
def people() -> list[Identity]:
    return [draw_identity(np.random.default_rng(seed)) for seed in range(400)]


def plain_person(**changes: object) -> tuple[Identity, Skeleton]:
    """A person without skirt whose materials have distinct colours."""
    identity = draw_identity(np.random.default_rng(11))
    materials = tuple(Material("plain", COLOURS[number], COLOURS[number]) for number in sorted(COLOURS))
    identity = replace(identity, **{"materials": materials, "skirt": 0.0, "hair_style": "short", **changes})
    return identity, dance(np.random.default_rng(12), identity.body, TIMES)


def materials_along(identity: Identity, skeleton: Skeleton, start: np.ndarray, end: np.ndarray, part: int) -> list[int]:
    """The materials of the part with its origin at `start`, at 9 places from `start` to `end` in the first frame."""
    skins = build_body(identity, skeleton).skins
    table = tabulate_skins(skins, np.zeros(3), np.eye(3))
    found = [index for index, origin in enumerate(skins.origins) if np.array_equal(origin, start)][part]
    shares = np.linspace(0.05, 0.95, 9)[:, None]
    points = (start[0] + shares * (end[0] - start[0])).T.astype(np.float32)
    colours, _ = surface_colours(table, identity, np.full(9, found), points, 1e-3)
    return [round(10 * float(red)) for red in colours[0]]


def test_every_hair_style_pattern_and_garment_occurs_and_none_dominates(people: list[Identity]) -> None:
    hair = Counter(person.hair_style for person in people)
    patterns = Counter(person.materials[TOP].pattern for person in people)
    assert set(hair) == {"short", "bob", "long", "ponytail", "bun", "cap"}
    assert set(patterns) == set(PATTERNS)
    for counted in (hair, patterns, Counter(person.materials[SKIN].colour for person in people)):
        assert min(counted.values()) > 0.07 * len(people)
        assert max(counted.values()) < 0.4 * len(people)
    skirts = np.mean([person.skirt > 0 for person in people])
    assert 0.12 < skirts < 0.32
    for garment in ("sleeves", "trousers"):
        assert len({getattr(person, garment) for person in people}) >= 4


def test_a_person_repeats_with_their_seed_and_no_two_are_alike(people: list[Identity]) -> None:
    assert draw_identity(np.random.default_rng(5)) == people[5]
    assert len({(person.body, person.materials) for person in people}) == len(people)


def test_colours_can_be_shown_and_the_second_one_of_a_pattern_can_be_seen(people: list[Identity]) -> None:
    for person in people:
        for material in person.materials:
            assert all(0.0 <= value <= 1.0 for value in (*material.colour, *material.second))
            assert 0.0 <= material.gloss < 0.5
            if material.pattern == "plain":
                continue
            first, second = (colorsys.rgb_to_hls(*colour)[1] for colour in (material.colour, material.second))
            assert abs(first - second) > 0.3
            assert 8.0 <= material.repeats <= 17.0  # bands of 3 to 6 centimetres stay visible in small pictures


def test_dancers_in_a_skirt_wear_short_trousers_beneath_and_a_tucked_in_top(people: list[Identity]) -> None:
    for person in people:
        if person.skirt:
            assert 0.45 <= person.skirt <= 0.95
            assert (person.trousers, person.hem) == (0.3, 0.0)
        else:
            assert person.trousers >= 0.4


def test_short_sleeves_show_the_arm_below_their_cut_and_long_ones_cover_it() -> None:
    for side in (0, 1):
        identity, skeleton = plain_person(sleeves=0.45)
        shoulder, elbow, wrist = skeleton.shoulders[side], skeleton.elbows[side], skeleton.wrists[side]
        assert materials_along(identity, skeleton, shoulder, elbow, 0) == [TOP] * 4 + [SKIN] * 5
        assert materials_along(identity, skeleton, elbow, wrist, 0) == [SKIN] * 9
        identity = replace(identity, sleeves=2.0)
        assert materials_along(identity, skeleton, shoulder, elbow, 0) == [TOP] * 9
        assert materials_along(identity, skeleton, elbow, wrist, 0) == [TOP] * 9


@pytest.mark.parametrize(
    ("trousers", "thigh", "shin"),
    [
        (0.4, [BOTTOM] * 4 + [SKIN] * 5, [SKIN] * 9),
        (1.5, [BOTTOM] * 9, [BOTTOM] * 4 + [SKIN] * 5),
        (2.0, [BOTTOM] * 9, [BOTTOM] * 9),
    ],
)
def test_trousers_end_where_they_should(trousers: float, thigh: list[int], shin: list[int]) -> None:
    identity, skeleton = plain_person(trousers=trousers)
    for hip, knee, ankle in zip(skeleton.hips, skeleton.knees, skeleton.ankles, strict=True):
        assert materials_along(identity, skeleton, hip, knee, 0) == thigh
        # Half a shin: the middle sample lies on the cut itself, to rounding.
        found = materials_along(identity, skeleton, knee, ankle, 0)
        assert found[:4] + found[5:] == shin[:4] + shin[5:]


def test_the_top_begins_above_its_hem() -> None:
    identity, skeleton = plain_person(hem=0.2)
    found = materials_along(identity, skeleton, skeleton.pelvis, skeleton.waist, 0)
    assert found == [BOTTOM] * 5 + [TOP] * 4  # the waist is 0.36 of the spine above the pelvis
    assert materials_along(replace(identity, hem=0.0), skeleton, skeleton.pelvis, skeleton.waist, 0) == [TOP] * 9


def test_hands_head_and_neck_are_bare_hair_is_hair_and_a_cap_is_of_cloth() -> None:
    identity, skeleton = plain_person()
    skins = build_body(identity, skeleton).skins
    assert skins.below[HEAD] == SKIN
    hands = [index for index, frame in enumerate(skins.frames) if any(frame is hand for hand in skeleton.hand_frames)]
    assert [skins.below[index] for index in hands] == [SKIN, SKIN]
    assert HAIR in skins.below
    capped = build_body(replace(identity, hair_style="cap"), skeleton).skins
    assert HAIR not in capped.below
    assert len(capped.below) == len(skins.below)


def test_only_a_skirt_adds_a_shape_that_is_wider_than_the_hips_and_ends_above_the_feet() -> None:
    identity, skeleton = plain_person()
    without = build_body(identity, skeleton)
    body = build_body(replace(identity, skirt=0.8), skeleton)
    shapes = body.shapes
    assert len(shapes.starts) == len(without.shapes.starts) + 1
    assert len(shapes.centres) == len(without.shapes.centres)  # it is open at both ends
    assert body.skins.below[shapes.cone_skins[-1]] == BOTTOM
    assert shapes.end_radii[-1] > shapes.start_radii[-1] > identity.body.hip_width
    lowest = min(ankle[:, 1].min() for ankle in skeleton.ankles)
    assert (shapes.ends[-1][:, 1] > lowest + 0.15).all()
    span = np.linalg.norm(shapes.ends[-1] - shapes.starts[-1], axis=-1)
    assert (span > shapes.end_radii[-1] - shapes.start_radii[-1]).all(), "one end must not contain the other"


def test_no_cone_has_one_end_inside_the_other(people: list[Identity]) -> None:
    """Ray casting refuses such a cone, so no identity and no dance may produce one."""
    for seed, identity in enumerate(people[:60]):
        shapes = build_body(identity, dance(np.random.default_rng(seed), identity.body, TIMES)).shapes
        linear = np.linalg.inv(np.stack(shapes.stretches, axis=1))
        spans = np.stack(shapes.ends, axis=1) - np.stack(shapes.starts, axis=1)
        spans = np.linalg.norm(np.einsum("fkij,fkj->fki", linear, spans), axis=-1)
        steps = np.abs(np.array(shapes.end_radii) - np.array(shapes.start_radii))
        assert (spans > steps).all(), seed


def test_left_and_right_are_built_alike_and_every_shape_has_a_skin() -> None:
    identity, skeleton = plain_person()
    body = build_body(identity, skeleton)
    shapes, skins = body.shapes, body.skins
    used = set(shapes.cone_skins) | set(shapes.ellipsoid_skins)
    assert used == set(range(len(skins.cuts)))
    for pair in (skeleton.shoulders, skeleton.elbows, skeleton.hips, skeleton.knees, skeleton.ankles):
        radii = []
        for joint in pair:
            radii.append(
                sorted(
                    (start_radius, end_radius)
                    for start, start_radius, end_radius in zip(
                        shapes.starts, shapes.start_radii, shapes.end_radii, strict=True
                    )
                    if np.array_equal(start, joint)
                )
            )
        assert radii[0] == radii[1]
        assert radii[0]


@pytest.mark.parametrize(("style", "extra"), [("long", 1), ("bob", 1), ("ponytail", 1), ("bun", 0)])
def test_hair_hangs_or_sits_where_its_style_says(style: str, extra: int) -> None:
    identity, skeleton = plain_person()
    short, styled = (build_body(replace(identity, hair_style=kind), skeleton) for kind in ("short", style))
    assert len(styled.shapes.starts) == len(short.shapes.starts) + extra
    numbers = [index for index, material in enumerate(styled.skins.below) if material == HAIR]
    hair = [
        centre - skeleton.head
        for centre, skin in zip(styled.shapes.centres, styled.shapes.ellipsoid_skins, strict=True)
        if skin in numbers
    ]
    local = np.stack([np.einsum("fji,fj->fi", skeleton.head_frame, part) for part in hair])
    assert (local[1:, :, 2] < 0).all()  # behind the face
    lowest = {"long": (-0.25, -0.18), "bob": (-0.13, -0.08), "ponytail": (-0.19, -0.12), "bun": (0.0, 0.13)}[style]
    assert lowest[0] < local[..., 1].min() / identity.body.head < lowest[1]


def test_a_limb_frame_runs_along_the_limb_and_looks_ahead() -> None:
    generator = np.random.default_rng(0)
    start, end, ahead = generator.normal(size=(3, 50, 3))
    frames = limb_frame(start, end, ahead)
    along = (end - start) / np.linalg.norm(end - start, axis=-1, keepdims=True)
    np.testing.assert_allclose(frames[:, :, 1], along, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(frames), 1.0, rtol=1e-12)
    products = np.swapaxes(frames, -1, -2) @ frames
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), rtol=0, atol=1e-12)
    assert ((frames[:, :, 2] * ahead).sum(-1) > 0).all()
    np.testing.assert_allclose((frames[:, :, 0] * ahead).sum(-1), 0.0, rtol=0, atol=1e-12)
