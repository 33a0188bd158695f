"""The reference UNet computes the reference image's features: the input of every spatial self-attention (Eq. 4)."""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from dreamdance.errors import UserError
from dreamdance.models.diffusers_unet import (
    check_stable_diffusion_config,
    embed_time,
    expand_to_batch,
    load_base_weights,
    replace_transformer_blocks,
    run_blocks,
)


@dataclass(frozen=True)
class FeatureSink:
    """Collects the features that the blocks of one forward pass read."""

    features: dict[str, Tensor] = field(default_factory=dict)


class ReferenceTransformerBlock(nn.Module):
    """A transformer block of Stable Diffusion that records the input of its self-attention.

    Args:
        name: the block's name in the UNet, which is the key of its feature.
        block: diffusers' block; this one takes over its parts under the same names.
    """

    def __init__(self, name: str, block: BasicTransformerBlock) -> None:
        super().__init__()
        self.name = name
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None,
        timestep: None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: None = None,
    ) -> Tensor:
        """Run on `(b n c)`; arguments and their order are those in which diffusers calls a transformer block."""
        sink: FeatureSink = (cross_attention_kwargs or {})["context"]
        normed = self.norm1(hidden_states)
        sink.features[self.name] = normed
        if not hasattr(self, "attn1"):
            return hidden_states
        return self.compute(hidden_states, normed, encoder_hidden_states)

    def compute(self, hidden_states: Tensor, normed: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        """What follows the feature `normed`, `(b n c)`."""
        hidden_states = hidden_states + self.attn1(normed)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        return hidden_states + self.ff(self.norm3(hidden_states))

    def stop_after_reading(self) -> tuple[str, ...]:
        """Remove the parts after the feature; returns their names."""
        removed = ("attn1", "norm2", "attn2", "norm3", "ff")
        for part in removed:
            delattr(self, part)
        return removed


class ReferenceUNetModel(UNet2DConditionModel):
    """Stable Diffusion's UNet up to the last feature that the denoiser reads, run on clean latents at timestep 0.

    These parts are unused by design, and therefore absent (`removed_modules` names them); a weight without a gradient
    would stop ZeRO or DDP:

    * everything after `norm1` in the last transformer block, and the projection that follows the block;
    * everything after it in its up block and in the network;
    * `conv_norm_out` and `conv_out`.

    Args:
        kwargs: the configuration of `UNet2DConditionModel`.

    Raises:
        UserError: a variant of the UNet that is not supported, or one without attention in its up blocks.
    """

    _no_split_modules = ["ReferenceTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["ReferenceTransformerBlock"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_stable_diffusion_config(self.config)
        self.block_names = replace_transformer_blocks(self, ReferenceTransformerBlock)
        self.removed_modules = self._remove_what_follows_the_last_feature()

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Returns the parent's keys: diffusers reads keys from a signature, and `kwargs` has none."""
        return UNet2DConditionModel._get_init_keys(UNet2DConditionModel)

    def _remove_what_follows_the_last_feature(self) -> tuple[str, ...]:
        last = self.block_names[-1] if self.block_names else ""
        if not last.startswith("up_blocks."):
            raise UserError(
                "reference UNet: up_block_types needs a 'CrossAttnUpBlock2D', whose attention reads the reference; "
                f"got {self.config['up_block_types']}"
            )
        _, level, _, attention, *_ = last.split(".")
        removed = [f"{last}.{part}" for part in self.get_submodule(last).stop_after_reading()]

        transformer_name = f"up_blocks.{level}.attentions.{attention}"
        self.get_submodule(
            transformer_name
        ).proj_out = nn.Identity()  # diffusers' class calls this layer; its output is not used
        removed.append(f"{transformer_name}.proj_out")

        if self.up_blocks[int(level)].upsamplers is not None:
            self.up_blocks[int(level)].upsamplers = None
            removed.append(f"up_blocks.{level}.upsamplers")
        removed += [f"up_blocks.{later}" for later in range(int(level) + 1, len(self.up_blocks))]
        del self.up_blocks[int(level) + 1 :]

        for name in ("conv_norm_out", "conv_act", "conv_out"):
            delattr(self, name)
            removed.append(name)
        return tuple(removed)

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel) -> Self:
        """Take the weights of a plain UNet, on its device and in its dtype.

        Raises:
            CheckpointError: a weight is missing, or one is left over that does not belong to `removed_modules`.
        """
        with torch.device(unet.device):
            model = cls.from_config(unet.config).to(dtype=unet.dtype)
        load_base_weights(model, unet, added=(), unused=model.removed_modules)
        return model

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        """Read the reference features x_ref of Eq. 4.

        Args:
            sample: `(b c h w)`, clean latents of the reference image.
            timestep: scalar or `(b,)`; 0 for clean latents.
            encoder_hidden_states: `(b t c)`, the reference's CLIP embedding.

        Returns:
            For every transformer block, by its name (the denoiser's blocks have the same), `(b n c)`: the input of its
            self-attention after `norm1`.
        """
        sink = FeatureSink()
        # 1. time
        time_embedding = embed_time(self, sample, timestep)
        encoder_hidden_states = expand_to_batch(encoder_hidden_states, sample.shape[0], "encoder_hidden_states")
        # 2. blocks; each leaves its feature in the sink
        run_blocks(self, self.conv_in(sample), time_embedding, encoder_hidden_states, sink)
        # 3. a copy, because gradient checkpointing runs the blocks, and so fills the sink, once more in the backward
        return dict(sink.features)
