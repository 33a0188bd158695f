"""Motion of dancers: bodies of human proportions, joints that bend one way, feet on the floor, smooth in time."""

from dataclasses import fields

import numpy as np
import pytest

from dreamdance.dancers.motion import SIDES, Proportions, Skeleton, Waves, dance, draw_proportions, rotation_about

SECONDS = np.arange(120) / 30.0
SEEDS = range(40)


def draw(seed: int, times: np.ndarray = SECONDS) -> tuple[Proportions, Skeleton]:
    generator = np.random.default_rng(seed)
    body = draw_proportions(generator)
    return body, dance(generator, body, times)


@pytest.fixture(scope="module")
def dances() -> list[tuple[Proportions, Skeleton]]:
    return [draw(seed) for seed in SEEDS]


def length(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=-1)


def arrays(skeleton: Skeleton) -> dict[str, np.ndarray]:
    """All joints and frames by name, pairs apart."""
    found = {}
    for entry in fields(skeleton):
        value = getattr(skeleton, entry.name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{entry.name}[{side}]": part for side, part in enumerate(parts)}
    return found


def test_a_body_is_as_tall_as_its_parts_stacked(dances: list[tuple[Proportions, Skeleton]]) -> None:
    crown = 0.19  # metres from the top of the neck, for a head of factor 1
    for body, _ in dances:
        stacked = body.ankle + body.shin + body.thigh + 0.03 + body.spine + body.neck + crown * body.head
        assert 0.92 < stacked / body.height < 1.0


def test_bodies_differ_in_every_measure_but_keep_human_proportions(dances: list[tuple[Proportions, Skeleton]]) -> None:
    bodies = [body for body, _ in dances]
    for entry in fields(Proportions):
        values = {getattr(body, entry.name) for body in bodies}
        assert len(values) == (1 if entry.name == "ankle" else len(bodies)), entry.name
    for body in bodies:
        assert body.shoulder_width > 1.5 * body.hip_width
        assert body.upper_arm > body.forearm > body.hand
        span = 2 * (body.shoulder_width + body.upper_arm + body.forearm + body.hand)
        assert 0.95 < span / body.height < 1.15


def test_limbs_have_the_bodys_lengths_in_every_frame(dances: list[tuple[Proportions, Skeleton]]) -> None:
    for body, skeleton in dances:
        for side in (0, 1):
            shoulder, elbow, wrist = skeleton.shoulders[side], skeleton.elbows[side], skeleton.wrists[side]
            hip, knee, ankle = skeleton.hips[side], skeleton.knees[side], skeleton.ankles[side]
            bones = (elbow - shoulder, wrist - elbow, knee - hip, ankle - knee)
            wanted = (body.upper_arm, body.forearm, body.thigh, body.shin)
            for bone, size in zip(bones, wanted, strict=True):
                np.testing.assert_allclose(length(bone), size, rtol=1e-9)


def test_hips_and_shoulders_are_a_pair_about_the_trunk(dances: list[tuple[Proportions, Skeleton]]) -> None:
    for body, skeleton in dances:
        left, right = skeleton.hips
        np.testing.assert_allclose(length(left - right), 2 * body.hip_width, rtol=1e-9)
        np.testing.assert_allclose(length(left - skeleton.pelvis), length(right - skeleton.pelvis), rtol=1e-9)
        # Shoulders shrug one by one, each by at most four centimetres, and keep their width.
        left, right = (
            np.einsum("fji,fj->fi", skeleton.chest_frame, shoulder - skeleton.neck) for shoulder in skeleton.shoulders
        )
        np.testing.assert_allclose(left[:, 0], body.shoulder_width, rtol=1e-9)
        np.testing.assert_allclose(right[:, 0], -body.shoulder_width, rtol=1e-9)
        assert np.abs(left[:, 1] - right[:, 1]).max() <= 0.04


def test_left_is_on_the_left_of_who_faces_the_camera(dances: list[tuple[Proportions, Skeleton]]) -> None:
    for _, skeleton in dances:
        facing = skeleton.pelvis_frame[:, 2, 2] > 0.5
        for left, right in (skeleton.hips, skeleton.shoulders):
            assert (left[facing, 0] > right[facing, 0]).all()
    assert SIDES == (1.0, -1.0)


def test_frames_are_rotations_and_the_left_hand_is_the_right_ones_mirror_image() -> None:
    _, skeleton = draw(3)
    for name, frames in arrays(skeleton).items():
        if frames.ndim == 3:
            products = np.swapaxes(frames, -1, -2) @ frames
            np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), rtol=0, atol=1e-12)
            mirrored = name == "hand_frames[0]"  # the thumb's side, along, out of the palm: left-handed
            np.testing.assert_allclose(np.linalg.det(frames), -1.0 if mirrored else 1.0, rtol=1e-12)


def test_elbows_bend_one_way_within_what_an_elbow_can(dances: list[tuple[Proportions, Skeleton]]) -> None:
    flexes = []
    for body, skeleton in dances:
        for side in (0, 1):
            upper = (skeleton.elbows[side] - skeleton.shoulders[side]) / body.upper_arm
            fore = (skeleton.wrists[side] - skeleton.elbows[side]) / body.forearm
            flexes.append(np.degrees(np.arccos((upper * fore).sum(-1).clip(-1, 1))))
    assert np.min(flexes) > 4.0 - 1e-6  # never straight to the last degree, and never over-stretched
    assert np.max(flexes) < 135.0 + 1e-6
    assert np.ptp(flexes) > 100.0


def test_forearms_bend_forward_or_up_never_behind_the_arm(dances: list[tuple[Proportions, Skeleton]]) -> None:
    for body, skeleton in dances:
        for side, sign in enumerate(SIDES):
            local = [
                np.einsum("fji,fj->fi", skeleton.chest_frame, part) * (sign, 1.0, 1.0)
                for part in (
                    (skeleton.elbows[side] - skeleton.shoulders[side]) / body.upper_arm,
                    (skeleton.wrists[side] - skeleton.elbows[side]) / body.forearm,
                )
            ]
            upper, fore = local
            azimuth = np.arctan2(upper[:, 2], upper[:, 0])
            ahead = np.stack([-np.sin(azimuth), np.zeros_like(azimuth), np.cos(azimuth)], axis=-1)
            inner = fore - (fore * upper).sum(-1, keepdims=True) * upper
            inner /= length(inner)[:, None]
            # The bend lies between straight ahead and straight up, give or take the 0.6 that it sways by.
            assert ((inner * ahead).sum(-1) > np.cos(1.9)).all()


def test_arms_swing_from_hanging_to_overhead_within_the_shoulders_reach(
    dances: list[tuple[Proportions, Skeleton]],
) -> None:
    elevations = []
    for body, skeleton in dances:
        for side, sign in enumerate(SIDES):
            upper = (skeleton.elbows[side] - skeleton.shoulders[side]) / body.upper_arm
            local = np.einsum("fji,fj->fi", skeleton.chest_frame, upper)
            elevations.append(np.degrees(np.arcsin(local[:, 1])))
            azimuth = np.degrees(np.arctan2(local[:, 2], sign * local[:, 0]))
            assert azimuth.min() > -25.0 - 1e-6  # not behind the back
            assert azimuth.max() < 90.0 + 1e-6  # not across the chest
    assert -77.0 < np.min(elevations) < -60.0
    assert 45.0 < np.max(elevations) < 67.0


def test_knees_point_where_the_feet_point_and_legs_are_never_over_stretched(
    dances: list[tuple[Proportions, Skeleton]],
) -> None:
    for body, skeleton in dances:
        for side in (0, 1):
            hip, knee, ankle = skeleton.hips[side], skeleton.knees[side], skeleton.ankles[side]
            forward = skeleton.foot_frames[side][:, :, 2]
            bend = knee - 0.5 * (hip + ankle)
            assert ((bend * forward).sum(-1) > 0).all()
            assert (length(hip - ankle) <= 0.99 * (body.thigh + body.shin)).all()


def test_dancers_face_the_camera_enough_for_their_faces_to_be_seen(
    dances: list[tuple[Proportions, Skeleton]],
) -> None:
    turns = []
    for _, skeleton in dances:
        turns.append(np.degrees(np.arccos(skeleton.pelvis_frame[:, 2, 2])))
        assert np.degrees(np.arccos(skeleton.head_frame[:, 2, 2])).max() < 60.0
    assert np.max(turns) < 80.0  # 75 of the heading, the rest of the pelvis' tilt
    assert np.max(turns) > 45.0


def test_one_foot_stands_at_every_moment_and_none_sinks_into_the_floor(
    dances: list[tuple[Proportions, Skeleton]],
) -> None:
    steps = 0
    for body, skeleton in dances:
        heights = np.stack([ankle[:, 1] for ankle in skeleton.ankles])
        np.testing.assert_allclose(heights.min(axis=0), body.ankle, rtol=0, atol=1e-12)
        steps += heights.max() > body.ankle + 0.03
        sole = 0.036 * body.height / 1.72
        for side in (0, 1):
            for along, thickness in ((-0.035, 1.0), (0.075 * body.height, 0.86)):  # heel and ball
                centre = np.array([0.0, sole * thickness - body.ankle, along])
                bottom = skeleton.ankles[side] + skeleton.foot_frames[side] @ centre
                assert bottom[:, 1].min() > sole * thickness - 1e-9
    assert len(dances) / 2 < steps < len(dances)  # most dances have steps, some only sway


def test_raised_feet_hang_toes_down() -> None:
    for seed in SEEDS:
        body, skeleton = draw(seed)
        for ankle, frames in zip(skeleton.ankles, skeleton.foot_frames, strict=True):
            raised = ankle[:, 1] > body.ankle + 0.02
            assert (frames[raised, 1, 2] < 0).all()
            np.testing.assert_allclose(frames[ankle[:, 1] == body.ankle, 1, 2], 0.0, rtol=0, atol=1e-12)


def test_a_dance_is_a_function_of_time_alone() -> None:
    """Sampled at other times, or for longer, the dance is the same."""
    for seed in (0, 5):
        _, all_frames = draw(seed)
        _, every_third = draw(seed, SECONDS[5::3])
        for name, values in arrays(every_third).items():
            np.testing.assert_allclose(values, arrays(all_frames)[name][5::3], rtol=0, atol=1e-12, err_msg=name)


def test_movements_are_continuous() -> None:
    """Twice as many frames per second halve every step: joints, frames and fingers are continuous."""
    for seed in range(12):
        coarse, fine = (arrays(draw(seed, np.arange(0, 3, 1 / rate))[1]) for rate in (120, 240))
        for name, values in coarse.items():
            step, half_step = (np.abs(np.diff(part, axis=0)).max() for part in (values, fine[name]))
            assert half_step < 0.6 * step + 1e-12, (seed, name)


def test_two_dances_of_one_body_differ() -> None:
    body = draw_proportions(np.random.default_rng(0))
    first, second = (dance(np.random.default_rng(seed), body, SECONDS) for seed in (1, 2))
    assert length(first.wrists[0] - second.wrists[0]).max() > 0.1


def test_a_wave_stays_within_its_amplitude_and_repeats_every_four_beats() -> None:
    for seed in range(20):
        waves = Waves(np.random.default_rng(seed), SECONDS)
        four_beats = 4.0 / waves.beat_hertz
        values = waves.draw(3.0, 0.5)
        later = Waves(np.random.default_rng(seed), SECONDS + four_beats).draw(3.0, 0.5)
        assert np.abs(values - 3.0).max() <= 0.5
        assert np.ptp(values) > 0.2
        np.testing.assert_allclose(later, values, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("quick", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_quick_is_the_share_that_moves_with_every_beat(quick: float, share: float) -> None:
    """Over four moments a beat apart the slow sinusoids, of a half and a quarter of the beat's frequency, cancel."""
    times = np.arange(1000) / 250.0
    beat = 1.0 / Waves(np.random.default_rng(0), times).beat_hertz
    shifted = [Waves(np.random.default_rng(0), times + beats * beat).draw(0.0, 2.0, quick=quick) for beats in range(4)]
    assert np.max(shifted) <= 2.0
    of_the_beat = np.mean(shifted, axis=0)
    np.testing.assert_allclose(of_the_beat.max(), 2.0 * share, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("axis", "turned", "onto"), [("x", 1, 2), ("y", 2, 0), ("z", 0, 1)])
def test_rotations_are_right_handed_and_add_up(axis: str, turned: int, onto: int) -> None:
    basis = np.eye(3)
    quarter = rotation_about(axis, np.array([np.pi / 2]))[0]
    np.testing.assert_allclose(quarter @ basis[turned], basis[onto], rtol=0, atol=1e-15)
    first, second = np.array([0.3, -1.0]), np.array([0.5, 2.0])
    np.testing.assert_allclose(
        rotation_about(axis, first) @ rotation_about(axis, second), rotation_about(axis, first + second), atol=1e-15
    )
