"""BlazePose's real networks on rendered dancers, whose key points, depths and masks are known exactly."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.networks import require_blazepose

from dreamdance.annotators.blazepose import FILES, BlazePose, region_of_keypoints
from dreamdance.annotators.protocols import LANDMARK_NAMES, MaskAnnotator, PersonPoses, PoseAnnotator
from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip
from dreamdance.errors import MissingInputError
from dreamdance.media.keypoints import BODY, BODY_NAMES, FACE, LEFT_HAND, RIGHT_HAND, flip_keypoints

WIDTH, HEIGHT = 256, 384
LIMBS = [
    index for index, name in enumerate(BODY_NAMES) if name.split("_")[-1] in ("shoulder", "elbow", "wrist", "knee")
]


@pytest.fixture(scope="module")
def blazepose() -> BlazePose:
    folder = require_blazepose()
    return BlazePose(folder)


@pytest.fixture(scope="module")
def clips() -> list[DancerClip]:
    seeds = HELD_OUT_SEEDS[200:204]
    return [render_clip(seed, num_frames=2, width=WIDTH, height=HEIGHT, fps=1.0) for seed in seeds]


@pytest.fixture(scope="module")
def poses(blazepose: BlazePose, clips: list[DancerClip]) -> list[PersonPoses]:
    return [
        blazepose.annotate_pose(clip.rgb, [people[0] for people in blazepose.find_people(clip.rgb)]) for clip in clips
    ]


def torsos(keypoints, width=WIDTH, height=HEIGHT):
    """Lengths from the neck to the middle of the hips in pixels, `(f,)`."""
    points = keypoints[..., :2] * (width, height)
    neck, hips = BODY_NAMES.index("neck"), [BODY_NAMES.index("left_hip"), BODY_NAMES.index("right_hip")]
    return np.hypot(*np.moveaxis(points[:, neck] - points[:, hips].mean(axis=1), -1, 0))


def distances(found, truth):
    """Distances in lengths of the torso, `(f, 128)`."""
    between = (found[..., :2] - truth[..., :2]) * (WIDTH, HEIGHT)
    return np.hypot(between[..., 0], between[..., 1]) / torsos(truth)[:, None]


def overlap_of_masks(found, truth):
    return (found & truth).sum() / (found | truth).sum()


def test_it_offers_poses_and_masks_and_names_its_weights(blazepose):
    assert isinstance(blazepose, PoseAnnotator)
    assert isinstance(blazepose, MaskAnnotator)
    assert [file.sha256 for file in blazepose.networks] == [file.sha256 for file in FILES]
    assert {file.licence for file in blazepose.networks} == {"Apache-2.0"}


def test_body_points_agree_with_the_dancers_and_beat_their_mean_pose(clips, poses):
    truth = np.concatenate([clip.keypoints for clip in clips])
    found = np.concatenate([pose.keypoints for pose in poses])
    is_visible = truth[:, BODY, 2] == 1.0
    errors = distances(found, truth)[:, BODY]
    mean_pose = np.broadcast_to(truth.mean(axis=0), truth.shape)
    trivial = distances(mean_pose, truth)[:, BODY]
    assert (found[:, BODY, 2][is_visible] > 0.3).mean() > 0.95
    assert np.median(errors[is_visible]) < 0.06
    assert np.median(errors[is_visible]) < np.median(trivial[is_visible]) / 4
    assert np.median(errors[:, LIMBS][is_visible[:, LIMBS]]) < 0.06
    assert (errors[is_visible] < 0.15).mean() > 0.95


def test_a_mirrored_picture_has_mirrored_points(blazepose, clips, poses):
    mirrored = np.ascontiguousarray(clips[0].rgb[:, :, ::-1])
    found = blazepose.annotate_pose(mirrored, [people[0] for people in blazepose.find_people(mirrored)]).keypoints
    expected = flip_keypoints(poses[0].keypoints)
    is_certain = (expected[:, BODY, 2] > 0.8) & (found[:, BODY, 2] > 0.8)
    assert is_certain.mean() > 0.6
    assert np.median(distances(found, expected)[:, BODY][is_certain]) < 0.03


def test_a_dancer_elsewhere_in_a_larger_picture_has_the_same_points_there(blazepose, clips, poses):
    canvas = np.full((1, 600, 700, 3), 90, dtype=np.uint8)
    canvas[:, 120 : 120 + HEIGHT, 333 : 333 + WIDTH] = clips[1].rgb[:1]
    found = blazepose.annotate_pose(canvas, blazepose.find_people(canvas)[0][:1]).keypoints.copy()
    found[..., :2] = (found[..., :2] * (700, 600) - (333, 120)) / (WIDTH, HEIGHT)
    assert np.median(distances(found, poses[1].keypoints[:1])[:, BODY]) < 0.03


def test_landmarks_have_the_depth_of_the_dancers_joints(clips, poses):
    names = [
        name for name in BODY_NAMES if name.split("_")[-1] in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    ]
    hips = [BODY_NAMES.index("left_hip"), BODY_NAMES.index("right_hip")]
    found, truth = [], []
    for clip, pose in zip(clips, poses, strict=True):
        joints = clip.joints - clip.joints[:, hips].mean(axis=1, keepdims=True)
        widths_per_metre = clip.intrinsics[0, 0] / -clip.joints[:, hips, 2].mean(axis=1) / WIDTH
        truth.append(joints[:, [BODY_NAMES.index(name) for name in names], 2] * widths_per_metre[:, None])
        found.append(pose.landmarks[:, [LANDMARK_NAMES.index(name) for name in names], 2])
    found, truth = np.concatenate(found).ravel(), np.concatenate(truth).ravel()
    assert np.corrcoef(found, truth)[0, 1] > 0.6
    assert 0.6 < (found * truth).sum() / (found**2).sum() < 1.5
    assert np.median(np.abs(found - truth)) < 0.8 * np.median(np.abs(truth))


def test_masks_agree_with_the_dancers(blazepose, clips, poses):
    for clip, pose in zip(clips, poses, strict=True):
        mask = blazepose.annotate_mask(clip.rgb, pose)
        assert mask.dtype == np.float32
        assert overlap_of_masks(mask > 0.5, clip.mask) > 0.9


def test_the_mask_of_a_dancer_cut_above_the_hips_agrees(blazepose):
    clip = render_clip(HELD_OUT_SEEDS[205], num_frames=2, width=WIDTH, height=HEIGHT, fps=1.0)
    hips = [BODY_NAMES.index("left_hip"), BODY_NAMES.index("right_hip")]
    end = int(clip.keypoints[:, hips, 1].min() * HEIGHT)
    cut = np.ascontiguousarray(clip.rgb[:, :end])
    pose = blazepose.annotate_pose(cut, [people[0] for people in blazepose.find_people(cut)])
    assert (pose.keypoints[0, hips, 2] == 0).any()  # outside of the picture
    for found, truth in zip(blazepose.annotate_mask(cut, pose), clip.mask[:, :end], strict=True):
        assert overlap_of_masks(found > 0.5, truth) > 0.9


def test_a_mask_is_found_from_the_key_points_of_another_annotator(blazepose, clips):
    clip = clips[2]
    mask = blazepose.annotate_mask(clip.rgb, PersonPoses(clip.keypoints))
    assert overlap_of_masks(mask > 0.5, clip.mask) > 0.9
    unknown = PersonPoses(np.zeros_like(clip.keypoints))
    assert not blazepose.annotate_mask(clip.rgb, unknown).any()
    given = np.full(clip.mask.shape, 0.25, np.float32)
    assert blazepose.annotate_mask(clip.rgb, replace(unknown, mask=given)) is given


def test_hands_and_faces_agree_with_the_dancers_where_they_are_found(clips, poses):
    truth = np.concatenate([clip.keypoints for clip in clips])
    found = np.concatenate([pose.keypoints for pose in poses])
    errors = distances(found, truth)
    hands, faces = [], []
    for part, results in ((LEFT_HAND, hands), (RIGHT_HAND, hands), (FACE, faces)):
        for frame in range(len(truth)):
            if (truth[frame, part, 2] == 1.0).mean() > 0.8:
                is_found = found[frame, part, 2].any()
                results.append(np.median(errors[frame, part]) if is_found else np.nan)
    for results, limit, share in ((hands, 0.12, 0.4), (faces, 0.05, 0.7)):
        assert len(results) >= 4
        assert np.isfinite(results).mean() > share
        assert np.nanmedian(results) < limit
    # Never are both hands the same one.
    both = (found[:, LEFT_HAND, 2] > 0).any(axis=1) & (found[:, RIGHT_HAND, 2] > 0).any(axis=1)
    assert (np.abs(found[both, LEFT_HAND, :2] - found[both, RIGHT_HAND, :2]).mean(axis=(1, 2)) > 0.01).all()


def test_two_people_are_found_and_each_gets_its_own_pose(blazepose, clips, poses):
    both = np.concatenate([clips[0].rgb[:1], clips[3].rgb[:1]], axis=2)
    (people,) = blazepose.find_people(both)
    assert len(people) == 2
    people = sorted(people, key=lambda person: person.box[0])
    for place, (person, index) in enumerate(zip(people, (0, 3), strict=True)):
        found = blazepose.annotate_pose(both, [person]).keypoints.copy()
        found[..., 0] = found[..., 0] * 2 - place
        assert np.median(distances(found, clips[index].keypoints[:1])[:, BODY]) < 0.08
        rows, columns = np.nonzero(clips[index].mask[0])
        left, top, right, bottom = person.box
        assert ((columns + place * WIDTH > left) & (columns + place * WIDTH < right)).mean() > 0.98
        assert ((rows > top) & (rows < bottom)).mean() > 0.98


def test_nobody_is_found_in_an_empty_room_and_nothing_is_made_up(blazepose, clips):
    empty = np.full((1, HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    empty[:, 300:] = 90
    assert blazepose.find_people(empty) == [[]]
    person = blazepose.find_people(clips[0].rgb[:1])[0][0]
    for people in ([None], [person]):
        nothing = blazepose.annotate_pose(empty, people)
        assert not nothing.keypoints.any()
        assert not nothing.landmarks.any()
        assert not blazepose.annotate_mask(empty, nothing).any()


def test_a_person_cut_by_the_frame_has_no_confidence_beyond_it(blazepose, clips):
    cut = np.ascontiguousarray(clips[1].rgb[:1, : int(HEIGHT * 0.55)])
    (people,) = blazepose.find_people(cut)
    assert people
    keypoints = blazepose.annotate_pose(cut, people[:1]).keypoints[0]
    ankles = [BODY_NAMES.index("left_ankle"), BODY_NAMES.index("right_ankle")]
    assert (keypoints[ankles, 2] == 0).all()
    assert keypoints[BODY_NAMES.index("neck"), 2] > 0.5


def test_frames_of_another_form_and_lists_of_another_length_are_refused(blazepose, clips):
    with pytest.raises(ValueError, match=r"\(f, H, W, 3\) uint8; got \(2, 384, 256\) bool"):
        blazepose.find_people(clips[0].mask)
    with pytest.raises(ValueError, match="1 people for 2 frames"):
        blazepose.annotate_pose(clips[0].rgb, [None])


def test_the_region_of_key_points_needs_shoulders_and_hips():
    keypoints = np.zeros((128, 3), dtype=np.float32)
    for name, x, y in (
        ("left_shoulder", 60, 40),
        ("right_shoulder", 40, 40),
        ("left_hip", 55, 80),
        ("right_hip", 45, 80),
    ):
        keypoints[BODY_NAMES.index(name)] = (x / 100, y / 200, 1.0)
    keypoints[BODY_NAMES.index("left_ankle")] = (0.5, 160 / 200, 1.0)
    assert region_of_keypoints(keypoints, width=100, height=200) == pytest.approx((50, 80, 200, 0.0), abs=1e-4)
    keypoints[BODY_NAMES.index("left_hip"), 2] = 0.0
    assert region_of_keypoints(keypoints, width=100, height=200) is None


def test_missing_and_changed_weights_are_refused_with_the_command_that_fetches_them(tmp_path):
    with pytest.raises(MissingInputError, match=r"pose_detection.tflite: the weights.*Apache-2.0.*tools/networks.sh"):
        BlazePose(tmp_path)
    (tmp_path / "mediapipe").mkdir()
    (tmp_path / FILES[0].file).write_bytes(b"changed")
    found = hashlib.sha256(b"changed").hexdigest()
    with pytest.raises(MissingInputError, match=f"SHA-256 {found}, but the weights .* have {FILES[0].sha256}"):
        BlazePose(tmp_path)


def test_the_fetched_files_have_the_hashes_that_the_code_wants():
    lines = (Path(__file__).parents[2] / "tools" / "networks.sha256").read_text().splitlines()
    pinned = {file: sha256 for sha256, file in (line.split() for line in lines)}
    assert {file.file: file.sha256 for file in FILES}.items() <= pinned.items()
