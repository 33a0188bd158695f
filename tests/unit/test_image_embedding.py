"""One token for the reference picture, from CLIP in its saved format or from the stand-in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.diffusion.noise import make_svd_scheduler
from dreamdance.errors import UserError
from dreamdance.media.transforms import pictures_to_tensor
from dreamdance.models import ImageEmbeddingStandIn
from dreamdance.models.image_embedding import embed_images, embedding_width, prepare_for_clip


@pytest.fixture
def clip(tmp_path) -> CLIPVisionModelWithProjection:
    """A tiny random CLIP vision tower, saved and loaded in the real format."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "image_encoder")
    return CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder").eval()


def images(height: int = 48, width: int = 40) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_clip_gives_its_pooled_projected_embedding_as_one_token(clip):
    square = images(32, 32)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False)
    pixels = processor(list(square), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = clip(pixels).image_embeds
    embedding = embed_images(clip, square)
    assert embedding.shape == (2, 1, 24)
    torch.testing.assert_close(embedding[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert embedding_width(clip) == 24


@pytest.mark.parametrize("size", [(768, 512), (224, 224), (96, 64), (300, 200)])
def test_stage_2_gives_clip_the_same_pixels_as_svd_s_pipeline(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    seen: list[torch.Tensor] = []
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    encoder.register_forward_pre_hook(lambda network, arguments: seen.append(arguments[0]))
    svd = StableVideoDiffusionPipeline(None, encoder, None, make_svd_scheduler(), CLIPImageProcessor())
    with torch.no_grad():
        svd._encode_image(picture, "cpu", 1, False)
        embed_images(encoder, pictures_to_tensor(np.asarray(picture)[None]), resizing="svd")
    theirs, ours = seen
    assert theirs.shape == (1, 3, 224, 224)
    assert torch.equal(ours, theirs)
    stage_1 = prepare_for_clip(pictures_to_tensor(np.asarray(picture)[None]), 224, resizing="clip")
    assert size == (224, 224) or (stage_1 - theirs).abs().max() > 0.05


def test_pictures_of_any_size_are_resized_without_aliasing(clip):
    # stripes too fine for the encoder become grey; without antialiasing every sample would hit a white one
    stripes = ((torch.arange(256) + 2) // 4 % 2).float().expand(1, 3, 256, 256)
    aliased = F.interpolate(stripes, size=(32, 32), mode="bicubic")
    assert aliased.mean() > 0.9
    grey = embed_images(clip, torch.full((1, 3, 256, 256), 0.5))
    assert (embed_images(clip, stripes) - grey).norm() < 0.3 * (embed_images(clip, aliased) - grey).norm()


def test_the_embedding_hardly_depends_on_the_size_of_the_picture(clip):
    small = images(8, 8)
    enlarged = [F.interpolate(small, size=size, mode="bicubic").clamp(0, 1) for size in ((64, 64), (128, 128))]
    first, second = (embed_images(clip, picture) for picture in enlarged)
    assert (first - second).norm() < 0.2 * (first[0] - first[1]).norm()


@pytest.mark.parametrize("width", [3, 16, 24, 200])
def test_the_stand_in_keeps_the_distances_between_grids_of_colours(width):
    stand_in = ImageEmbeddingStandIn(width)
    embedding = embed_images(stand_in, images())[:, 0]
    assert embedding.shape == (2, width) == (2, embedding_width(stand_in))
    colours = F.adaptive_avg_pool2d(images() * 2 - 1, stand_in.grid_size).flatten(1)
    torch.testing.assert_close(embedding @ embedding.T, colours @ colours.T, rtol=1e-4, atol=1e-5)


def test_the_stand_in_distinguishes_pictures_by_colour_and_by_place():
    stand_in = ImageEmbeddingStandIn(48)
    red, left = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    red[:, 0] = 0.5
    left[:, 0, :, :8] = 1.0
    embeddings = [embed_images(stand_in, picture) for picture in (red, left, left.flip(-1), red.flip(1))]
    for index, one in enumerate(embeddings):
        assert all((one - other).norm() > 0.5 for other in embeddings[index + 1 :])


def test_the_stand_in_is_the_same_every_time_and_has_nothing_to_train(tmp_path):
    torch.manual_seed(3)
    first = ImageEmbeddingStandIn(32)
    torch.manual_seed(4)
    assert torch.equal(first.projection, ImageEmbeddingStandIn(32).projection)
    assert not list(first.parameters())
    first.save_pretrained(tmp_path)
    loaded = ImageEmbeddingStandIn.from_pretrained(tmp_path)
    assert torch.equal(embed_images(loaded, images()), embed_images(first, images()))


def test_a_saved_projection_does_not_depend_on_the_linear_algebra_of_the_machine(tmp_path):
    stand_in = ImageEmbeddingStandIn(32)
    stand_in.projection.neg_()
    stand_in.save_pretrained(tmp_path)
    assert torch.equal(ImageEmbeddingStandIn.from_pretrained(tmp_path).projection, stand_in.projection)


def test_making_the_stand_in_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    ImageEmbeddingStandIn(32)
    assert torch.equal(torch.rand(1), expected)


def test_embeddings_have_no_gradient_and_the_type_of_the_encoder(clip):
    assert not embed_images(clip, images().requires_grad_()).requires_grad
    assert embed_images(ImageEmbeddingStandIn(16).to(torch.bfloat16), images()).dtype == torch.bfloat16
    assert embed_images(clip.to(torch.bfloat16), images()).dtype == torch.bfloat16


def test_a_width_that_holds_no_colour_is_refused():
    with pytest.raises(UserError, match=r"width is 2.*stand_in_width"):
        ImageEmbeddingStandIn(2)
