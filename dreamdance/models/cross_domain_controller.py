"""The cross-domain controller of stage 2 (Eq. 7): pose, depth and normal maps become one guidance feature."""

import math
from collections.abc import Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from dreamdance.errors import UserError
from dreamdance.models.fused_group_norm import FusedGroupNorm
from dreamdance.models.geometry_attention import GeometryAttention

NORM_GROUPS = 8


class CrossDomainControllerModel(ModelMixin, ConfigMixin):
    """One residual convolutional encoder per modality, geometry attention over them (Eq. 5), mean, zero convolution.

    Args:
        controls: the modalities, such as `("pose", "depth", "normal")`, in any order.
        out_channels: width of the guidance feature: that of the ControlNet's `conv_in` output.
        channels: widths of the encoders, from full resolution to that of the latents; attention has the last one.
        head_width: width of an attention head; divides the last of `channels`.
        downscale_factor: pixels per latent along a side (the autoencoder's).
        geometry_attention: whether the modalities attend to one another; without it the encoders stay independent.
        attention_backend: backend of `dreamdance_kernels`; None lets it choose.

    Raises:
        UserError: a control repeats, or the widths do not divide into heads.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        controls: Sequence[str] = ("pose", "depth", "normal"),
        out_channels: int = 320,
        channels: Sequence[int] = (16, 32, 96, 320),
        head_width: int = 64,
        downscale_factor: int = 8,
        geometry_attention: bool = True,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        if not controls or len(set(controls)) != len(controls):
            raise UserError(f"model.controls is {list(controls)}: name each modality once, and at least one")
        if geometry_attention and channels[-1] % head_width:
            raise UserError(
                f"the controller's attention has {channels[-1]} channels (the last of model.controller_channels), "
                f"which do not divide into heads of width {head_width} (model.controller_head_width)"
            )
        self.encoders = nn.ModuleDict({name: _MapEncoder(channels, downscale_factor) for name in controls})
        self.attention = GeometryAttention(channels[-1], channels[-1] // head_width) if geometry_attention else None
        if self.attention is not None:
            # the zero convolution alone makes the initial output zero; no trained network has to stay unchanged
            self.attention.to_out.reset_parameters()
        self.zero_convolution = nn.Conv2d(channels[-1], out_channels, kernel_size=1)
        for parameter in self.zero_convolution.parameters():
            nn.init.zeros_(parameter)
        self.gradient_checkpointing = False

    def forward(self, maps: Mapping[str, Tensor], scales: Mapping[str, float] | None = None) -> Tensor:
        """Fuses the maps of each frame into one guidance feature.

        Args:
            maps: for each modality `(b f) 3 H W` in [0, 1]; a dropped map is all zeros.
            scales: factors of single modalities' features before the mean, after the attention; others keep 1.

        Returns:
            `(b f) c h w`, zero at initialisation.

        Raises:
            ValueError: The maps are not those of `controls`, or do not divide into latents, or another one is scaled.
        """
        controls = list(self.config.controls)
        self._check_maps(maps, controls)
        if scales is not None and not scales.keys() <= set(controls):
            raise ValueError(f"the controller reads {controls} (model.controls); scales were given for {list(scales)}")
        features = torch.stack([self._encode(name, maps[name]) for name in controls], dim=1)
        height = features.shape[-2]
        if self.attention is not None:
            # the modalities take the place of the domains: innermost of the batch
            tokens = rearrange(features, "k m c h w -> (k m) (h w) c")
            tokens = tokens + self.attention(tokens, num_domains=len(controls), backend=self.config.attention_backend)
            features = rearrange(tokens, "(k m) (h w) c -> k m c h w", m=len(controls), h=height)
        if scales is not None and any(scale != 1 for scale in scales.values()):
            factors = [float(scales.get(name, 1.0)) for name in controls]
            features = torch.stack([features[:, m] * factor for m, factor in enumerate(factors)], dim=1)
        return self.zero_convolution(features.mean(dim=1))

    def _encode(self, name: str, maps: Tensor) -> Tensor:
        """Encodes one modality; full-resolution activations are recomputed under gradient checkpointing."""
        maps = maps.to(self.dtype)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.encoders[name], maps)
        return self.encoders[name](maps)

    def _check_maps(self, maps: Mapping[str, Tensor], controls: list[str]) -> None:
        if set(maps) != set(controls):
            raise ValueError(f"the controller was built for the maps {controls} (model.controls), not {list(maps)}")
        shapes = {name: tuple(each.shape) for name, each in maps.items()}
        factor = self.config.downscale_factor
        if len(set(shapes.values())) > 1 or any(size % factor for size in next(iter(shapes.values()))[-2:]):
            raise ValueError(f"maps of one size, a multiple of {factor} pixels, are needed; these are {shapes}")


class _MapEncoder(nn.Module):
    """Convolutions from a map's resolution to that of the latents, with a residual block after each reduction."""

    def __init__(self, channels: Sequence[int], downscale_factor: int) -> None:
        super().__init__()
        strides = split_into_strides(downscale_factor, len(channels) - 1)
        self.conv_in = nn.Conv2d(3, channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for width, next_width, stride in zip(channels[:-1], channels[1:], strides, strict=True):
            # the kernel covers every pixel and its neighbours; h is H / stride
            kernel_size = max(3, 2 * stride - 1)
            self.blocks.append(nn.Conv2d(width, next_width, kernel_size, stride=stride, padding=kernel_size // 2))
            self.blocks.append(_ResidualBlock(next_width))

    def forward(self, maps: Tensor) -> Tensor:
        hidden_states = nn.functional.silu(self.conv_in(maps))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class _ResidualBlock(nn.Module):
    """Two convolutions beside an identity path, which keeps absolute levels such as nearness in a depth map.

    The normalisations end in SiLU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(NORM_GROUPS, channels)
        self.norm1 = FusedGroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = FusedGroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.conv1(self.norm1(hidden_states))
        residual = self.conv2(self.norm2(residual))
        return hidden_states + residual


def split_into_strides(downscale_factor: int, num_steps: int) -> list[int]:
    """Splits a reduction into the strides of `num_steps` convolutions, early ones larger: 8 in 3 steps is 2, 2, 2.

    Raises:
        UserError: There is no step to reduce in.
    """
    if downscale_factor < 1 or num_steps < 1:
        raise UserError(
            f"the controller cannot reduce maps {downscale_factor} times in {num_steps} steps: "
            "model.controller_channels needs two widths or more"
        )
    strides = [1] * num_steps
    remaining, prime = downscale_factor, 2
    while remaining > 1:
        if remaining % prime:
            prime += 1
            continue
        strides[strides.index(min(strides))] *= prime
        remaining //= prime
    return sorted(strides, reverse=True)
