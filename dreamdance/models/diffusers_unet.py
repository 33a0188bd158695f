"""Common code of both stage-1 UNets: it checks diffusers' 2D UNet, replaces its transformer blocks, loads and runs it.

Every module keeps its name, so that weights of the plain UNet load by their own names.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import repeat
from torch import Tensor, nn

from dreamdance.errors import CheckpointError, UserError

_CROSS_ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")
_SUPPORTED_BLOCKS = (*_CROSS_ATTENTION_BLOCKS, "DownBlock2D", "UpBlock2D", None)
# Variants of diffusers' UNet that Stable Diffusion does not use, with the values that mean "not used".
_UNUSED_VARIANTS: Mapping[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "only_cross_attention": (None, False),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "attention_type": (None, "default"),
}


def check_stable_diffusion_config(config: Mapping[str, Any]) -> None:
    """Refuse variants of diffusers' UNet that the stage-1 networks do not run.

    Raises:
        UserError: a variant is not supported; the message names the config key, its value and the accepted one.
    """
    for key, accepted in _UNUSED_VARIANTS.items():
        if config.get(key) not in accepted:
            raise UserError(f"UNet config: {key}={config[key]!r} is not supported; accepted: {accepted[-1]!r}")
    block_types = (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"])
    for block_type in block_types:
        if block_type not in _SUPPORTED_BLOCKS:
            raise UserError(f"UNet config: block type {block_type!r} is not supported; accepted: {_SUPPORTED_BLOCKS}")


def replace_transformer_blocks(
    unet: nn.Module, make_block: Callable[[str, BasicTransformerBlock], nn.Module]
) -> tuple[str, ...]:
    """Put `make_block(name, block)` in the place of every transformer block; returns their names in running order."""
    found = {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}
    for name, block in found.items():
        unet.set_submodule(name, make_block(name, block))
    return tuple(sorted(found, key=_running_order))


def _running_order(name: str) -> tuple[int, ...]:
    """Sort key: down, middle, up, then by number; `named_modules` lists the up blocks before the middle one."""
    stage, *rest = name.split(".")
    return (("down_blocks", "mid_block", "up_blocks").index(stage), *(int(part) for part in rest if part.isdigit()))


def load_base_weights(
    model: nn.Module, base: nn.Module, *, added: Iterable[str], unused: Iterable[str], reuse: bool = False
) -> None:
    """Copy the weights of a plain UNet and account for every one of them.

    Args:
        model: the network that receives the weights.
        base: the network that has the weights; it is not changed.
        added: names of weights that only `model` has and that keep their initial value.
        unused: names of modules that only `base` has.
        reuse: take the memory of the weights instead of copies; what trains one network then changes the other.

    Raises:
        CheckpointError: any other weight is missing or left over.
    """
    result = model.load_state_dict(base.state_dict(), strict=False, assign=reuse)
    unused = tuple(unused)
    left_over = [key for key in result.unexpected_keys if not any(key.startswith(f"{name}.") for name in unused)]
    missing = sorted(set(result.missing_keys) ^ set(added))
    if missing or left_over:
        raise CheckpointError(
            f"{type(model).__name__} cannot take these weights of {type(base).__name__}: "
            f"missing {missing[:5]}, left over {left_over[:5]}"
        )


def expand_to_batch(values: Tensor, batch_size: int, name: str) -> Tensor:
    """Repeat one row per clip `(b ...)` to one per sample `((b f m) ...)`; rows per sample pass through.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    if values.shape[0] == batch_size:
        return values
    if values.shape[0] == 0 or batch_size % values.shape[0]:
        raise ValueError(f"{name}: {values.shape[0]} rows do not divide a batch of {batch_size}")
    return repeat(values, "b ... -> (b r) ...", r=batch_size // values.shape[0])


def embed_time(unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor | float) -> Tensor:
    """The time embedding after its MLP: `((b f m), time_embed_dim)` for a scalar, `(b,)` or `((b f m),)` timestep."""
    if torch.is_tensor(timestep) and timestep.dim() == 1:
        timestep = expand_to_batch(timestep, sample.shape[0], "timestep")
    return unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))


def run_blocks(
    unet: UNet2DConditionModel, sample: Tensor, time_embedding: Tensor, encoder_hidden_states: Tensor, context: Any
) -> Tensor:
    """Down, middle and up blocks between `conv_in` and `conv_norm_out`, as diffusers runs them.

    Args:
        unet: the network; its missing blocks are skipped.
        sample: `((b f m) c h w)`, after `conv_in`.
        time_embedding: `((b f m), time_embed_dim)`.
        encoder_hidden_states: `((b f m) t c)`.
        context: every transformer block receives it as `cross_attention_kwargs["context"]`.

    Returns:
        `((b f m) c h w)`.
    """
    attention_arguments = {
        "encoder_hidden_states": encoder_hidden_states,
        "cross_attention_kwargs": {"context": context},
    }
    # 1. down
    skips: tuple[Tensor, ...] = (sample,)
    for block, block_type in zip(unet.down_blocks, unet.config["down_block_types"], strict=True):
        arguments = attention_arguments if block_type in _CROSS_ATTENTION_BLOCKS else {}
        sample, block_skips = block(hidden_states=sample, temb=time_embedding, **arguments)
        skips += block_skips
    # 2. middle
    if unet.mid_block is not None:
        sample = unet.mid_block(sample, time_embedding, **attention_arguments)
    # 3. up
    for block, block_type in zip(unet.up_blocks, unet.config["up_block_types"], strict=False):
        arguments = attention_arguments if block_type in _CROSS_ATTENTION_BLOCKS else {}
        skips, block_skips = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
        sample = block(
            hidden_states=sample,
            temb=time_embedding,
            res_hidden_states_tuple=block_skips,
            upsample_size=skips[-1].shape[-2:] if skips else None,
            **arguments,
        )
    return sample
