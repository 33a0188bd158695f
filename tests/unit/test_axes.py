"""The comparison of a clip's normals with its depth, on rendered dancers whose maps are exact."""

from itertools import product

import cv2
import numpy as np
import pytest

from dreamdance.annotators.axes import AxesError, check_axes, geometry_consistency
from dreamdance.annotators.protocols import Depths
from dreamdance.dancers.render import DancerClip, render_clip

SIGNS = [signs for signs in product((1, -1), repeat=3) if signs != (1, 1, 1)]
HELD_OUT = 1_000_000_000


@pytest.fixture(scope="module")
def clip() -> DancerClip:
    return render_clip(HELD_OUT, num_frames=2, width=128, height=192)


def coarse_disparity(clip: DancerClip) -> Depths:
    """What a small network sees: a quarter of the resolution, an unknown scale and shift."""
    small = [cv2.resize(frame, (32, 48), interpolation=cv2.INTER_AREA) for frame in 1 / clip.depth]
    return Depths(np.stack([5 * cv2.resize(frame, (128, 192)) - 3 for frame in small]), "disparity")


def exact_depth(clip: DancerClip) -> Depths:
    return Depths(clip.depth, "depth")


def test_true_normals_agree_with_the_true_depth(clip):
    assert geometry_consistency(clip.normal, exact_depth(clip), clip.mask) < 5
    assert check_axes(clip.normal, exact_depth(clip), clip.mask) < 5


def test_the_unit_of_depth_and_the_scale_and_shift_of_disparity_do_not_count(clip):
    in_metres = geometry_consistency(clip.normal, exact_depth(clip), clip.mask)
    in_millimetres = geometry_consistency(clip.normal, Depths(clip.depth * 1000, "depth"), clip.mask)
    assert in_millimetres == pytest.approx(in_metres, abs=0.01)
    disparity = geometry_consistency(clip.normal, Depths(7 / clip.depth - 2, "disparity"), clip.mask)
    assert disparity == pytest.approx(in_metres, abs=0.5)


def test_normals_that_are_turned_by_a_known_angle_score_that_angle(clip):
    turn = np.radians(30)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    plane = np.broadcast_to(rotation @ [np.sin(0.5), 0.0, np.cos(0.5)], (1, 40, 40, 3))
    rising = -np.tan(0.5) * np.mgrid[:40, :40][1][None].astype(float)
    score = geometry_consistency(plane, Depths(rising, "disparity"), np.ones((1, 40, 40)))
    expected = np.degrees(np.arccos(np.cos(0.5) ** 2 + np.sin(0.5) ** 2 * np.cos(turn)))
    assert score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("depths", [exact_depth, coarse_disparity])
@pytest.mark.parametrize("signs", SIGNS)
def test_every_wrong_sign_is_refused_by_the_name_of_its_axis(clip, signs, depths):
    check_axes(clip.normal, depths(clip), clip.mask)
    with pytest.raises(AxesError) as caught:
        check_axes(clip.normal * np.array(signs), depths(clip), clip.mask, names=("marigold", "depth_anything"))
    text = str(caught.value)
    for name, sign in zip(("x (right)", "y (up)", "z (towards the camera)"), signs, strict=True):
        assert (name in text.split("degrees, but")[1].split(" of the normals")[0]) == (sign < 0)
    assert "marigold" in text
    assert "depth_anything" in text


def test_a_depth_with_near_and_far_exchanged_is_refused_and_named(clip):
    with pytest.raises(AxesError, match="near and far exchanged"):
        check_axes(clip.normal, Depths(clip.depth, "disparity"), clip.mask)


@pytest.mark.parametrize("seed", range(4))
def test_a_depth_that_agrees_with_no_axes_is_no_reason_to_refuse_the_normals(clip, seed):
    noise = np.random.default_rng(seed).normal(size=clip.depth.shape)
    blobs = Depths(np.stack([cv2.GaussianBlur(frame, (0, 0), 12) for frame in noise]), "disparity")
    assert check_axes(clip.normal, blobs, clip.mask) > 36


def test_what_lies_outside_of_the_person_does_not_count(clip):
    inside = clip.mask[..., None]
    normals = np.where(inside, clip.normal, [0.0, 0.0, -1.0])
    depths = Depths(np.where(clip.mask, clip.depth, -1.0), "depth")
    expected = geometry_consistency(clip.normal, exact_depth(clip), clip.mask)
    assert geometry_consistency(normals, depths, clip.mask.astype(np.float32)) == pytest.approx(expected)


def test_the_outline_of_the_person_is_no_surface():
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[:, 10:30, 10:30] = True
    rising = 1 - np.tan(0.5) * (np.mgrid[:40, :40][1][None] - 20.0)
    plane = np.broadcast_to([np.sin(0.5), 0.0, np.cos(0.5)], (1, 40, 40, 3))
    assert geometry_consistency(plane, Depths(rising, "disparity"), mask) < 1e-6


def test_without_pixels_or_without_relief_there_is_no_score(clip):
    nobody = np.zeros_like(clip.mask)
    assert np.isnan(geometry_consistency(clip.normal, exact_depth(clip), nobody))
    flat = Depths(np.full_like(clip.depth, 2.0), "depth")
    assert np.isnan(check_axes(clip.normal, flat, clip.mask))


def test_a_depth_that_is_not_positive_inside_the_person_is_refused(clip):
    with pytest.raises(ValueError, match="positive inside the mask"):
        geometry_consistency(clip.normal, Depths(-clip.depth, "depth"), clip.mask)
