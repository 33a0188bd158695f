"""Residual blocks and attention of diffusers without their last step, a division by 1.0.

diffusers divides by `output_scale_factor` and `rescale_output_factor`, which are 1.0 in Stable Diffusion and Stable
Video Diffusion. Each division reads and writes all activations, in the forward and in the backward pass. Without it
every bit is the same.
"""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import Tensor, nn


def skip_division_by_one(network: nn.Module) -> None:
    """Makes a network skip the divisions by 1.0 in its residual blocks and attention; the result is bit-identical.

    Args:
        network: a UNet of either stage, a ControlNet, an autoencoder or another network; changed in place. Blocks with
            another factor or form than Stable Diffusion's stay as they are.
    """
    for module in network.modules():
        if type(module) is ResnetBlock2D and _is_plain_block(module):
            module.__class__ = UndividedResnetBlock
        if type(module) is Attention and is_plain_attention(module):
            module.__class__ = UndividedAttention


def _is_plain_block(block: ResnetBlock2D) -> bool:
    """Whether the block neither resizes nor scales by the time embedding."""
    resizes = block.upsample is not None or block.downsample is not None
    return not resizes and block.time_embedding_norm == "default" and block.output_scale_factor == 1.0


def is_plain_attention(attention: Attention) -> bool:
    """Whether diffusers' attention has projections and softmax alone: no norm, no residual and no factor."""
    norms = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    return (
        all(norm is None for norm in norms)
        and attention.added_kv_proj_dim is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )


class UndividedResnetBlock(ResnetBlock2D):
    """`ResnetBlock2D` without the division of its result by 1.0."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """`n c h w` and the time embedding `n c`, or None, to `n c h w`. Further arguments are ignored by diffusers."""
        hidden_states = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if temb is not None:
            hidden_states = hidden_states + temb
        hidden_states = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden_states))))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden_states


class UndividedAttention(Attention):
    """diffusers' attention without the division of its result by 1.0."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """As diffusers: `k n c`, and `k t c` in cross-attention, to `k n c`; masks and other processors work too."""
        is_plain = attention_mask is None and not cross_attention_kwargs and hidden_states.dim() == 3
        if not is_plain or type(self.processor) is not AttnProcessor2_0:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            rearrange(projected, "k n (heads d) -> k heads n d", heads=self.heads)
            for projected in (self.to_q(hidden_states), self.to_k(context), self.to_v(context))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        projection, dropout = self.to_out
        return dropout(projection(rearrange(attended, "k heads n d -> k n (heads d)")))
