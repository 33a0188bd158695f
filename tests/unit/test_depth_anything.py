"""Depth Anything V2 from a folder of transformers: a tiny random network, against transformers' own pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_annotators import save_depth_anything
from support.true_networks import save_true_depth_anything
from transformers import pipeline

from dreamdance.annotators.depth_anything import DepthAnything
from dreamdance.annotators.protocols import DepthAnnotator, PersonPoses
from dreamdance.dancers.render import render_clip
from dreamdance.errors import MissingInputError, UserError
from dreamdance.media.surfaces import align_disparity

NOBODY = PersonPoses(np.zeros((5, 128, 3), np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_anything(tmp_path_factory.mktemp("depth_anything") / "relative")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return render_clip(3, num_frames=5, width=70, height=105).rgb


def official(folder: Path, frames: np.ndarray) -> np.ndarray:
    """What transformers' pipeline finds in the same pictures, read by Pillow."""
    estimate = pipeline("depth-estimation", model=str(folder), use_fast=False)
    found = [estimate(Image.fromarray(frame))["predicted_depth"] for frame in frames]
    return np.stack([values.numpy() for values in found])


@pytest.mark.usefixtures("one_thread")
def test_disparity_is_that_of_transformers_up_to_one_scale_and_shift_per_frame(folder, frames):
    depths = DepthAnything(folder, frames_at_once=2).annotate_depth(frames, NOBODY, np.ones(frames.shape[:3]))
    assert depths.kind == "disparity"
    assert depths.values.shape == frames.shape[:3]
    expected = official(folder, frames)
    assert expected.std() > 1e-3
    for values, truth in zip(depths.values, expected, strict=True):
        scale, shift = align_disparity(values, truth)
        assert scale > 0  # larger stays nearer
        np.testing.assert_allclose(scale * values + shift, truth, atol=1e-3 * np.ptp(truth))
    swapped = official(folder, frames[..., ::-1])
    assert np.abs(swapped - expected).max() > 0.05 * np.ptp(expected)  # the comparison notices an exchange of colours


@pytest.mark.usefixtures("one_thread")
def test_a_metric_network_returns_distances(tmp_path, frames):
    folder = save_depth_anything(tmp_path / "metric", "metric")
    depths = DepthAnything(folder).annotate_depth(frames, NOBODY, np.ones(frames.shape[:3]))
    assert depths.kind == "depth"
    np.testing.assert_allclose(depths.values, official(folder, frames), rtol=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_the_true_depth_of_a_dancer_comes_back_near_and_far_in_their_places(tmp_path, kind):
    """In the network's convention: a relative one returns what is larger where it is nearer, a metric one metres."""
    clip = render_clip(1_000_000_003, num_frames=2, width=196, height=280)
    depth = np.where(clip.mask, clip.depth, 8.0)
    encoded = 2 / depth if kind == "relative" else (np.log(depth / (20 - depth)) + 2) / 4
    picture = np.zeros((*depth.shape, 3), np.uint8)
    picture[..., 2] = np.round(255 * encoded)
    annotator = DepthAnything(save_true_depth_anything(tmp_path / kind, kind))
    found = annotator.annotate_depth(picture, NOBODY, clip.mask.astype(np.float32))
    patches = [Image.fromarray(frame).reduce(14).resize((196, 280), Image.Resampling.BILINEAR) for frame in encoded]
    expected = np.stack([np.asarray(patch) for patch in patches])
    if kind == "relative":
        assert found.kind == "disparity"
        # The network enlarges its patches such that the corners stay, which moves values by up to half a patch.
        assert np.corrcoef(found.values.ravel(), expected.ravel())[0, 1] > 0.95
        for turned in (expected[:, ::-1], expected[:, :, ::-1]):
            assert np.corrcoef(found.values.ravel(), turned.ravel())[0, 1] < 0.9
        scale, _ = align_disparity(found.values[clip.mask], 1 / depth[clip.mask])
        assert scale > 0
    else:
        assert found.kind == "depth"
        metres = 20 / (1 + np.exp(2 - 4 * expected))
        assert np.median(np.abs(found.values / metres - 1)) < 0.02
        assert found.values[clip.mask].mean() < 6.0 < found.values[~clip.mask].mean() < 8.1


def test_the_files_are_recorded_with_hashes_and_the_licence_of_the_size(folder, tmp_path):
    annotator = DepthAnything(folder)
    assert isinstance(annotator, DepthAnnotator)
    assert annotator.sees_background
    assert [file.file for file in annotator.networks] == [
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]
    assert all(len(file.sha256) == 64 for file in annotator.networks)
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps({"backbone_config": {"hidden_size": 1024}}))
    with pytest.raises(MissingInputError, match=r"model.safetensors: .* CC-BY-NC-4.0\); get them from https://hugg"):
        DepthAnything(large)


def test_another_network_an_unknown_device_and_an_unknown_type_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "preprocessor_config.json"):
        (other / name).symlink_to(folder / name)
    (other / "config.json").write_text('{"model_type": "dpt"}')
    with pytest.raises(UserError, match=r"model_type is 'dpt', but Depth Anything V2 has 'depth_anything'"):
        DepthAnything(other)
    with pytest.raises(UserError, match=r"device 'toaster'.*accepted are 'cpu', 'cuda'"):
        DepthAnything(folder, device="toaster")
    with pytest.raises(UserError, match=r"dtype 'int8'.*float32, bfloat16, float16"):
        DepthAnything(folder, dtype="int8")
