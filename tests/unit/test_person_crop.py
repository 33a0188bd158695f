"""The crop of a clip holds its person in every frame, has the stored aspect, and is never enlarged without need."""

import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.curation.person_crop import crop_person
from dreamdance.media.cropping import Crop

STORED = {"to_width": 100, "to_height": 150}


def points(*places: tuple[float, float], width: int, height: int) -> np.ndarray:
    """One frame whose first points lie at the given pixels; the others are not visible."""
    keypoints = np.zeros((1, 128, 3), np.float32)
    keypoints[0, :, :2] = 0.01
    for index, (x, y) in enumerate(places):
        keypoints[0, index] = x / width, y / height, 0.9
    return keypoints


def test_the_crop_moves_to_the_person_and_has_the_margin():
    """A box of 100 x 200 at (1200, 500); with 10 % of 200 on each side it is 140 x 240, so 160 x 240 at 2:3."""
    keypoints = points((1200, 500), (1300, 700), width=1920, height=1080)
    found = crop_person(keypoints, width=1920, height=1080, **STORED)
    assert found.follows
    assert found.crop == Crop(left=1170, top=480, width=160, height=240)


def test_all_frames_of_the_clip_share_one_crop():
    first = points((400, 300), (450, 600), width=1920, height=1080)
    last = points((900, 320), (960, 610), width=1920, height=1080)
    found = crop_person(np.concatenate([first, last]), width=1920, height=1080, margin=0.0, **STORED)
    assert (found.crop.left, found.crop.width, found.crop.height) == (400, 560, 840)


def test_a_small_person_is_not_enlarged():
    keypoints = points((50, 60), (60, 90), width=640, height=480)
    assert crop_person(keypoints, width=640, height=480, **STORED).crop == Crop(left=5, top=0, width=100, height=150)


def test_the_margin_gives_way_at_the_edges_of_the_frame():
    """Head and feet touch the frame; the full height is kept and the crop moves sideways only."""
    keypoints = points((1500, 2), (1600, 1078), width=1920, height=1080)
    found = crop_person(keypoints, width=1920, height=1080, **STORED)
    assert found.follows
    assert found.crop == Crop(left=1190, top=0, width=720, height=1080)


def test_the_mask_keeps_hair_that_no_joint_marks():
    keypoints = points((300, 200), (340, 500), width=640, height=960)
    mask = np.zeros((1, 96, 64))
    mask[0, 10:52, 28:36] = 1.0  # from row 100 of the frame
    found = crop_person(keypoints, mask, width=640, height=960, margin=0.0, **STORED)
    assert found.crop.top <= 100


def test_a_dance_that_is_too_wide_for_the_aspect_keeps_the_centre():
    keypoints = points((20, 500), (1900, 600), width=1920, height=1080)
    found = crop_person(keypoints, width=1920, height=1080, **STORED)
    assert not found.follows
    assert found.crop == Crop(left=600, top=0, width=720, height=1080)


def test_without_a_visible_joint_the_crop_is_the_centre():
    keypoints = points((10, 10), width=300, height=200)
    keypoints[..., 2] = 0.2
    found = crop_person(keypoints, width=300, height=200, **STORED)
    assert not found.follows
    assert found.crop == Crop(left=83, top=0, width=133, height=200)


def test_points_outside_the_frame_do_not_widen_the_crop():
    keypoints = points((1200, 500), (1300, 700), (-300, 600), width=1920, height=1080)
    assert crop_person(keypoints, width=1920, height=1080, **STORED).crop.width == 160


@pytest.mark.parametrize("seed", range(3))
def test_no_visible_joint_of_a_dancer_is_cut(seed):
    """Dancers in a wide frame; every visible key point of every frame lies in the crop, whose aspect is 5:6."""
    clip = render_clip(HELD_OUT_SEEDS[seed], num_frames=6, width=240, height=120)
    found = crop_person(clip.keypoints, clip.mask, width=240, height=120, to_width=40, to_height=48)
    assert found.follows
    crop = found.crop
    x, y, confidence = np.moveaxis(clip.keypoints, -1, 0) * np.array([240, 120, 1])[:, None, None]
    inside = (x >= crop.left) & (x <= crop.left + crop.width) & (y >= crop.top) & (y <= crop.top + crop.height)
    assert inside[confidence >= 0.3].all()
    assert abs(crop.height - crop.width * 1.2) <= 1
    assert 0 <= crop.left <= 240 - crop.width
    assert 0 <= crop.top <= 120 - crop.height
    assert crop.cut(clip.mask[..., None]).sum() == clip.mask.sum()


@pytest.mark.parametrize("change", [{"margin": -0.1}, {"to_width": 0}, {"width": 0}])
def test_wrong_sizes_are_refused(change):
    with pytest.raises(ValueError, match="cannot crop"):
        crop_person(points((1, 1), width=9, height=9), **{"width": 9, "height": 9, **STORED, **change})
