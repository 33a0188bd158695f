"""The three pipelines with tiny random networks, for the tests of sampling and inference."""

import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from torch import nn

from dreamdance.diffusion.noise import make_ddim_scheduler, make_ddpm_scheduler, make_svd_scheduler
from dreamdance.models import (
    CrossDomainControllerModel,
    GeometryUNetModel,
    ImageEmbeddingStandIn,
    PatchAutoencoder,
    PoseEncoderModel,
    ReferenceUNetModel,
    SpatioTemporalControlNetModel,
)
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from support.recipes import EMBEDDING_WIDTH, PATCH_SIZE, tiny_svd_config, tiny_unet_config


def tiny_geometry_pipeline(
    *, temporal_attention: bool = True, prediction_type: str = "sample", seed: int = 0
) -> GeometryPipeline:
    """Stage 1 for pictures of 16x24 pixels; weights that are initialised to zero have random values."""
    torch.manual_seed(seed)
    base = UNet2DConditionModel(**tiny_unet_config())
    unet = GeometryUNetModel.from_unet2d(
        base, geometry_attention=True, temporal_attention=temporal_attention, max_frames=16
    )
    pose_encoder = PoseEncoderModel(out_channels=16, channels=(8, 16), downscale_factor=PATCH_SIZE)
    fill_zero_parameters(unet)
    fill_zero_parameters(pose_encoder)
    noise_scheduler = make_ddpm_scheduler(
        prediction_type=prediction_type, zero_terminal_snr=prediction_type != "epsilon"
    )
    pipeline = GeometryPipeline(
        reference_unet=ReferenceUNetModel.from_unet2d(base),
        unet=unet,
        pose_encoder=pose_encoder,
        vae=PatchAutoencoder(PATCH_SIZE),
        image_encoder=ImageEmbeddingStandIn(EMBEDDING_WIDTH),
        scheduler=make_ddim_scheduler(noise_scheduler),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_animation_pipeline(
    *, controls: tuple[str, ...] = ("pose", "depth", "normal"), perturbed: bool = True, seed: int = 0
) -> AnimationPipeline:
    """Stage 2 for pictures of 16x24 pixels; `perturbed` replaces weights that are zero by random values."""
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(**tiny_svd_config())
    controller = CrossDomainControllerModel(
        controls=controls,
        out_channels=unet.config.block_out_channels[0],
        channels=(8, 16),
        head_width=16,
        downscale_factor=PATCH_SIZE,
    )
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    if perturbed:
        fill_zero_parameters(controller)
        fill_zero_parameters(controlnet)
    pipeline = AnimationPipeline(
        unet=unet,
        controlnet=controlnet,
        controller=controller,
        vae=PatchAutoencoder(PATCH_SIZE),
        image_encoder=ImageEmbeddingStandIn(EMBEDDING_WIDTH),
        scheduler=make_svd_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def fill_zero_parameters(network: nn.Module, std: float = 0.1) -> None:
    """Gives small random values to parameters that are all zero, such as zero-initialised projections."""
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=std)


def random_pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform values in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
