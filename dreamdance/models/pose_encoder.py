"""The pose encoder turns drawn poses into features, which the denoiser adds to the noisy latents after `conv_in`."""

import math
from itertools import pairwise

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamdance.errors import UserError


class PoseEncoderModel(ModelMixin, ConfigMixin):
    """A light convolutional encoder whose last projection starts at zero: before training the pose adds nothing.

    Args:
        out_channels: channels of the UNet after `conv_in`.
        channels: widths from pixels to latent resolution.
        downscale_factor: H / h, a power of two of at most `2 ** (len(channels) - 1)`.

    Raises:
        UserError: that many widths cannot reach the factor.
    """

    @register_to_config
    def __init__(
        self, out_channels: int, channels: tuple[int, ...] = (16, 32, 96, 256), downscale_factor: int = 8
    ) -> None:
        super().__init__()
        num_halvings = round(math.log2(downscale_factor)) if downscale_factor >= 1 else -1
        if num_halvings < 0 or 2**num_halvings != downscale_factor or num_halvings > len(channels) - 1:
            raise UserError(
                f"pose encoder: downscale_factor={downscale_factor} must be a power of two of at most "
                f"{2 ** (len(channels) - 1)}, since it has {len(channels)} widths (channels={tuple(channels)})."
            )
        self.conv_in = nn.Conv2d(3, channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for level, (width, next_width) in enumerate(pairwise(channels)):
            stride = 2 if level < num_halvings else 1
            self.blocks.append(nn.Conv2d(width, width, kernel_size=3, padding=1))
            self.blocks.append(nn.Conv2d(width, next_width, kernel_size=3, padding=1, stride=stride))
        self.conv_out = nn.Conv2d(channels[-1], out_channels, kernel_size=3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pose: Tensor) -> Tensor:
        """Encode drawn poses.

        Args:
            pose: `((b f) 3 H W)` in [0, 1], drawn on black.

        Returns:
            `((b f) c h w)`, zeros before training.

        Raises:
            ValueError: H or W is no multiple of the downscale factor.
        """
        factor = self.config["downscale_factor"]
        if pose.shape[-2] % factor or pose.shape[-1] % factor:
            raise ValueError(f"pose of {tuple(pose.shape[-2:])} pixels: both sides must be multiples of {factor}")
        hidden_states = F.silu(self.conv_in(pose))
        for block in self.blocks:
            hidden_states = F.silu(block(hidden_states))
        return self.conv_out(hidden_states)
