"""Networks in the formats of Marigold and Depth Anything V2 that return the maps which a picture holds.

All layers stand still, except those that carry the picture through. A group or layer normalisation sees each value x as
x, -x, K, -K with a large K: then mean and deviation are known, and scale and shift undo them.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, MarigoldNormalsPipeline, UNet2DConditionModel
from torch import nn
from transformers import DepthAnythingForDepthEstimation, DPTImageProcessor

from support.tiny_annotators import save_depth_anything, save_marigold

_LARGE = 1000.0
_SHIFT = 20.0  # x + 20 passes SiLU and ReLU unchanged


def _clear(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.zero_()


def _spread(layer: nn.Conv2d, num_values: int) -> None:
    """Makes x, -x, K, -K of each of the first values, in the middle of the kernel."""
    middle = tuple(side // 2 for side in layer.kernel_size)
    assert layer.bias is not None
    for value in range(num_values):
        layer.weight[(4 * value, value, *middle)], layer.weight[(4 * value + 1, value, *middle)] = 1.0, -1.0
        layer.bias[4 * value + 2], layer.bias[4 * value + 3] = _LARGE, -_LARGE


def _gather(norm: nn.GroupNorm, layer: nn.Conv2d, num_values: int, sign: float = 1.0) -> None:
    """Undoes `_spread` before and after SiLU."""
    norm.weight.fill_(_LARGE / 2**0.5)
    norm.bias.fill_(_SHIFT)
    assert layer.bias is not None
    for value in range(num_values):
        layer.weight[value, 4 * value, 1, 1] = sign
        layer.bias[value] = -sign * _SHIFT


@torch.no_grad()
def save_true_marigold(folder: Path) -> Path:
    """A pipeline whose normals are the picture in [-1,1], made by one step of denoising."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = MarigoldNormalsPipeline.from_pretrained(save_marigold(folder / "random"))
    blocks = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(latent_channels=4, scaling_factor=0.5, **blocks)
    unet = UNet2DConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=8,
        **blocks,
    )
    _clear(vae)
    _clear(unet)
    _spread(vae.encoder.conv_in, 3)
    _gather(vae.encoder.conv_norm_out, vae.encoder.conv_out, 3)
    for layer in (vae.quant_conv, vae.post_quant_conv):
        for value in range(layer.weight.shape[0]):
            layer.weight[value, value] = 1.0
    _spread(vae.decoder.conv_in, 3)
    _gather(vae.decoder.conv_norm_out, vae.decoder.conv_out, 3)
    _spread(unet.conv_in, 4)
    for resnet in unet.up_blocks[0].resnets:  # of both inputs, that of the block and not that of the shortcut
        for channel in range(16):
            resnet.conv_shortcut.weight[channel, channel] = 1.0
    # At the first step, with no signal left, the prediction of v is the negated result.
    _gather(unet.conv_norm_out, unet.conv_out, 4, sign=-1.0)
    pipeline.register_modules(vae=vae, unet=unet)
    pipeline.vae_scale_factor = 1
    pipeline.save_pretrained(folder / "true", safe_serialization=True)
    return folder / "true"


@torch.no_grad()
def save_true_depth_anything(folder: Path, kind: str = "relative") -> Path:
    """A network that returns the mean of a picture's blue, in [0,1], over 14 x 14 pixels; the metric kind the depth
    20 / (1 + exp(2 - 4 blue)). For pictures of about 280 pixels.
    """
    path = save_depth_anything(folder, kind)
    network = DepthAnythingForDepthEstimation.from_pretrained(path)
    _clear(network)
    embeddings, norm = network.backbone.embeddings.patch_embeddings.projection, network.backbone.layernorm
    # of colours from which ImageNet's mean was taken and that were divided by its deviation
    embeddings.weight[0, 2], embeddings.bias[0] = 0.225 / 14**2, 0.406
    embeddings.weight[1, 2], embeddings.bias[1] = -0.225 / 14**2, -0.406
    embeddings.bias[2], embeddings.bias[3] = _LARGE, -_LARGE
    norm.weight.fill_(_LARGE * (2 / norm.weight.numel()) ** 0.5)
    reassembled = network.neck.reassemble_stage.layers[2]  # neither enlarged nor reduced
    reassembled.projection.weight[0, 0] = 1.0
    network.neck.convs[2].weight[0, 0, 1, 1] = 1.0
    for layer in network.neck.fusion_stage.layers:
        layer.projection.weight[0, 0] = 1.0
    head = network.head
    head.conv1.weight[0, 0, 1, 1] = head.conv2.weight[0, 0, 1, 1] = 1.0
    head.conv3.weight[0, 0], head.conv3.bias[0] = (4.0, -2.0) if kind == "metric" else (1.0, 0.0)
    network.save_pretrained(path, safe_serialization=True)
    DPTImageProcessor.from_pretrained(path, size={"height": 280, "width": 280}).save_pretrained(path)
    return path
