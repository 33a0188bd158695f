"""The maps of a clip in their stored encodings, and what opening annotators refuses."""

import numpy as np
import pytest
from support.exact_annotator import ExactAnnotator

from dreamdance.annotators.axes import AxesCheck, AxesError
from dreamdance.annotators.protocols import Depths
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.clip_maps import decode_depths, encode_depths
from dreamdance.data.annotation.networks import open_networks
from dreamdance.errors import MissingInputError
from dreamdance.recipe.annotator_section import Annotators


class Uncertain(ExactAnnotator):
    """Finds no landmarks; the person fills the picture and is flat."""

    finds_landmarks = False
    sees_background = True

    def annotate_mask(self, rgb, poses):
        return np.ones(rgb.shape[:3], np.float32)

    def annotate_normal(self, rgb, poses, mask):
        return np.broadcast_to(np.float32([0, 0, 1]), rgb.shape)

    def annotate_depth(self, rgb, poses, mask):
        return Depths(np.ones(rgb.shape[:3], np.float32), "depth")


@pytest.fixture(scope="module")
def dancer():
    return render_clip(HELD_OUT_SEEDS[30], num_frames=2, width=96, height=144, fps=2.0)


@pytest.mark.parametrize("outlier", [0.01, 1e6])
def test_one_wrong_pixel_does_not_take_the_range_of_depth(dancer, outlier):
    depth = dancer.depth.copy()
    place = tuple(np.argwhere(dancer.mask)[100])
    depth[place] = outlier
    encoded, (low, high) = encode_depths(Depths(depth, "depth"), dancer.mask)
    decoded = decode_depths(encoded, low, high, metric=True).values
    others = dancer.mask.copy()
    others[place] = False
    error = np.abs(decoded / dancer.depth - 1)[others]
    assert np.quantile(error, 0.99) < 1e-3
    assert error.max() < 0.1  # the clipped ones
    assert (encoded[~dancer.mask] == 0).all()
    assert encoded[place] == 65535 or 0 < encoded[place] < encoded[others].min()


def test_disparities_without_a_unit_keep_their_differences(dancer):
    disparity = np.random.default_rng(0).normal(size=dancer.depth.shape).astype(np.float32)
    encoded, (low, high) = encode_depths(Depths(disparity, "disparity"), None)
    decoded = decode_depths(encoded, low, high, metric=False)
    assert decoded.kind == "disparity"
    inside = (disparity > low) & (disparity < high)
    assert inside.mean() > 0.99
    np.testing.assert_allclose(decoded.values[inside], disparity[inside], atol=1e-4)


def test_the_first_clips_decide_about_the_axes_together_and_later_ones_not_at_all(dancer):
    depths, turned = Depths(dancer.depth, "depth"), dancer.normal * np.float32([-1, 1, 1])
    first = AxesCheck(("a", "b"))
    with pytest.raises(AxesError, match=r"x \(right\)"):
        first.add(turned, depths, dancer.mask)
    check = AxesCheck(("a", "b"), num_clips=3)
    for _ in range(2):
        check.add(dancer.normal, depths, dancer.mask)
    assert check.add(turned, depths, dancer.mask) > 5  # the mean of three clips
    for _ in range(5):
        check.add(turned, depths, dancer.mask)


def test_body_with_poses_that_have_no_landmarks_is_refused_when_networks_are_opened():
    name = f"{__name__}:Uncertain"
    with pytest.raises(MissingInputError, match=r"`videos\.annotators\.depth` is body.*`videos\.annotators\.pose` is"):
        open_networks(Annotators(pose=name, mask=name, depth="body", normal=name))


def test_errors_of_an_annotator_name_its_key():
    name = f"{__name__}:Uncertain"
    with pytest.raises(MissingInputError, match=r"`videos\.annotators\.mask`: there is no annotator 'nobody'"):
        open_networks(Annotators(pose=name, mask="nobody"))


def test_an_annotator_of_the_user_is_known_by_its_source():
    name = f"{__name__}:Uncertain"
    networks = open_networks(Annotators(pose=name, mask=name, depth=name, normal=name))
    assert len(networks.identity("depth")["source"]) == 64
    assert "source" not in networks.identity("cuts")
