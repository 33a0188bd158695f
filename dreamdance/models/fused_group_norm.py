"""Group normalisation and the following SiLU as one operator, and the code that puts it into diffusers' networks.

Parameters keep their names, so that weights load and save as before. The operator is made for networks in channels_last
on a GPU, where torch's own converts every input to the contiguous layout and the next convolution converts it back.
"""

from typing import TypeGuard

from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from dreamdance_kernels import group_norm_silu

# Residual blocks that have SiLU behind both of their norms, unless a setting puts something between.
_BLOCKS = (ResnetBlock2D, TemporalResnetBlock)


class FusedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with an affine map, followed by SiLU unless `activation` is off; on CPU the same values.

    Args:
        num_groups: divides `num_channels`.
        num_channels: channels of the input.
        eps: added to the variance.
        activation: whether SiLU follows.
        device: where the parameters are made.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        activation: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, device=device)
        self.activation = activation

    @classmethod
    def sharing(cls, norm: nn.GroupNorm, *, activation: bool) -> "FusedGroupNorm":
        """Builds the fused form of a normalisation; both share their parameters."""
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, activation=activation, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """`n c h w` or `n c f h w` to the same."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        """Torch's text, and whether SiLU follows."""
        return f"{super().extra_repr()}, activation={self.activation}"


class ActivatedLinear(nn.Linear):
    """`nn.Linear` that applies SiLU to its input, for a block whose activation moved into its normalisations."""

    @classmethod
    def sharing(cls, linear: nn.Linear) -> "ActivatedLinear":
        """Builds the activated form of a linear layer; both share their parameters."""
        activated = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        activated.weight, activated.bias = linear.weight, linear.bias
        return activated.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """`... in_features` to `... out_features`."""
        return super().forward(nn.functional.silu(input))


def fuse_group_norms(network: nn.Module) -> None:
    """Replaces all plain normalisations of a diffusers UNet by fused ones with the same parameters and names.

    The normalisations of residual blocks and the one before the last convolution include SiLU; all keep channels_last.
    Outputs on CPU stay bit-identical. Call this function before the network is wrapped or compiled.
    """
    for module in list(network.modules()):
        if isinstance(module, _BLOCKS) and _has_silu_behind_both_norms(module):
            _fuse_block(module)
        last = getattr(module, "conv_norm_out", None)
        if _is_plain(last) and type(getattr(module, "conv_act", None)) is nn.SiLU:
            module.conv_norm_out = FusedGroupNorm.sharing(last, activation=True)
            module.conv_act = nn.Identity()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child):
                setattr(parent, name, FusedGroupNorm.sharing(child, activation=False))


def _is_plain(module: object) -> TypeGuard[nn.GroupNorm]:
    return type(module) is nn.GroupNorm and module.affine


def _has_silu_behind_both_norms(block: ResnetBlock2D | TemporalResnetBlock) -> bool:
    """Whether only a sum lies between norm and SiLU, not a scale and shift by the time embedding."""
    embeds_plainly = block.time_emb_proj is None or type(block.time_emb_proj) is nn.Linear
    return (
        type(block.nonlinearity) is nn.SiLU
        and _is_plain(block.norm1)
        and _is_plain(block.norm2)
        and (isinstance(block, TemporalResnetBlock) or block.time_embedding_norm == "default")
        and embeds_plainly
    )


def _fuse_block(block: ResnetBlock2D | TemporalResnetBlock) -> None:
    block.norm1 = FusedGroupNorm.sharing(block.norm1, activation=True)
    block.norm2 = FusedGroupNorm.sharing(block.norm2, activation=True)
    if block.time_emb_proj is not None and not getattr(block, "skip_time_act", False):
        # the block applies its activation to the time embedding too
        block.time_emb_proj = ActivatedLinear.sharing(block.time_emb_proj)
    block.nonlinearity = nn.Identity()
