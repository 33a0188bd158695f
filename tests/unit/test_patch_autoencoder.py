"""The patch autoencoder is lossless and has the interface of AutoencoderKL."""

import pytest
import torch
from einops import rearrange

from dreamdance.errors import UserError
from dreamdance.models import PatchAutoencoder


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_round_trip_is_exact_scaling_included(patch_size, dtype):
    vae = PatchAutoencoder(patch_size)
    images = pictures(2, 3, 12, 24, dtype=dtype)
    scaled = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert scaled.shape == (2, 3 * patch_size**2, 12 // patch_size, 24 // patch_size)
    assert torch.equal(vae.decode(scaled / vae.config.scaling_factor).sample, images)
    assert torch.equal(vae(images).sample, images)


def test_a_latent_holds_the_pixels_of_its_own_patch():
    vae = PatchAutoencoder(2)
    images = pictures(1, 3, 6, 8)
    latents = vae.encode(images).latent_dist.mode()
    for row, column in ((0, 0), (2, 3)):
        patch = images[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(latents[0, :, row, column], rearrange(patch, "c p q -> (c p q)"))


def test_the_distribution_has_no_variance():
    distribution = PatchAutoencoder(2).encode(pictures(2, 3, 4, 4)).latent_dist
    assert torch.equal(distribution.sample(generator=torch.Generator().manual_seed(1)), distribution.mode())


def test_scaled_latents_of_typical_pictures_have_about_unit_variance():
    vae = PatchAutoencoder(2)
    assert vae.config.scaling_factor != 1
    ramp = torch.linspace(-1, 1, 64)
    shaded = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, -ramp.expand(64, 64)])[None]
    for images in (shaded, pictures(4, 3, 64, 64)):  # both uniform over the whole range
        variance = (vae.encode(images).latent_dist.mode() * vae.config.scaling_factor).var()
        assert 0.8 < variance < 1.6


def test_the_interface_is_that_of_the_diffusers_autoencoders():
    vae = PatchAutoencoder(4)
    images = pictures(2, 3, 8, 8)
    (distribution,) = vae.encode(images, return_dict=False)
    (decoded,) = vae.decode(distribution.mode(), num_frames=2, return_dict=False)
    assert torch.equal(decoded, images)
    assert vae.config.latent_channels == 48
    assert vae.downscale_factor == 4
    assert vae.to(torch.bfloat16).dtype == torch.bfloat16
    assert vae.device.type == "cpu"
    assert not list(vae.parameters())


def test_saving_and_loading_keeps_everything(tmp_path):
    PatchAutoencoder(2, scaling_factor=0.5).save_pretrained(tmp_path)
    loaded, report = PatchAutoencoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert (loaded.config.patch_size, loaded.config.scaling_factor, loaded.config.latent_channels) == (2, 0.5, 12)
    assert torch.equal(loaded(pictures(1, 3, 4, 6)).sample, pictures(1, 3, 4, 6))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"10x9.*patches of 4.*data\.width"):
        PatchAutoencoder(4).encode(pictures(1, 3, 9, 10))
    with pytest.raises(UserError, match="patch_size is 0"):
        PatchAutoencoder(0)
    with pytest.raises(UserError, match="latent_channels is 4"):
        PatchAutoencoder(2, latent_channels=4)
