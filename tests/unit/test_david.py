"""DAViD's networks, replaced by graphs of the same form that read the truth of a rendered dancer from the picture."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.onnx_graphs import require_onnx, save_david

from dreamdance.annotators.axes import AxesError, check_axes
from dreamdance.annotators.david import DEPTH, MULTI_TASK, SEPARATE, David
from dreamdance.annotators.opening import open_annotator
from dreamdance.annotators.protocols import DepthAnnotator, MaskAnnotator, NormalAnnotator, PersonPoses
from dreamdance.dancers.render import DancerClip, render_clip
from dreamdance.errors import MissingInputError
from dreamdance.media.surfaces import align_disparity, angles, erode

ALL_TASKS = (replace(MULTI_TASK, sha256=None),)
THREE = tuple(replace(file, sha256=None) for file in SEPARATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_onnx()
    folder = tmp_path_factory.mktemp("david")
    save_david(folder / MULTI_TASK.file, ("depth", "normal", "foreground"), near_is_large=False)
    for file, task in zip(SEPARATE, ("depth", "normal", "foreground"), strict=True):
        save_david(folder / file.file, (task,), near_is_large=True)
    return folder


def picture_of_the_truth(clip: DancerClip) -> np.ndarray:
    """Red and green hold x and y of the normals, blue the disparity of the body; the background has no blue."""
    disparity = 1 / clip.depth
    low, high = disparity[clip.mask].min(), disparity[clip.mask].max()
    blue = np.where(clip.mask, 0.3 + 0.7 * (disparity - low) / (high - low), 0.0)
    normal = np.where(clip.mask[..., None], clip.normal, [0.0, 0.0, 1.0])
    colours = np.stack([(normal[..., 0] + 1) / 2, (normal[..., 1] + 1) / 2, blue], axis=-1)
    return np.round(255 * colours).astype(np.uint8)


@pytest.fixture(scope="module", params=[(97, 160), (161, 100), (128, 128)], ids=str)
def clip(request: pytest.FixtureRequest) -> DancerClip:
    width, height = request.param
    return render_clip(1_000_000_003, num_frames=2, width=width, height=height)


def poses_of(clip: DancerClip) -> PersonPoses:
    return PersonPoses(clip.keypoints)


def shifted(values: np.ndarray, down: int, right: int) -> np.ndarray:
    return np.roll(values, (down, right), axis=(1, 2))


@pytest.mark.parametrize("files", [ALL_TASKS, THREE], ids=["one file", "three files"])
def test_all_maps_of_a_dancer_come_back_in_our_axes_and_in_their_places(folder, clip, files):
    david, picture, poses = David(folder, files=files, num_threads=1), picture_of_the_truth(clip), poses_of(clip)
    mask = david.annotate_mask(picture, poses)
    depths = david.annotate_depth(picture, poses, mask)
    normals = david.annotate_normal(picture, poses, mask)
    assert (mask.dtype, depths.values.dtype, normals.dtype) == (np.float32,) * 3
    assert 0 <= mask.min() < 0.01 < 0.99 < mask.max() <= 1
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=1e-5)

    inside = erode(erode(clip.mask)) & (clip.normal[..., 2] > 0.5)
    assert angles(normals[inside], clip.normal[inside]).mean() < 1.5
    assert depths.kind == "disparity"
    truth = 1 / clip.depth
    scale, shift = align_disparity(depths.values[inside], truth[inside])
    assert scale > 0
    residual = scale * depths.values[inside] + shift - truth[inside]
    assert residual.std() < 0.1 * truth[inside].std()

    def error(down: int, right: int) -> float:
        """How much the mask differs from the truth when it is moved."""
        return float(np.abs(shifted(mask, down, right) - clip.mask).mean())

    moved = [error(down, right) for down, right in itertools.product((-1, 0, 1), repeat=2) if down or right]
    assert error(0, 0) < 0.05 * min(moved)
    assert check_axes(normals, depths, clip.mask) < 15


def test_the_network_for_all_tasks_runs_once_for_three_maps_and_again_for_other_frames(folder, clip):
    david, picture, poses = David(folder, files=ALL_TASKS, num_threads=1), picture_of_the_truth(clip), poses_of(clip)
    other = picture[::-1].copy()
    first = david.annotate_normal(picture, poses, clip.mask)
    np.testing.assert_array_equal(david.annotate_normal(other, poses, clip.mask), first[::-1])
    mask = david.annotate_mask(other, replace(poses, keypoints=poses.keypoints[::-1]))
    np.testing.assert_array_equal(david.annotate_mask(picture, poses), mask[::-1])
    np.testing.assert_array_equal(david.annotate_normal(picture, poses, clip.mask), first)


def test_a_depth_of_the_other_sign_is_noticed_and_can_be_stated(folder, clip):
    picture, poses = picture_of_the_truth(clip), poses_of(clip)
    wrong = David(folder, files=ALL_TASKS, num_threads=1, near_is_large=True)
    normals, depths = (method(picture, poses, clip.mask) for method in (wrong.annotate_normal, wrong.annotate_depth))
    with pytest.raises(AxesError, match="near and far exchanged"):
        check_axes(normals, depths, clip.mask)
    right = David(folder, files=ALL_TASKS, num_threads=1, near_is_large=False)
    assert check_axes(normals, right.annotate_depth(picture, poses, clip.mask), clip.mask) < 15


def test_another_person_in_the_picture_does_not_belong_to_the_mask(folder):
    picture = np.zeros((2, 90, 140, 3), np.uint8)
    picture[:, 20:70, 20:50, 2] = picture[:, 10:80, 90:120, 2] = 255
    keypoints = np.zeros((2, 128, 3), np.float32)
    keypoints[0, :, :] = (0.25, 0.5, 0.9)  # within the left one; the second frame has no person
    mask = David(folder, files=ALL_TASKS, num_threads=1).annotate_mask(picture, PersonPoses(keypoints))
    assert mask[0, 25:65, 25:45].min() == 1.0
    assert mask[0, :, 80:].max() == 0.0
    assert mask[1].max() == 0.0


def test_a_large_picture_is_reduced_and_comes_back_in_its_size(folder):
    height, width = 1700, 1300
    picture = np.zeros((1, height, width, 3), np.uint8)
    picture[0, ..., 2] = np.linspace(40, 240, width).round()
    everywhere = np.ones((1, height, width), np.float32)
    poses = PersonPoses(np.zeros((1, 128, 3), np.float32))
    depths = David(folder, files=THREE, num_threads=1).annotate_depth(picture, poses, everywhere)
    expected = 1 + 3 * np.linspace(40, 240, width) / 255
    assert np.abs(depths.values[0, 850, 20:-20] - expected[20:-20]).max() < 0.02


def test_the_depth_of_a_clip_has_one_scale_and_shift_whatever_those_of_its_frames_are(tmp_path, folder):
    """The network's disparity of every other frame is compressed, as by a network that sees single frames."""
    clip = render_clip(1_000_000_003, num_frames=4, width=96, height=144, fps=15.0)
    picture, poses = picture_of_the_truth(clip), poses_of(clip)
    blue = picture[1::2, ..., 2]
    picture[1::2, ..., 2] = np.where(blue > 0, 100 + 0.4 * blue, 0).round()
    david = David(folder, files=ALL_TASKS, num_threads=1)
    mask = clip.mask.astype(np.float32)
    found = david.annotate_depth(picture, poses, mask).values
    inside, truth = erode(erode(clip.mask)), 1 / clip.depth
    scale, shift = align_disparity(found[inside], truth[inside])
    assert (scale * found[inside] + shift - truth[inside]).std() < 0.3 * truth[inside].std()


def test_it_offers_three_maps_and_says_where_its_files_come_from(folder, tmp_path):
    david = David(folder, files=ALL_TASKS)
    assert isinstance(david, MaskAnnotator)
    assert isinstance(david, NormalAnnotator)
    assert isinstance(david, DepthAnnotator)
    assert not david.sees_background
    assert [(file.licence, len(file.sha256)) for file in david.networks] == [("MIT", 64)]
    with pytest.raises(MissingInputError, match=r"multi-task-model.*MIT.*https://github.com/microsoft/DAViD"):
        David(tmp_path)
    with pytest.raises(MissingInputError, match=f"have {DEPTH.sha256}"):
        David(folder, files=SEPARATE)
    (tmp_path / "david").mkdir()
    (tmp_path / "david" / SEPARATE[1].file).touch()
    with pytest.raises(MissingInputError, match=f"{DEPTH.file}: the weights of DAViD, depth"):
        open_annotator("david", weights=tmp_path)  # one of the three files is there: all three are wanted
    with pytest.raises(ValueError, match="not 2"):
        David(folder, files=THREE[:2])
