"""The pose encoder: sizes, its zero initialisation, and that it learns in spite of it."""

import pytest
import torch

from dreamdance.errors import UserError
from dreamdance.models import PoseEncoderModel


def draw_poses(height=32, width=16):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("downscale_factor", [1, 2, 4, 8])
def test_poses_come_out_at_latent_resolution_and_as_zeros(downscale_factor):
    encoder = PoseEncoderModel(20, channels=(4, 4, 6, 8), downscale_factor=downscale_factor)
    features = encoder(draw_poses())
    assert features.shape == (2, 20, 32 // downscale_factor, 16 // downscale_factor)
    assert not features.any()


def test_only_the_projection_learns_at_first_and_everything_once_it_has_moved():
    encoder = PoseEncoderModel(20, channels=(4, 8), downscale_factor=2)
    moving = []
    for _ in range(2):
        encoder.zero_grad()
        (encoder(draw_poses()) - 1).square().sum().backward()
        moving.append({name for name, parameter in encoder.named_parameters() if parameter.grad.any()})
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter -= 1e-3 * parameter.grad
    assert moving[0] == {"conv_out.weight", "conv_out.bias"}
    assert moving[1] == {name for name, _ in encoder.named_parameters()}


def test_a_drawing_moved_by_one_latent_moves_its_features_by_one():
    torch.manual_seed(0)
    encoder = PoseEncoderModel(20, channels=(4, 8), downscale_factor=2).double()
    torch.nn.init.normal_(encoder.conv_out.weight)
    pose = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    pose[..., 12:16, 12:16] = 1.0
    with torch.no_grad():
        features, moved = encoder(pose), encoder(pose.roll(2, dims=-1))
    inside = slice(4, -4)  # away from the padding of the border
    torch.testing.assert_close(moved.roll(-1, dims=-1)[..., inside, inside], features[..., inside, inside])


def test_a_saved_encoder_loads_unchanged(tmp_path):
    encoder = PoseEncoderModel(20, channels=(4, 8), downscale_factor=2)
    torch.nn.init.normal_(encoder.conv_out.weight)
    encoder.save_pretrained(tmp_path)
    loaded = PoseEncoderModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(draw_poses()), encoder(draw_poses()))


@pytest.mark.parametrize("downscale_factor", [0, 3, 16, -2])
def test_a_factor_that_the_widths_cannot_reach_is_refused(downscale_factor):
    with pytest.raises(UserError, match=rf"downscale_factor={downscale_factor} must be a power of two of at most 8"):
        PoseEncoderModel(20, downscale_factor=downscale_factor)


def test_pictures_that_the_factor_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"pose of \(12, 16\) pixels: both sides must be multiples of 8"):
        PoseEncoderModel(20)(draw_poses(height=12))


def test_at_full_size_it_is_light():
    with torch.device("meta"):
        encoder = PoseEncoderModel(320)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_086_480
