"""Alignment of a driving skeleton: the size of a body is found from the visible points of each frame."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.media.alignment import AlignmentError, align_keypoints
from dreamdance.media.keypoints import BODY_NAMES, KeypointSequence

WIDTH, HEIGHT, NUM_FRAMES = 24, 36, 24
SCALE = 0.7
LEGS = [BODY_NAMES.index(f"{side}_{joint}") for side in ("left", "right") for joint in ("knee", "ankle")]
LEGS_SHOW = {"always": range(24), "in the first sixth": range(4), "in the last sixth": range(20, 24)}


def dancer(index: int) -> NDArray[np.float32]:
    """The key points of a rendered dancer, all measured joints with confidence 1."""
    points = render_clip(HELD_OUT_SEEDS[index], num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT).keypoints
    points[:, :18, 2] = 1.0
    return points


def sequence(points: NDArray[np.float32]) -> KeypointSequence:
    return KeypointSequence(points, WIDTH, HEIGHT, 8.0)


def smaller_and_walking(points: NDArray[np.float32], *, legs_show: range) -> NDArray[np.float32]:
    """The dancer at 0.7 of the size, walking through the picture; legs are visible in some frames only."""
    moved = points.copy()
    moved[..., :2] = 0.5 + SCALE * (points[..., :2] - 0.5)
    moved[..., :2] += np.linspace([-0.2, -0.15], [0.2, 0.15], NUM_FRAMES)[:, None]
    unseen = [frame for frame in range(NUM_FRAMES) if frame not in legs_show]
    moved[np.ix_(unseen, LEGS, [2])] = 0.0
    return moved


def scale_of(aligned: NDArray[np.float32], driving: NDArray[np.float32]) -> float:
    """The factor by which the length from neck to hip changed in the first frame."""
    return float(
        np.linalg.norm(aligned[0, 1, :2] - aligned[0, 8, :2]) / np.linalg.norm(driving[0, 1, :2] - driving[0, 8, :2])
    )


@pytest.mark.parametrize("shown", list(LEGS_SHOW))
@pytest.mark.parametrize("index", range(4))
def test_the_scale_of_a_walk_with_legs_in_a_few_frames_is_that_of_the_body(index, shown):
    points = dancer(index)
    driving = smaller_and_walking(points, legs_show=LEGS_SHOW[shown])
    aligned = align_keypoints(sequence(driving), sequence(points[:1]))
    assert scale_of(aligned, driving) == pytest.approx(1 / SCALE, rel=0.08)


def test_a_body_that_differs_only_in_size_and_place_is_aligned_exactly():
    still = np.repeat(dancer(0)[:1], NUM_FRAMES, axis=0)
    driving = still.copy()
    driving[..., :2] = 0.1 + SCALE * still[..., :2]
    driving[np.ix_(range(12), LEGS, [2])] = 0.0  # joints that half of the frames do not show change nothing
    aligned = align_keypoints(sequence(driving), sequence(still[:1]))
    np.testing.assert_allclose(aligned[..., :2], still[..., :2], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(aligned[..., 2], driving[..., 2])


def test_frames_that_share_too_few_joints_with_the_reference_do_not_count():
    points = dancer(1)
    driving = smaller_and_walking(points, legs_show=range(24))
    changed = driving.copy()
    changed[5:9, :18, 2] = 0.0
    changed[5:9, :3, 2] = 1.0  # three joints, and far off
    changed[5:9, :3, :2] *= 3.0
    kept = np.delete(driving, range(5, 9), axis=0)
    expected = align_keypoints(sequence(kept), sequence(points[:1]))
    found = np.delete(align_keypoints(sequence(changed), sequence(points[:1])), range(5, 9), axis=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_joints_that_are_never_seen_together_are_refused():
    points = dancer(2)
    driving = points.copy()
    driving[:, :18, 2] = 0.0
    for frame in range(NUM_FRAMES):  # every joint is visible in some frame, but never four at once
        driving[frame, [frame % 18, (frame + 1) % 18, (frame + 2) % 18], 2] = 1.0
    with pytest.raises(AlignmentError, match=r"no frame .* more than 3 of the body joints .*, 4 are needed"):
        align_keypoints(sequence(driving), sequence(points[:1]))
