"""Drives diffusers' SVD UNet in two halves: residuals can be added between them, the first can run without gradients.

diffusers' class takes no residuals. These functions call its modules in its order and add no weight and no layer. They
also drive the ControlNet, which is a copy of the encoder half.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from diffusers import UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import Tensor, nn

ENCODER_HALF = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
DECODER_HALF = ("up_blocks", "conv_norm_out", "conv_out")
# The key of a UNet's config that says what it was trained to predict; without it velocities, as SVD. diffusers keeps a
# key that begins with an underscore when it loads and saves, and does not pass it to the class.
PREDICTION_TYPE = "_prediction_type"


class EncoderHalf(NamedTuple):
    """Outputs of the encoder half, which the decoder half needs.

    Attributes:
        mid: `(b f) c h w`, the mid block's output.
        skips: `(b f) c h w` each, from shallow to deep.
        time_embedding: `(b f) c`.
        encoder_hidden_states: `(b f) 1 c`.
        image_only_indicator: `b f`, zeros.
    """

    mid: Tensor
    skips: tuple[Tensor, ...]
    time_embedding: Tensor
    encoder_hidden_states: Tensor
    image_only_indicator: Tensor


def encoder_half_parameters(unet: UNetSpatioTemporalConditionModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields names and parameters up to and including the mid block, the time embeddings among them."""
    for name, parameter in unet.named_parameters():
        if name.split(".", 1)[0] in ENCODER_HALF:
            yield name, parameter


def is_encoder_half_frozen(unet: UNetSpatioTemporalConditionModel) -> bool:
    """Whether nothing in the encoder half is trainable, so that it may run without gradients."""
    return not any(parameter.requires_grad for _, parameter in encoder_half_parameters(unet))


def run_svd_unet(
    unet: UNetSpatioTemporalConditionModel,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    added_time_ids: Tensor,
    *,
    down_residuals: Sequence[Tensor] | None = None,
    mid_residual: Tensor | None = None,
    encoder_without_grad: bool = False,
) -> Tensor:
    """Predicts as `unet(...)` does, with a ControlNet's residuals added to skip connections and mid block output.

    Without residuals the result is bit for bit that of `unet(...)`.

    Args:
        unet: diffusers' SVD UNet, frozen or not.
        sample: `b f c h w`, the scaled noisy latents beside the conditioning latents along c.
        timestep: `b` or a scalar, ln(sigma) / 4.
        encoder_hidden_states: `b 1 c`, the image embedding.
        added_time_ids: `b 3`, (fps - 1, motion bucket, noise augmentation).
        down_residuals: one `(b f) c h w` for each skip connection, from shallow to deep.
        mid_residual: `(b f) c h w` for the mid block's output.
        encoder_without_grad: run everything up to the mid block without gradients and keep no activations. It is meant
            for an encoder half without trainable parameters: the residuals and the decoder half get the same
            gradients.

    Returns:
        `b f c h w`, the network's raw output (a v prediction in SVD).

    Raises:
        ValueError: The residuals do not fit the skip connections, or `encoder_without_grad` would withhold the
            gradient of a trainable parameter.
    """
    if encoder_without_grad and torch.is_grad_enabled():
        trainable = [name for name, parameter in encoder_half_parameters(unet) if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"encoder_without_grad=True, but {len(trainable)} parameters before the decoder are trainable, such as "
                f"{trainable[0]}: freeze them (model.unfreeze: none or decoder) or pass encoder_without_grad=False"
            )
    num_frames = sample.shape[1]
    with torch.no_grad() if encoder_without_grad else nullcontext():
        encoded = run_encoder_half(unet, sample, timestep, encoder_hidden_states, added_time_ids)
    encoded = _add_residuals(encoded, down_residuals, mid_residual)
    output = _run_decoder_half(unet, encoded, spatial_size=sample.shape[-2:])
    return rearrange(output, "(b f) c h w -> b f c h w", f=num_frames)


def run_encoder_half(
    unet: UNetSpatioTemporalConditionModel,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    added_time_ids: Tensor,
    *,
    input_features: Tensor | None = None,
) -> EncoderHalf:
    """Runs time embeddings, `conv_in`, down blocks and mid block of an SVD UNet, or of the ControlNet that copies
    them.

    Args:
        unet: the network.
        sample: `b f c h w`.
        timestep: `b` or a scalar.
        encoder_hidden_states: `b 1 c`.
        added_time_ids: `b 3`.
        input_features: `(b f) c h w`, added after `conv_in` (a ControlNet's control features).
    """
    batch_size, num_frames = sample.shape[:2]
    # 1. time and added conditions, one row per frame
    embedding = _embed_time(
        unet, timestep, added_time_ids, batch_size=batch_size, dtype=sample.dtype, device=sample.device
    )
    embedding = repeat(embedding, "b c -> (b f) c", f=num_frames)
    encoder_hidden_states = repeat(encoder_hidden_states, "b t c -> (b f) t c", f=num_frames)

    # 2. input
    hidden_states = unet.conv_in(rearrange(sample, "b f c h w -> (b f) c h w"))
    if input_features is not None:
        hidden_states = hidden_states + input_features
    # 0 = these are frames of a video, not single images
    image_only_indicator = torch.zeros(batch_size, num_frames, dtype=hidden_states.dtype, device=hidden_states.device)

    # 3. down
    skips: tuple[Tensor, ...] = (hidden_states,)
    for block in unet.down_blocks:
        conditions = {"temb": embedding, "image_only_indicator": image_only_indicator}
        if getattr(block, "has_cross_attention", False):
            conditions["encoder_hidden_states"] = encoder_hidden_states
        hidden_states, block_skips = block(hidden_states=hidden_states, **conditions)
        skips += block_skips

    # 4. mid
    hidden_states = unet.mid_block(
        hidden_states=hidden_states,
        temb=embedding,
        encoder_hidden_states=encoder_hidden_states,
        image_only_indicator=image_only_indicator,
    )
    return EncoderHalf(hidden_states, skips, embedding, encoder_hidden_states, image_only_indicator)


def _embed_time(
    unet: UNetSpatioTemporalConditionModel,
    timestep: Tensor | float,
    added_time_ids: Tensor,
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Returns `b c`, the sum of the embeddings of the timestep and of the added time ids."""
    timesteps = torch.as_tensor(timestep, device=device).expand(batch_size)
    # sinusoids are computed in float32 whatever the weights' type
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
    added = rearrange(unet.add_time_proj(added_time_ids.flatten()), "(b k) c -> b (k c)", b=batch_size)
    return embedding + unet.add_embedding(added.to(embedding.dtype))


def _add_residuals(
    encoded: EncoderHalf, down_residuals: Sequence[Tensor] | None, mid_residual: Tensor | None
) -> EncoderHalf:
    """Adds a ControlNet's residuals to the skip connections and to the mid block's output."""
    if down_residuals is not None:
        shapes = [tuple(skip.shape) for skip in encoded.skips]
        given = [tuple(residual.shape) for residual in down_residuals]
        if shapes != given:
            raise ValueError(f"down_residuals have the shapes {given}, the skip connections {shapes}")
        skips = tuple(skip + residual for skip, residual in zip(encoded.skips, down_residuals, strict=True))
        encoded = encoded._replace(skips=skips)
    if mid_residual is not None:
        if mid_residual.shape != encoded.mid.shape:
            raise ValueError(
                f"mid_residual has the shape {tuple(mid_residual.shape)}, "
                f"the mid block's output {tuple(encoded.mid.shape)}"
            )
        encoded = encoded._replace(mid=encoded.mid + mid_residual)
    return encoded


def _run_decoder_half(
    unet: UNetSpatioTemporalConditionModel, encoded: EncoderHalf, *, spatial_size: Sequence[int]
) -> Tensor:
    """Runs up blocks and output convolution; returns `(b f) c h w`."""
    # for sizes that do not halve evenly, the upsamplers need their target size
    forward_upsample_size = any(size % 2**unet.num_upsamplers != 0 for size in spatial_size)
    hidden_states, skips = encoded.mid, encoded.skips
    for index, block in enumerate(unet.up_blocks):
        num_skips = len(block.resnets)
        block_skips, skips = skips[-num_skips:], skips[:-num_skips]
        is_final_block = index == len(unet.up_blocks) - 1
        conditions = {
            "temb": encoded.time_embedding,
            "image_only_indicator": encoded.image_only_indicator,
            "upsample_size": skips[-1].shape[2:] if forward_upsample_size and not is_final_block else None,
        }
        if getattr(block, "has_cross_attention", False):
            conditions["encoder_hidden_states"] = encoded.encoder_hidden_states
        hidden_states = block(hidden_states=hidden_states, res_hidden_states_tuple=block_skips, **conditions)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden_states)))
