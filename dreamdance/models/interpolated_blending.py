"""SVD's mix of spatial and temporal features as one operation, `torch.lerp`, instead of two products and a sum."""

import torch
from diffusers.models.resnet import AlphaBlender
from torch import Tensor, nn


def blend_in_one_pass(network: nn.Module) -> None:
    """Makes a network mix spatial and temporal features in one pass over memory; the result is equal up to rounding.

    Args:
        network: an SVD UNet, a ControlNet, a video autoencoder or another network; changed in place.
    """
    for module in network.modules():
        if type(module) is AlphaBlender:
            module.__class__ = InterpolatingBlender


class InterpolatingBlender(AlphaBlender):
    """`AlphaBlender` computed as a linear interpolation."""

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        """As diffusers: both of one shape, `b c f h w` or `k n c`, and `b f` for the indicator."""
        if x_spatial.dtype != x_temporal.dtype:  # `torch.lerp` does not convert
            return super().forward(x_spatial, x_temporal, image_only_indicator)
        alpha = self.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
        if self.switch_spatial_to_temporal_mix:
            return torch.lerp(x_spatial, x_temporal, alpha)
        return torch.lerp(x_temporal, x_spatial, alpha)
