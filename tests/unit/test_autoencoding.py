"""Latents of all three autoencoders: targets are scaled, conditions are not, and decoding in chunks mixes no clips."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from dreamdance.models import PatchAutoencoder
from dreamdance.models.autoencoding import (
    Autoencoder,
    _plan_chunks,
    decode_latents,
    downscale_factor,
    encode_latents,
    keep_in_float32,
)
from dreamdance.training.planning.activation_memory import LiveBytes

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
        mode = torch.cat([vae.encode(image * 2 - 1).latent_dist.mode() for image in images().split(1)])
    assert torch.equal(encode_latents(vae, images(), scaled=False), mode)
    assert torch.equal(encode_latents(vae, images()), mode * vae.config.scaling_factor)
    assert vae.config.scaling_factor != 1


@AUTOENCODERS
def test_encoding_in_chunks_equals_encoding_at_once(make):
    vae: Autoencoder = make()
    whole = encode_latents(vae, images())
    torch.testing.assert_close(encode_latents(vae, images(), chunk_size=3), whole, rtol=1e-5, atol=1e-6)


@AUTOENCODERS
def test_the_downscale_factor_gives_the_size_of_latents(make):
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


def test_the_patch_autoencoder_reproduces_the_pictures_exactly():
    vae = PatchAutoencoder(2)
    torch.testing.assert_close(decode_latents(vae, encode_latents(vae, images())), images(), rtol=0, atol=2**-23)


def test_the_video_decoder_decodes_each_chunk_alone_and_never_mixes_clips():
    vae = video_autoencoder()
    latents = encode_latents(vae, images(6))
    clips = [decode_latents(vae, clip, chunk_size=2) for clip in latents.split(3)]
    together = decode_latents(vae, latents, chunk_size=2, num_frames=3)
    assert torch.equal(together, torch.cat(clips))
    # its decoder does mix frames: without the length of the clips the chunks would cross clips
    assert not torch.equal(together, decode_latents(vae, latents, chunk_size=2))


@AUTOENCODERS
def test_encoding_and_decoding_record_no_graph(make):
    vae: Autoencoder = make()
    latents = encode_latents(vae, images().requires_grad_())
    assert not latents.requires_grad
    assert not decode_latents(vae, latents.requires_grad_()).requires_grad


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@AUTOENCODERS
def test_an_autoencoder_of_half_precision_computes_in_float32(make):
    halved, exact = make().to(torch.bfloat16), make().to(torch.bfloat16).double()  # equal weights, those of bfloat16
    latents, exact_latents = encode_latents(halved, images()), encode_latents(exact, images())
    assert (latents.dtype, exact_latents.dtype) == (torch.float32, torch.float64)
    assert relative_error(latents, exact_latents) < 1e-6
    frames = decode_latents(halved, exact_latents.bfloat16())
    assert frames.dtype == torch.float32
    assert relative_error(frames, decode_latents(exact, exact_latents.bfloat16().double()).double()) < 1e-6


@AUTOENCODERS
def test_a_network_of_float32_keeps_its_values_through_a_cast(make):
    vae = make()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with keep_in_float32(vae):
        vae.bfloat16()
        assert vae.dtype == torch.bfloat16
    assert vae.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    with keep_in_float32(vae):
        vae.double()
    assert vae.dtype == torch.float64


def test_a_network_of_float32_keeps_its_values_when_the_cast_fails_midway():
    vae = image_autoencoder()
    before = {name: value.clone() for name, value in vae.state_dict().items()}

    def cast_in_part() -> None:
        with keep_in_float32(vae):
            vae.encoder.bfloat16()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cast_in_part()
    assert vae.encoder.conv_in.weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("make", [image_autoencoder, video_autoencoder], ids=["image", "video"])
def test_noise_draws_from_the_latent_distribution(make):
    vae = make()
    with torch.no_grad():
        distribution = vae.encode(images(1) * 2 - 1).latent_dist
    noise = torch.randn(1000, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    samples = encode_latents(vae, images(1).expand(1000, 3, 8, 12), scaled=False, noise=noise, chunk_size=500)
    z = (samples.mean(dim=0) - distribution.mean[0]) / (distribution.std[0] / math.sqrt(1000))
    assert z.abs().max() < 5  # 96 numbers
    ratio = samples.std(dim=0) / distribution.std[0]
    assert (ratio - 1).abs().max() < 5 / math.sqrt(2000)
    scaled = encode_latents(vae, images(1), noise=noise[:1])
    torch.testing.assert_close(scaled, samples[:1] * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_the_distribution_of_patches_is_a_point():
    vae = PatchAutoencoder(2)
    noise = torch.randn(4, 12, 4, 6)
    assert torch.equal(encode_latents(vae, images(), noise=noise), encode_latents(vae, images()))


def mixing_decoder(seed: int) -> AutoencoderKLTemporalDecoder:
    """A random video autoencoder of the published depth whose decoder weighs neighbouring frames by one half."""
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("mix_factor"):
            torch.nn.init.zeros_(parameter)
    return vae


@pytest.mark.parametrize("seed", [0, 1])
def test_chunks_that_overlap_are_nearer_to_decoding_all_frames_at_once(seed):
    vae = mixing_decoder(seed)
    latents = torch.randn(16, 4, 6, 4, generator=torch.Generator().manual_seed(seed)) * vae.config.scaling_factor / 4
    whole = decode_latents(vae, latents, chunk_size=16)
    chunks = torch.cat([decode_latents(vae, chunk, chunk_size=8) for chunk in latents.split(8)])
    overlapping = decode_latents(vae, latents, chunk_size=8)

    def worst(frames: torch.Tensor) -> tuple[float, float]:
        """The largest error of a frame, and of a change from one frame to the next, which shows seams."""
        error = frames - whole
        return tuple(float(part.square().mean(dim=(1, 2, 3)).max().sqrt()) for part in (error, error.diff(dim=0)))

    (frame, seam), (frame_before, seam_before) = worst(overlapping), worst(chunks)
    assert 0 < frame < 0.8 * frame_before
    assert 0 < seam < 0.8 * seam_before


@pytest.mark.parametrize(("chunk_size", "overlap"), [(1, 0), (2, 0), (3, 1), (5, 2), (8, 2)])
def test_chunks_cover_every_frame_and_neighbours_share_the_overlap(chunk_size, overlap):
    for num_frames in range(1, 40):
        chunks = _plan_chunks(num_frames, chunk_size, overlap)
        assert chunks[0].start == 0
        assert chunks[-1].stop == num_frames
        assert max(map(len, chunks)) <= chunk_size
        assert all(before.stop - after.start == overlap for before, after in pairwise(chunks))
        covering = [sum(frame in chunk for chunk in chunks) for frame in range(num_frames)]
        assert max(covering) <= 2


@pytest.mark.parametrize(("chunk_size", "num_frames"), [(0, 4), (2, 3), (2, 0)])
def test_frames_that_are_no_whole_number_of_clips_are_refused(chunk_size, num_frames):
    vae = PatchAutoencoder(2)
    with pytest.raises(ValueError, match="decode_chunk_size"):
        decode_latents(vae, encode_latents(vae, images()), chunk_size=chunk_size, num_frames=num_frames)


class _GpuBytes(LiveBytes):
    """Counts the memory on a GPU alone; fake tensors need no GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                self._count(value.untyped_storage())
        return result


def test_a_long_clip_uses_no_more_device_memory_than_one_chunk():
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

    latent_bytes = 4 * 16 * 16 * 4  # of one frame; the unscaled latents are not divided
    assert peak(40) == peak(8) + 32 * latent_bytes
