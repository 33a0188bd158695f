"""Marigold from a folder of diffusers: a tiny random pipeline, against diffusers' own calls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import MarigoldNormalsPipeline
from diffusers.pipelines.marigold import MarigoldImageProcessor
from PIL import Image
from support.tiny_annotators import save_marigold
from support.true_networks import save_true_marigold

from dreamdance.annotators.axes import check_axes
from dreamdance.annotators.marigold import Marigold
from dreamdance.annotators.protocols import Depths, NormalAnnotator, PersonPoses
from dreamdance.dancers.render import render_clip
from dreamdance.errors import MissingInputError, UserError
from dreamdance.media.surfaces import angles

NOBODY = PersonPoses(np.zeros((3, 128, 3), np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_marigold(tmp_path_factory.mktemp("marigold") / "normals")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return render_clip(3, num_frames=3, width=46, height=90).rgb


@pytest.mark.usefixtures("one_thread")
def test_normals_are_those_of_diffusers_guide_for_videos(folder, frames):
    """One noise for the clip; each frame starts from 9/10 of it and 1/10 of the last frame's latents."""
    normals = Marigold(folder, num_steps=2, seed=5).annotate_normal(frames, NOBODY, np.ones(frames.shape[:3]))
    assert normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=1e-5)

    pipe = MarigoldNormalsPipeline.from_pretrained(str(folder), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    # 90 x 46 pixels become 64 x 32 with padding, and the tiny autoencoder halves them once
    common, last = torch.randn((1, 4, 32, 16), generator=torch.Generator().manual_seed(5)), None
    expected = []
    for frame in frames:
        latents = common if last is None else 0.9 * common + 0.1 * last
        found = pipe(Image.fromarray(frame), num_inference_steps=2, latents=latents, output_latent=True)
        expected.append(found.prediction[0])
        last = found.latent
    np.testing.assert_allclose(normals, np.stack(expected), atol=1e-5)
    assert np.abs(expected[1] - expected[0]).max() > 1e-3


@pytest.mark.usefixtures("one_thread")
def test_the_true_normals_of_a_dancer_come_back_in_our_axes(tmp_path):
    """In the network's axes, which diffusers states: x to the right, y to the top, z facing the observer."""
    clip = render_clip(1_000_000_003, num_frames=2, width=70, height=105)
    normals = np.where(clip.mask[..., None], clip.normal, np.float32([0, 0, 1]))
    documented = torch.from_numpy(normals).permute(0, 3, 1, 2)
    picture = np.stack([np.asarray(one) for one in MarigoldImageProcessor.visualize_normals(documented)])
    annotator = Marigold(save_true_marigold(tmp_path), num_steps=1, resolution=0)
    found = annotator.annotate_normal(picture, NOBODY, clip.mask.astype(np.float32))
    assert angles(found, normals).max() < 1.0  # of 8 bits
    assert check_axes(found, Depths(clip.depth, "depth"), clip.mask) < 15


@pytest.mark.usefixtures("one_thread")
def test_the_same_seed_gives_the_same_normals_and_another_seed_others(folder, frames):
    mask = np.ones(frames.shape[:3])
    first, again, other = (
        Marigold(folder, num_steps=1, seed=seed).annotate_normal(frames[:1], NOBODY, mask[:1]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


@pytest.mark.usefixtures("one_thread")
def test_the_frames_own_size_can_be_asked_for(folder, frames):
    normals = Marigold(folder, num_steps=1, resolution=0).annotate_normal(frames[:1], NOBODY, np.ones((1, 90, 46)))
    assert normals.shape == (1, 90, 46, 3)


def test_its_files_are_recorded_and_another_pipeline_is_refused(folder, tmp_path):
    annotator = Marigold(folder)
    assert isinstance(annotator, NormalAnnotator)
    assert annotator.sees_background
    assert all(len(file.sha256) == 64 for file in annotator.networks)
    assert "unet/diffusion_pytorch_model.safetensors" in [file.file for file in annotator.networks]
    with pytest.raises(MissingInputError, match=r"model_index.json: the weights of Marigold.*https://huggingface.co"):
        Marigold(tmp_path)
    other = tmp_path / "depth"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).symlink_to(path)
    (other / "model_index.json").unlink()
    (other / "model_index.json").write_text('{"_class_name": "MarigoldDepthPipeline"}')
    with pytest.raises(UserError, match=r"_class_name is 'MarigoldDepthPipeline'"):
        Marigold(other)
