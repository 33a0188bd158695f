"""Latents of all three autoencoders: targets are scaled, conditions are not, and decoding in chunks mixes no clips."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dreamdance.models import PatchAutoencoder
from dreamdance.models.autoencoding import Autoencoder, decode_latents, downscale_factor, encode_latents
from dreamdance.training.activation_memory import LiveBytes

WIDTHS = {"block_out_channels": (32, 32), "latent_channels": 4}


def image_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, **WIDTHS).eval()


def video_autoencoder() -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(0)
    return AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, **WIDTHS).eval()


AUTOENCODERS = pytest.mark.parametrize(
    "make", [image_autoencoder, video_autoencoder, lambda: PatchAutoencoder(2)], ids=["image", "video", "patch"]
)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@AUTOENCODERS
def test_targets_are_scaled_and_conditions_are_the_bare_mode(make):
    vae: Autoencoder = make()
    with torch.no_grad():
        mode = vae.encode(images() * 2 - 1).latent_dist.mode()
    assert torch.equal(encode_latents(vae, images(), scaled=False), mode)
    assert torch.equal(encode_latents(vae, images()), mode * vae.config.scaling_factor)
    assert vae.config.scaling_factor != 1


@AUTOENCODERS
def test_encoding_in_chunks_is_encoding(make):
    vae: Autoencoder = make()
    whole = encode_latents(vae, images())
    torch.testing.assert_close(encode_latents(vae, images(), chunk_size=3), whole, rtol=1e-5, atol=1e-6)


@AUTOENCODERS
def test_the_size_of_latents_is_the_downscale_factor_s(make):
    vae: Autoencoder = make()
    factor = downscale_factor(vae)
    assert factor == 2
    assert encode_latents(vae, images()).shape[-2:] == (8 // factor, 12 // factor)


@AUTOENCODERS
def test_decoding_undoes_the_scaling_and_gives_pictures_in_range(make):
    vae: Autoencoder = make()
    latents = encode_latents(vae, images())
    frames = {"num_frames": 4} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor, **frames).sample
    decoded = decode_latents(vae, latents, chunk_size=4)
    assert torch.equal(decoded, (expected / 2 + 0.5).clamp(0, 1))
    assert decode_latents(vae, 100 * latents).max() <= 1
    assert decode_latents(vae, 100 * latents).min() >= 0


def test_the_patch_autoencoder_gives_the_very_pictures_back():
    vae = PatchAutoencoder(2)
    torch.testing.assert_close(decode_latents(vae, encode_latents(vae, images())), images(), rtol=0, atol=2**-23)


def test_the_video_decoder_sees_each_chunk_as_its_own_frames_and_never_two_clips():
    vae = video_autoencoder()
    latents = encode_latents(vae, images(6))
    clips = [decode_latents(vae, clip, chunk_size=2) for clip in latents.split(3)]
    together = decode_latents(vae, latents, chunk_size=2, num_frames=3)
    assert torch.equal(together, torch.cat(clips))
    # frames do mix in its decoder: without the clips' length the chunks would have run across them
    assert not torch.equal(together, decode_latents(vae, latents, chunk_size=2))


@AUTOENCODERS
def test_nothing_here_is_recorded_for_a_backward_pass(make):
    vae: Autoencoder = make()
    latents = encode_latents(vae, images().requires_grad_())
    assert not latents.requires_grad
    assert not decode_latents(vae, latents.requires_grad_()).requires_grad


def test_latents_have_the_type_of_the_autoencoder_and_pictures_are_float32():
    vae = image_autoencoder().to(torch.bfloat16)
    latents = encode_latents(vae, images())
    assert latents.dtype == torch.bfloat16
    assert decode_latents(vae, latents.float()).dtype == torch.float32


@pytest.mark.parametrize(("chunk_size", "num_frames"), [(0, 4), (2, 3), (2, 0)])
def test_frames_that_are_no_whole_number_of_clips_are_refused(chunk_size, num_frames):
    vae = PatchAutoencoder(2)
    with pytest.raises(ValueError, match="decode_chunk_size"):
        decode_latents(vae, encode_latents(vae, images()), chunk_size=chunk_size, num_frames=num_frames)


class _GpuBytes(LiveBytes):
    """Counts what lies on a GPU alone; fake tensors need none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                self._meet(value.untyped_storage())
        return result


def test_a_long_clip_takes_no_more_of_the_device_than_one_chunk():
    def peak(num_frames: int) -> int:
        vae = image_autoencoder()  # the video decoder indexes tensors, which fake ones on a GPU cannot without CUDA
        with FakeTensorMode(allow_non_fake_inputs=True):
            vae.to_empty(device="cuda")
            latents = torch.empty(num_frames, 4, 16, 16, device="cuda")
            with _GpuBytes() as live:
                frames = decode_latents(vae, latents, chunk_size=4)
        assert frames.shape == (num_frames, 3, 32, 32)
        assert frames.device.type == "cpu"
        return live.peak

    latent_bytes = 4 * 16 * 16 * 4  # of one frame; the latents themselves, unscaled, stay together
    assert peak(40) == peak(8) + 32 * latent_bytes
