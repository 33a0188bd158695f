"""Cross-attention over a single token in closed form.

The only token of both stages is the image embedding. The softmax over one token is 1 whatever the query is, so the
attention is the token's projected value, the same at every place. Queries, keys, their norm and the softmax need not be
computed.
"""

from typing import Any

from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from einops import repeat
from torch import Tensor, nn

from dreamdance.models.geometry_unet import GeometryTransformerBlock
from dreamdance.models.reference_unet import ReferenceTransformerBlock
from dreamdance.models.undivided_sums import is_plain_attention

# Blocks that pass `norm2` to `attn2` and to nothing else.
_BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock, GeometryTransformerBlock, ReferenceTransformerBlock)
# With another processor, such as an adapter's, the attention may be something else.
_PROCESSORS = (AttnProcessor, AttnProcessor2_0)


def skip_softmax_over_one_token(network: nn.Module) -> None:
    """Makes a network compute its cross-attention in closed form if it reads one token, and as before if it reads more.

    Weights, their names and shapes do not change; W_q, W_k and the norm before them get no gradient from one token.

    Args:
        network: a UNet of either stage, a ControlNet or another network; changed in place.
    """
    for block in list(network.modules()):
        if isinstance(block, _BLOCKS) and _is_replaceable(block):
            block.attn2.__class__ = OneTokenAttention
            block.norm2.__class__ = DeferredLayerNorm
            # not registered as a child: the norm's weights keep their one name
            block.attn2.__dict__["query_norm"] = block.norm2
            if isinstance(block, TemporalBasicTransformerBlock):
                block.register_forward_pre_hook(_keep_one_row_per_clip, with_kwargs=True)


def _is_replaceable(block: Any) -> bool:
    attention: Any = getattr(block, "attn2", None)
    norm = getattr(block, "norm2", None)
    if type(attention) is not Attention or type(norm) is not nn.LayerNorm or not attention.is_cross_attention:
        return False
    is_usual = not isinstance(block, BasicTransformerBlock) or (
        block.norm_type == "layer_norm" and block.pos_embed is None
    )
    return is_usual and is_plain_attention(attention)


class DeferredLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of an attention's queries, which the attention calls if it needs them: `forward` does nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the input."""
        return input

    def normalise(self, input: Tensor) -> Tensor:
        """What `nn.LayerNorm` returns."""
        return super().forward(input)


class OneTokenAttention(Attention):
    """diffusers' cross-attention; over a single token it is the token's projected value, repeated at every place."""

    query_norm: DeferredLayerNorm

    def has_closed_form(self, encoder_hidden_states: Tensor | None) -> bool:
        """Whether the softmax over these tokens is 1, and no other processor than diffusers' own was set."""
        if encoder_hidden_states is None or encoder_hidden_states.dim() != 3:
            return False
        return encoder_hidden_states.shape[1] == 1 and type(self.processor) in _PROCESSORS

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """As diffusers' attention on normalised queries.

        Args:
            hidden_states: `k n c`, before the norm of the queries.
            encoder_hidden_states: `k t c`; one token may be given once for several neighbouring rows of the batch.
            attention_mask: as diffusers'.
            cross_attention_kwargs: as diffusers'.

        Returns:
            `k n c`.
        """
        is_usual = attention_mask is None and not cross_attention_kwargs
        if not is_usual or not self.has_closed_form(encoder_hidden_states):
            queries = self.query_norm.normalise(hidden_states)
            return super().forward(queries, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        projection, dropout = self.to_out
        attended = projection(self.to_v(encoder_hidden_states))
        if (rows := hidden_states.shape[0]) != attended.shape[0]:
            attended = repeat(attended, "b t c -> (b r) t c", r=rows // attended.shape[0])
        return dropout(attended.expand(-1, hidden_states.shape[1], -1))


def _keep_one_row_per_clip(
    block: TemporalBasicTransformerBlock, inputs: tuple[Any, ...], arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """SVD's transformer gives its temporal blocks the embedding of a clip once for every place: h * w equal rows."""
    context: Any = arguments.get("encoder_hidden_states")
    if block.attn2.has_closed_form(context):
        num_places = inputs[0].shape[1]
        # contiguous: of other inputs torch computes a product of frozen weights by another kernel than of trained ones
        arguments = {**arguments, "encoder_hidden_states": context[::num_places].contiguous()}
    return inputs, arguments
