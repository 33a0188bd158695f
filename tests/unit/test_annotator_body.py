"""The annotator `body`: depth and normals of a person from landmarks and mask, against rendered dancers' truth."""

from dataclasses import replace

import numpy as np
import pytest

from dreamdance.annotators.body import Body
from dreamdance.annotators.body_chords import find_chords
from dreamdance.annotators.body_outline import Surface, _distance, follow_mask
from dreamdance.annotators.body_skeleton import find_skeleton
from dreamdance.annotators.exact_poses import exact_poses
from dreamdance.annotators.protocols import LANDMARK_NAMES, DepthAnnotator, NormalAnnotator, PersonPoses
from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip
from dreamdance.evaluation.geometry_metrics import angular_error, depth_error
from dreamdance.media.surfaces import PinholeCamera, angles, erode, normals_from_depth

SIDE = 160  # pixels of the square pictures of `standing`
SCALE = 70.0  # pixels per metre in them

# A person who faces the camera, arms hanging: metres right of, above and in front of the hips' middle. Left is at +x.
POINTS = {
    "nose": (0, 0.72, 0.10), "mouth_left": (0.025, 0.66, 0.085), "mouth_right": (-0.025, 0.66, 0.085),
    "left_eye_inner": (0.018, 0.755, 0.08), "left_eye": (0.031, 0.755, 0.08), "left_eye_outer": (0.045, 0.755, 0.07),
    "right_eye_inner": (-0.018, 0.755, 0.08), "right_eye": (-0.031, 0.755, 0.08),
    "right_eye_outer": (-0.045, 0.755, 0.07), "left_ear": (0.076, 0.745, -0.01), "right_ear": (-0.076, 0.745, -0.01),
    "left_shoulder": (0.18, 0.48, 0), "right_shoulder": (-0.18, 0.48, 0),
    "left_elbow": (0.24, 0.20, 0), "right_elbow": (-0.24, 0.20, 0),
    "left_wrist": (0.26, -0.04, 0.03), "right_wrist": (-0.26, -0.04, 0.03),
    "left_pinky": (0.26, -0.12, 0.01), "right_pinky": (-0.26, -0.12, 0.01),
    "left_index": (0.26, -0.13, 0.06), "right_index": (-0.26, -0.13, 0.06),
    "left_thumb": (0.25, -0.09, 0.08), "right_thumb": (-0.25, -0.09, 0.08),
    "left_hip": (0.095, 0, 0), "right_hip": (-0.095, 0, 0),
    "left_knee": (0.10, -0.37, 0.02), "right_knee": (-0.10, -0.37, 0.02),
    "left_ankle": (0.10, -0.74, 0), "right_ankle": (-0.10, -0.74, 0),
    "left_heel": (0.10, -0.79, -0.04), "right_heel": (-0.10, -0.79, -0.04),
    "left_foot_index": (0.11, -0.79, 0.15), "right_foot_index": (-0.11, -0.79, 0.15),
}  # fmt: skip


def standing(*, turn: np.ndarray | None = None, **moved: tuple[float, float, float]) -> PersonPoses:
    """The person above, seen without perspective; `turn` `(3, 3)` turns it about the hips' middle."""
    points = np.array([(POINTS | moved)[name] for name in LANDMARK_NAMES], dtype=np.float64)
    if turn is not None:
        points = points @ turn.T
    x, y, z = (points * SCALE / SIDE).T
    landmarks = np.stack([0.5 + x, 0.5 - y, z, np.ones_like(x)], axis=-1)[None].astype(np.float32)
    return PersonPoses(np.zeros((1, 128, 3), dtype=np.float32), landmarks)


# A mask without outline says nothing about girths and moves no joint: the shapes alone are seen.
EVERYWHERE = np.ones((1, SIDE, SIDE), dtype=np.float32)


def seen_surface(poses: PersonPoses) -> Surface:
    return Body(focal=60.0).find_surface(poses, EVERYWHERE)


def pixel(right: float, up: float) -> tuple[int, int]:
    """Row and column of a place in metres from the picture's centre."""
    return int(SIDE / 2 - up * SCALE), int(SIDE / 2 + right * SCALE)


def heights(surface: Surface, poses: PersonPoses) -> np.ndarray:
    """Metres towards the camera, relative to the hips, of the first frame."""
    seen = find_skeleton(poses.landmarks, width=SIDE, height=SIDE, focal=60.0, nearest=2.0)
    hips = -0.5 * (seen.skeleton.hips[0] + seen.skeleton.hips[1])[0, 2]
    return (hips - surface.depths[0]) * (seen.focal / hips / SCALE)


@pytest.fixture(scope="module")
def dancers() -> list[DancerClip]:
    return [render_clip(HELD_OUT_SEEDS.start + number, num_frames=4, width=192, height=288) for number in (0, 3, 5)]


def test_it_is_an_annotator_of_depth_and_normals_without_networks() -> None:
    body = Body()
    assert isinstance(body, DepthAnnotator)
    assert isinstance(body, NormalAnnotator)
    assert body.networks == ()
    assert not body.sees_background


def test_an_arm_that_points_at_the_camera_is_near_and_axes_are_x_right_y_up() -> None:
    surface = seen_surface(
        standing(
            left_elbow=(0.19, 0.47, 0.28), left_wrist=(0.20, 0.46, 0.52), left_pinky=(0.18, 0.46, 0.60),
            left_index=(0.23, 0.46, 0.60), left_thumb=(0.25, 0.46, 0.56),
        )
    )  # fmt: skip
    normals, depth = surface.normals[0], surface.depths[0]
    hand, trunk = pixel(0.20, 0.46), pixel(0.0, 0.25)
    assert depth[trunk] - depth[hand] > 0.35
    assert depth[pixel(-0.18, 0.46)] - depth[hand] > 0.35  # the right shoulder, at the picture's left
    assert normals[trunk][2] > 0.9
    # The right upper arm is at the picture's left: its outer side faces left. The other side of the body faces right.
    assert normals[pixel(-0.245, 0.3)][0] < -0.4
    assert normals[pixel(0.13, -0.2)][0] > 0.4
    # The top of the head faces up.
    assert normals[pixel(0.0, 0.835)][1] > 0.6


@pytest.mark.parametrize("degrees", [-40.0, 35.0])
def test_a_turned_body_has_turned_normals(degrees: float) -> None:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
    poses = (standing(), standing(turn=turn))
    straight, turned = (seen_surface(one) for one in poses)
    heights_before, heights_after = heights(straight, poses[0]), heights(turned, poses[1])
    errors = []
    for right, up in ((0.0, 0.3), (0.04, 0.2), (-0.05, 0.15), (0.02, 0.36), (0.1, -0.2), (-0.1, -0.25)):
        row, column = pixel(right, up)
        x, y = (column + 0.5 - SIDE / 2) / SCALE, (SIDE / 2 - row - 0.5) / SCALE
        moved = turn @ np.array([x, y, heights_before[row, column]])
        there = pixel(moved[0], moved[1])
        errors.append(float(angles(turned.normals[0][there], turn @ straight.normals[0, row, column])))
        assert abs(heights_after[there] - moved[2]) < 0.03
    # A pixel is 1.4 cm wide: on a thigh the normal turns by 9 degrees from pixel to pixel.
    assert max(errors) < 9.0
    assert np.mean(errors) < 4.0


def test_a_body_turned_in_the_picture_gives_the_turned_picture() -> None:
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    straight, turned = seen_surface(standing()), seen_surface(standing(turn=quarter))
    expected = np.rot90(straight.normals[0]) @ quarter.T
    assert np.quantile(angles(turned.normals[0], expected), 0.95) < 1.0
    assert np.quantile(np.abs(turned.depths[0] - np.rot90(straight.depths[0])), 0.95) < 2e-3


def test_normals_are_those_of_the_depth_where_the_surface_is_smooth(dancers: list[DancerClip]) -> None:
    for clip in dancers:
        poses = exact_poses(clip)
        body = Body()
        surface = body.find_surface(poses, poses.mask)
        height, width = clip.mask.shape[1:]
        focal = body.focal * height
        own = normals_from_depth(surface.depths, PinholeCamera(focal, focal, width / 2 - 0.5, height / 2 - 0.5))
        steps = [np.abs(np.diff(surface.depths, 2, axis=axis)).max(initial=0, axis=None) for axis in (1, 2)]
        assert max(steps) > 0.05  # there are steps in depth, between limbs
        curved = sum(np.abs(np.gradient(np.gradient(surface.depths, axis=axis), axis=axis)) for axis in (1, 2))
        smooth = erode(clip.mask) & (curved < 2e-3) & (surface.normals[..., 2] > 0.5)
        assert smooth.sum() > 0.2 * clip.mask.sum()
        assert np.median(angles(surface.normals[smooth], own[smooth])) < 1.0


def test_exact_landmarks_give_nearly_the_true_surface(dancers: list[DancerClip]) -> None:
    for clip in dancers:
        poses = exact_poses(clip)
        surface = Body().find_surface(poses, poses.mask)
        angle, relative = errors(clip, surface)
        facing = np.broadcast_to(np.array([0, 0, 1], dtype=np.float32), clip.normal.shape)
        flat_angle, flat = errors(clip, Surface(np.ones_like(clip.depth), facing))
        assert flat_angle > 33
        assert angle < 9
        assert relative < 0.5 * flat


def test_inexact_landmarks_are_corrected_by_the_mask(dancers: list[DancerClip]) -> None:
    """Joints off by 6 % of the trunk's length, as those of pose networks are."""
    generator = np.random.default_rng(5)
    for clip in dancers:
        poses = exact_poses(clip)
        landmarks = poses.landmarks.copy()
        height, width = clip.mask.shape[1:]
        trunk = np.linalg.norm((landmarks[:, 11, :2] - landmarks[:, 23, :2]) * (width, height), axis=-1).mean()
        landmarks[..., :2] += generator.normal(0, 0.06 / 2**0.5, landmarks[..., :2].shape) * trunk / (width, height)
        surface = Body().find_surface(replace(poses, landmarks=landmarks), poses.mask)
        assert errors(clip, surface)[0] < 17


def errors(clip: DancerClip, surface: Surface) -> tuple[float, float]:
    """Mean angle of normals and AbsRel of depth, inside the body."""
    truth = 1.0 / clip.depth.astype(np.float64)
    disparity = 1.0 / surface.depths.astype(np.float64)
    relative = depth_error(disparity, truth, clip.mask, min_disparity=truth.min(), fit_mask=clip.mask).abs_rel
    return angular_error(surface.normals, clip.normal, clip.mask).mean, relative


def test_an_arm_that_is_not_visible_is_left_out() -> None:
    forward = {"right_elbow": (-0.05, 0.35, 0.25), "right_wrist": (0.0, 0.25, 0.45)}
    poses = standing(**forward)
    chest = pixel(0.0, 0.25)
    assert heights(seen_surface(poses), poses)[chest] > 0.3
    landmarks = poses.landmarks.copy()
    landmarks[:, LANDMARK_NAMES.index("right_elbow"), 3] = 0.1
    assert heights(seen_surface(replace(poses, landmarks=landmarks)), poses)[chest] < 0.2


def test_legs_whose_joints_are_uncertain_are_kept() -> None:
    """Wide trousers hide knees and ankles; without legs the surface there would be flat."""
    poses = standing()
    landmarks = poses.landmarks.copy()
    for name in ("left_knee", "right_knee", "left_ankle", "right_ankle"):
        landmarks[:, LANDMARK_NAMES.index(name), 3] = 0.1
    seen, uncertain = seen_surface(poses), seen_surface(replace(poses, landmarks=landmarks))
    legs = (slice(None), slice(pixel(0.0, -0.3)[0], None))
    turned = seen.normals[legs][..., 2] < 0.9
    assert turned.any()
    assert (uncertain.normals[legs][..., 2] < 0.9)[turned].mean() > 0.9


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_distances_in_a_mask_are_exact_to_the_last_bit(share: float) -> None:
    """Those of OpenCV are not: they differ from call to call, and with them what two processes store."""
    for seed in range(8):
        outside = np.random.default_rng(seed).random((97, 61)) < share
        pixels, others = np.argwhere(~outside), np.argwhere(outside)
        squares = np.square(pixels[:, None] - others).sum(axis=-1).min(axis=1)
        expected = np.zeros(outside.shape, dtype=np.float32)
        expected[~outside] = np.sqrt(squares.astype(np.float64))
        assert np.array_equal(_distance(~outside), expected)


def test_every_pixel_is_finite_and_the_background_is_the_far_end(dancers: list[DancerClip]) -> None:
    clip = dancers[0]
    poses = exact_poses(clip)
    mask = poses.mask.copy()
    mask[1] = 0.0
    surface = Body().find_surface(poses, mask)
    outside = mask == 0
    assert np.isfinite(surface.depths).all()
    np.testing.assert_allclose(np.linalg.norm(surface.normals, axis=-1), 1.0, atol=1e-5)
    assert (surface.normals[outside] == (0, 0, 1)).all()
    assert (surface.depths[outside] == surface.depths[~outside].max()).all()
    body = Body()
    depths = body.annotate_depth(clip.rgb, poses, mask)
    assert depths.kind == "depth"
    assert np.array_equal(depths.values, surface.depths)
    assert np.array_equal(body.annotate_normal(clip.rgb, poses, mask), surface.normals)
    other = Body().annotate_normal(clip.rgb, poses, poses.mask)
    body.annotate_depth(clip.rgb, poses, mask)
    assert np.array_equal(body.annotate_normal(clip.rgb, poses, poses.mask), other)


def test_frames_without_a_person_do_not_change_the_others(dancers: list[DancerClip]) -> None:
    clip = dancers[1]
    poses = exact_poses(clip)
    landmarks, mask = poses.landmarks.copy(), poses.mask.copy()
    landmarks[2], mask[2] = 0.0, 0.0
    whole, gap = Body().find_surface(poses, poses.mask), Body().find_surface(replace(poses, landmarks=landmarks), mask)
    for frame in (0, 1, 3):
        inside = clip.mask[frame]
        # If the empty frame counted, the mean angle would be 34 degrees and the ratio below 2.6.
        assert angles(gap.normals[frame][inside], clip.normal[frame][inside]).mean() < 12.0
        ratio = gap.depths[frame][inside] / whole.depths[frame][inside]
        assert abs(np.median(ratio) - 1.0) < 0.02


def test_a_mask_of_other_pixels_and_landmarks_in_one_place_give_finite_maps() -> None:
    poses = standing()
    elsewhere = np.zeros_like(EVERYWHERE)
    elsewhere[:, :20, :20] = 1.0
    collapsed = replace(poses, landmarks=np.full_like(poses.landmarks, 0.5))
    for pose, mask in ((poses, elsewhere), (poses, np.zeros_like(elsewhere)), (collapsed, EVERYWHERE)):
        surface = Body().find_surface(pose, mask)
        assert np.isfinite(surface.depths).all()
        assert np.isfinite(surface.normals).all()
        assert (surface.depths > 0).all()


def test_what_cannot_be_used_is_refused() -> None:
    poses = standing()
    with pytest.raises(ValueError, match=r"videos\.annotators\.pose: blazepose"):
        Body().find_surface(replace(poses, landmarks=None), EVERYWHERE)
    with pytest.raises(ValueError, match=r"\(2, 160, 160\)"):
        Body().find_surface(poses, np.repeat(EVERYWHERE, 2, axis=0))
    with pytest.raises(ValueError, match="not finite"):
        Body().find_surface(replace(poses, landmarks=poses.landmarks * np.nan), EVERYWHERE)
    with pytest.raises(ValueError, match="focal is 0"):
        Body(focal=0)


def ball(radius: float, focal: float, distance: float) -> tuple[Surface, np.ndarray]:
    """A ball of some pixels' radius in the middle of a picture of 96x96: its surface and its mask."""
    y, x = np.mgrid[:96, :96].astype(np.float64)
    x, y = x - 47.5, 47.5 - y
    height = np.sqrt(np.maximum(radius**2 - x**2 - y**2, 0.0))
    inside = x**2 + y**2 < radius**2
    depths = np.where(inside, distance - height * distance / focal, np.inf)
    normals = np.where(inside[..., None], np.stack([x, y, height], axis=-1) / radius, (0.0, 0.0, 1.0))
    return Surface(depths[None].astype(np.float32), normals[None].astype(np.float32)), inside[None]


@pytest.mark.parametrize(("shape", "outline"), [(26, 30), (30, 26)])
def test_a_surface_that_is_smaller_or_larger_than_the_mask_gets_its_outline(shape: int, outline: int) -> None:
    focal, distance = 3000.0, 10.0
    surface, _ = ball(shape, focal, distance)
    truth, mask = ball(outline, focal, distance)
    fitted = follow_mask(surface, mask, focal=focal, hips=np.array([distance]))
    assert angular_error(fitted.normals, truth.normals, mask).mean < 6.0
    # Without the fit: what the shape does not cover faces the camera, or the outline does not turn away.
    cut = np.where(np.isfinite(surface.depths)[..., None], surface.normals, (0.0, 0.0, 1.0))
    assert angular_error(cut, truth.normals, mask).mean > 8.0


def test_a_hole_between_two_shapes_is_filled_smoothly() -> None:
    depths = np.full((1, 64, 64), np.inf, dtype=np.float32)
    depths[:, :, :20], depths[:, :, 44:] = 3.0, 3.2
    normals = np.zeros((1, 64, 64, 3), dtype=np.float32) + np.array([0, 0, 1], dtype=np.float32)
    mask = np.ones((1, 64, 64), dtype=bool)
    filled = follow_mask(Surface(depths, normals), mask, focal=300.0, hips=np.array([3.0]))
    line = filled.depths[0, 32]
    assert (np.diff(line) >= -1e-6).all()
    assert np.diff(line).max() < 0.1
    # It recedes to the right, so it faces right.
    assert filled.normals[0, 32, 32, 0] > 0.3


def test_chords_have_the_masks_width_and_middle() -> None:
    mask = np.zeros((1, SIDE, SIDE), dtype=bool)
    mask[:, :, 70:90] = True
    seen = find_skeleton(standing().landmarks, width=SIDE, height=SIDE, focal=60.0, nearest=2.0)
    scale = seen.focal / -seen.skeleton.pelvis[0, 2]
    # Three pixels left of the bar's middle, which is the picture's.
    point = seen.skeleton.pelvis * (0, 0, 1) - np.array([3.0 / scale, 0, 0])
    chords = find_chords(seen, mask, point[:, None], np.array([[[1.0, 0.0]]]), np.array([[0.14]]))
    assert chords.radii[0, 0] * scale == pytest.approx(10, abs=0.6)
    assert chords.offsets[0, 0] * scale == pytest.approx(3, abs=0.6)
    far = find_chords(seen, mask, point[:, None], np.array([[[0.0, 1.0]]]), np.array([[0.14]]))
    assert np.isnan(far.radii[0, 0])


def test_exact_poses_are_the_key_points_and_the_joints_depths(dancers: list[DancerClip]) -> None:
    clip = dancers[1]
    poses = exact_poses(clip)
    wrist, hips = LANDMARK_NAMES.index("left_wrist"), clip.joints[:, [8, 11]].mean(axis=1)
    np.testing.assert_allclose(poses.landmarks[:, wrist, :2], clip.keypoints[:, 7, :2], atol=1e-5)
    metres = poses.landmarks[:, wrist, 2] * clip.mask.shape[2] * -hips[:, 2] / clip.intrinsics[0, 0]
    np.testing.assert_allclose(metres, clip.joints[:, 7, 2] - hips[:, 2], atol=1e-4)
    heel, toes, ankle = (poses.landmarks[:, LANDMARK_NAMES.index(f"right_{name}")] for name in
                         ("heel", "foot_index", "ankle"))  # fmt: skip
    assert (heel[:, 1] > ankle[:, 1]).all()
    assert (toes[:, 2] > heel[:, 2]).all()
    assert poses.mask is not None
    assert np.array_equal(poses.mask > 0.5, clip.mask)
