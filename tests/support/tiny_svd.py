"""Stable Video Diffusion small enough for tests: diffusers' real classes, random weights, two levels."""

import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.diffusion.noise import make_svd_scheduler

EMBEDDING_WIDTH = 16
LATENT_CHANNELS = 4


def tiny_svd_unet(seed: int = 0, latent_channels: int = LATENT_CHANNELS) -> UNetSpatioTemporalConditionModel:
    """A random SVD UNet (channels 32 and 64, heads of width 16) in evaluation mode."""
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=EMBEDDING_WIDTH,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    return unet.eval()


def tiny_svd_inputs(
    *, batch_size: int = 2, num_frames: int = 3, height: int = 8, width: int = 12, seed: int = 1
) -> dict[str, Tensor]:
    """Random inputs of `tiny_svd_unet`, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "sample": normal(batch_size, num_frames, 2 * LATENT_CHANNELS, height, width),
        "timestep": normal(batch_size),
        "encoder_hidden_states": normal(batch_size, 1, EMBEDDING_WIDTH),
        "added_time_ids": torch.tensor([[7.0, 127.0, 0.02], [5.0, 64.0, 0.1]]).repeat(batch_size, 1)[:batch_size],
    }


def tiny_svd_pipeline(size: int) -> StableVideoDiffusionPipeline:
    """diffusers' pipeline of `tiny_svd_unet`, a small autoencoder (factor 2) and a CLIP for `size` pixels."""
    unet = tiny_svd_unet()
    torch.manual_seed(1)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=LATENT_CHANNELS
    )
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=EMBEDDING_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=8,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        unet=unet,
        scheduler=make_svd_scheduler(),
        feature_extractor=CLIPImageProcessor(crop_size=size, size=size),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_close_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Checks that values differ by at most 1e-5 of the largest expected value, about 80 float32 roundings."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
