"""Group normalisation that runs as one operator with the SiLU behind it, and its place in diffusers' networks.

Parameters keep their names, so weights load and save as before. It pays on a GPU for a network in channels_last, where
torch's own turns every input to the contiguous layout and the convolution behind it turns it back.
"""

from typing import TypeGuard

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dreamdance_kernels import group_norm_silu


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
        """The fused form of a normalisation, on its very parameters."""
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, activation=activation, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """`n c h w` to the same."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        """As torch's, and whether SiLU follows."""
        return f"{super().extra_repr()}, activation={self.activation}"


class ActivatedLinear(nn.Linear):
    """`nn.Linear` behind a SiLU of its own, for a block whose activation has gone into its normalisations."""

    @classmethod
    def sharing(cls, linear: nn.Linear) -> "ActivatedLinear":
        """The activated form of a linear layer, on its very parameters."""
        activated = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        activated.weight, activated.bias = linear.weight, linear.bias
        return activated.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """`... in_features` to `... out_features`."""
        return super().forward(nn.functional.silu(input))


def fuse_group_norms(network: nn.Module) -> None:
    """Puts fused normalisations in the place of all plain ones of a diffusers UNet, on the same parameters and names.

    SiLU goes into those of residual blocks and into the one before the last convolution; the others keep channels_last.
    Outputs on CPU stay the same, bit for bit. Call it before the network is wrapped or compiled.
    """
    for module in list(network.modules()):
        if isinstance(module, ResnetBlock2D) and _has_silu_behind_both_norms(module):
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


def _has_silu_behind_both_norms(block: ResnetBlock2D) -> bool:
    """Whether nothing but a sum stands between: a scale and shift by the time embedding comes before its SiLU."""
    embeds_plainly = block.time_emb_proj is None or type(block.time_emb_proj) is nn.Linear
    return (
        type(block.nonlinearity) is nn.SiLU
        and _is_plain(block.norm1)
        and _is_plain(block.norm2)
        and block.time_embedding_norm == "default"
        and embeds_plainly
    )


def _fuse_block(block: ResnetBlock2D) -> None:
    block.norm1 = FusedGroupNorm.sharing(block.norm1, activation=True)
    block.norm2 = FusedGroupNorm.sharing(block.norm2, activation=True)
    if block.time_emb_proj is not None and not block.skip_time_act:
        # the block applies its activation to the time embedding too
        block.time_emb_proj = ActivatedLinear.sharing(block.time_emb_proj)
    block.nonlinearity = nn.Identity()
