"""Key points in space: on the surface of the face, at the joints of the fingers, mirrored in the right order."""

from dataclasses import replace

import numpy as np
import pytest

from dreamdance.dancers.body import build_body, draw_identity
from dreamdance.dancers.landmarks import (
    CHIN,
    CHIN_RADIUS,
    FINGER_ROOTS,
    HEAD_STRETCH,
    NOSE,
    NOSE_RADII,
    SKULL,
    SKULL_RADIUS,
    find_foot,
    find_landmarks,
    foot_points,
    hand_points,
)
from dreamdance.dancers.motion import Proportions, Skeleton, dance, draw_proportions
from dreamdance.media.keypoints import BODY_NAMES, FACE, LEFT_HAND, MIRROR, RIGHT_HAND

TIMES = np.arange(12) / 8.0
BRIDGE, NOSTRILS = range(27, 31), range(31, 36)


def draw(seed: int) -> tuple[Proportions, Skeleton]:
    generator = np.random.default_rng(seed)
    body = draw_proportions(generator)
    return body, dance(generator, body, TIMES)


def on_head(points: np.ndarray, skeleton: Skeleton, body: Proportions) -> np.ndarray:
    """Points `(f, n, 3)` in the head's own frame and measures."""
    return np.einsum("fji,fnj->fni", skeleton.head_frame, points - skeleton.head[:, None]) / body.head


def distance_to_cone(
    points: np.ndarray, start: np.ndarray, end: np.ndarray, radii: tuple[float, float], *, stretch: np.ndarray
) -> np.ndarray:
    """Signed distance `(n,)`, before the stretch, to the hull of two spheres: that of the nearest of many between."""
    shares = np.linspace(0.0, 1.0, 4001)[:, None]
    centres, sizes = start + (end - start) * shares, radii[0] + (radii[1] - radii[0]) * shares
    return (np.linalg.norm((points / stretch)[:, None] - centres, axis=-1) - sizes[:, 0]).min(axis=1)


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """The 68 points `(68, 3)` in the head's own frame and measures."""
    body, skeleton = draw(0)
    return on_head(find_landmarks(skeleton, body).points[:, FACE], skeleton, body)[0]


def test_points_of_the_face_lie_on_the_heads_surface(face: np.ndarray) -> None:
    skin = [index for index in range(68) if index not in (*BRIDGE, *NOSTRILS)]
    depths = distance_to_cone(face[skin], SKULL, CHIN, (SKULL_RADIUS, CHIN_RADIUS), stretch=HEAD_STRETCH)
    assert np.abs(depths[17:]).max() < 2e-4  # brows, eyes and mouth: a fifth of a millimetre
    assert np.abs(depths[:17]).max() < 6e-3  # the jaw is an outline: its points may lie just beside the surface
    assert (face[skin, 2] > -0.03).all()


def test_points_of_the_nose_lie_on_the_nose(face: np.ndarray) -> None:
    bridge = distance_to_cone(face[list(BRIDGE)], *NOSE, NOSE_RADII, stretch=np.ones(3))
    assert np.abs(bridge).max() < 1.5e-3
    assert (np.diff(face[list(BRIDGE), 1]) < 0).all()  # from between the eyes down to the tip
    assert face[:, 2].argmax() in (30, 33)
    nostrils = distance_to_cone(face[list(NOSTRILS)], *NOSE, NOSE_RADII, stretch=np.ones(3))
    assert np.abs(nostrils).max() < 6e-3


def test_the_face_is_its_own_mirror_image_in_the_order_of_flipped_points(face: np.ndarray) -> None:
    mirrored = face[MIRROR[FACE] - FACE.start] * (-1.0, 1.0, 1.0)
    np.testing.assert_allclose(mirrored, face, rtol=0, atol=1e-12)


def test_parts_of_a_face_are_in_their_places(face: np.ndarray) -> None:
    jaw, brows, eyes, mouth = face[:17], face[17:27], face[36:48], face[48:]
    assert brows[:, 1].min() > eyes[:, 1].max() > face[30, 1] > mouth[:, 1].max() > jaw[8, 1]
    assert jaw[0, 0] < 0 < jaw[16, 0]  # iBUG begins at the person's own right
    assert jaw[:, 1].argmin() == 8
    assert (np.diff(jaw[:, 0]) > 0).all()
    assert (eyes[:6, 0] < 0).all()
    assert (eyes[6:, 0] > 0).all()


def test_the_face_follows_the_head_and_grows_with_it() -> None:
    body, skeleton = draw(1)
    larger = replace(body, head=1.3 * body.head)
    shape, grown = (
        np.einsum("fji,fnj->fni", skeleton.head_frame, find_landmarks(skeleton, size).points[:, FACE])
        - np.einsum("fji,fj->fi", skeleton.head_frame, skeleton.head)[:, None]
        for size in (body, larger)
    )
    np.testing.assert_allclose(shape, np.broadcast_to(shape[:1], shape.shape), rtol=0, atol=1e-12)
    np.testing.assert_allclose(grown, 1.3 * shape, rtol=0, atol=1e-12)


def test_body_points_are_the_skeletons_joints_by_their_names() -> None:
    body, skeleton = draw(2)
    points = find_landmarks(skeleton, body).points
    joints = {
        f"{side}_{name}": pair[index]
        for name, pair in {
            "shoulder": skeleton.shoulders, "elbow": skeleton.elbows, "wrist": skeleton.wrists,
            "hip": skeleton.hips, "knee": skeleton.knees, "ankle": skeleton.ankles,
        }.items()
        for index, side in enumerate(("left", "right"))
    }  # fmt: skip
    for name, joint in joints.items():
        assert np.array_equal(points[:, BODY_NAMES.index(name)], joint), name
    neck = 0.5 * (joints["left_shoulder"] + joints["right_shoulder"])
    np.testing.assert_allclose(points[:, BODY_NAMES.index("neck")], neck, rtol=1e-12)
    head = on_head(points[:, [BODY_NAMES.index(f"{side}_{part}") for side in ("left", "right") for part in
                              ("eye", "ear")]], skeleton, body)  # fmt: skip
    np.testing.assert_allclose(head[:, :2], head[:, 2:] * (-1.0, 1.0, 1.0), rtol=0, atol=1e-12)
    assert (head[:, :2, 0] > 0).all()
    assert np.array_equal(points[:, 0], points[:, FACE.start + 30])  # the nose is the tip of the face's


def test_a_hand_has_21_points_beginning_at_the_wrist() -> None:
    body, skeleton = draw(3)
    points = find_landmarks(skeleton, body).points
    assert points.shape == (len(TIMES), 128, 3)
    for side, part in enumerate((LEFT_HAND, RIGHT_HAND)):
        hand = points[:, part]
        assert hand.shape[1] == 21
        assert np.array_equal(hand[:, 0], skeleton.wrists[side])
        assert np.array_equal(hand, hand_points(skeleton, body, side))
        local = np.einsum("fji,fnj->fni", skeleton.hand_frames[side], hand - hand[:, :1]) / body.hand
        roots = local[:, 1::4]
        np.testing.assert_allclose(roots[..., :2], np.broadcast_to(FINGER_ROOTS, roots[..., :2].shape), atol=1e-12)
        assert (np.diff(roots[0, :, 0]) < 0).all()  # thumb first, then from its side to the other


def test_finger_bones_keep_their_lengths_however_they_curl() -> None:
    body, skeleton = draw(4)
    for curl in (0.0, 0.5, 1.0):
        curled = replace(skeleton, finger_curls=(np.full((len(TIMES), 5), curl),) * 2)
        for side in (0, 1):
            hand = hand_points(curled, body, side)[:, 1:].reshape(len(TIMES), 5, 4, 3)
            bones = np.linalg.norm(np.diff(hand, axis=2), axis=-1) / body.hand
            straight = hand_points(replace(curled, finger_curls=(np.zeros((len(TIMES), 5)),) * 2), body, side)
            wanted = np.linalg.norm(np.diff(straight[:, 1:].reshape(len(TIMES), 5, 4, 3), axis=2), axis=-1) / body.hand
            np.testing.assert_allclose(bones, wanted, rtol=1e-9)
            assert (bones[:, :, 0] > bones[:, :, 2]).all()  # fingers taper


def test_stretched_fingers_lie_flat_and_curled_ones_close_towards_the_palm() -> None:
    body, skeleton = draw(5)

    def fingers(curl: float) -> np.ndarray:
        """`(f, 5, 4, 3)`: four points of each finger in the hand's own frame and measure."""
        curled = replace(skeleton, finger_curls=(np.full((len(TIMES), 5), curl),) * 2)
        hand = hand_points(curled, body, 0)
        local = np.einsum("fji,fnj->fni", skeleton.hand_frames[0], hand - hand[:, :1]) / body.hand
        return local[:, 1:].reshape(len(TIMES), 5, 4, 3)

    straight, half, full = fingers(0.0), fingers(0.5), fingers(1.0)
    np.testing.assert_allclose(straight[..., 2], 0.0, rtol=0, atol=1e-12)
    assert (np.diff(half[..., 2], axis=2) > 0.03).all()  # every bone of them bends to +z, the palm's side
    lengths = [np.linalg.norm(points[:, 1:, 3], axis=-1).mean() for points in (straight, half, full)]
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[0] == pytest.approx(0.97, abs=0.06)  # a hand's length from the wrist to the middle fingers' tips


def test_the_last_two_bones_of_a_finger_lie_in_one_line() -> None:
    body, skeleton = draw(6)
    hand = hand_points(skeleton, body, 1)
    for finger in range(5):
        first, second = (hand[:, 4 * finger + joint + 1] - hand[:, 4 * finger + joint] for joint in (2, 3))
        cosine = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
        np.testing.assert_allclose(cosine, 1.0, rtol=1e-12)


def test_every_joint_lies_within_its_depth_of_the_bodys_surface() -> None:
    """Every point is inside a shape, or no further from one than its depth beneath the skin."""
    identity = draw_identity(np.random.default_rng(8))
    skeleton = dance(np.random.default_rng(9), identity.body, TIMES)
    shapes = build_body(identity, skeleton).shapes
    landmarks = find_landmarks(skeleton, identity.body)
    spheres = np.stack(shapes.centres, axis=1)  # (f, k, 3)
    inverse = np.linalg.inv(np.stack(shapes.axes, axis=1))
    offsets = landmarks.points[:, :, None] - spheres[:, None]
    inside = np.linalg.norm(np.einsum("fkij,fpkj->fpki", inverse, offsets), axis=-1).min(axis=-1) < 1.0
    from_cones = np.full(inside.shape, np.inf)
    for start, end, first, second in zip(shapes.starts, shapes.ends, shapes.start_radii, shapes.end_radii, strict=True):
        along = (end - start)[:, None]
        share = ((landmarks.points - start[:, None]) * along).sum(-1) / (along**2).sum(-1)
        share = share.clip(0, 1)[..., None]
        distance = np.linalg.norm(landmarks.points - start[:, None] - share * along, axis=-1)
        from_cones = np.minimum(from_cones, distance - first - (second - first) * share[..., 0])
    near = inside | (from_cones < landmarks.skin_depths)
    assert near.all(axis=0)[:60].all()  # body and hands; the face has its own, stricter test
    assert (landmarks.skin_depths > 0).all()


def test_thicker_bodies_hide_their_joints_deeper() -> None:
    body, skeleton = draw(7)
    slim, stout = (find_landmarks(skeleton, replace(body, girth=girth)).skin_depths for girth in (0.8, 1.6))
    np.testing.assert_allclose(stout[1:14], 2 * slim[1:14], rtol=1e-12)
    np.testing.assert_allclose(stout[14:], slim[14:], rtol=1e-12)
    assert slim[0] == stout[0]


def test_feet_lie_on_the_floor_below_the_ankles() -> None:
    identity = draw_identity(np.random.default_rng(3))
    skeleton = dance(np.random.default_rng(4), identity.body, np.arange(8) / 8.0)
    feet, foot = foot_points(skeleton, identity.body), find_foot(identity.body)
    for side in (0, 1):
        heel, toes, ankle = feet[:, side], feet[:, 2 + side], skeleton.ankles[side]
        assert (heel[:, 1] < ankle[:, 1]).all()
        # A flat foot stands on the floor, y = 0; a lifted one is above it.
        lowest = min(float((heel[:, 1] - foot.heel_radius).min()), float((toes[:, 1] - foot.ball_radius).min()))
        assert -0.03 < lowest < 0.03
        along = ((toes - heel) * skeleton.foot_frames[side][:, :, 2]).sum(axis=-1)
        assert (np.abs(along - np.linalg.norm(toes - heel, axis=-1)) < 0.01).all()
