"""Convolutions over frames alone, computed as 2D convolutions.

SVD's UNet, the ControlNet and the video decoder hold 93 of them, with (3, 1, 1) kernels. As 3D convolutions they are
slow on CPUs, and on GPUs a known trap: some releases of cuDNN give wrong results for them in bf16, or take gigabytes of
workspace. Seen with height and width as one axis, they are 2D convolutions.
"""

from torch import Tensor, nn


def fold_temporal_convolutions(network: nn.Module) -> None:
    """Has a network compute its convolutions over frames as 2D ones; the result is the same to rounding.

    Weights, their names and shapes, hooks and modes stay as they are; called again it changes nothing. Networks are not
    folded as they are constructed or loaded: until this is called they equal diffusers' own bit for bit.

    Args:
        network: an SVD UNet, a ControlNet, a video autoencoder, or whatever holds some; changed in place.
    """
    for module in network.modules():
        if type(module) is nn.Conv3d and _spans_frames_alone(module):
            module.__class__ = FoldedConv3d


def _spans_frames_alone(convolution: nn.Conv3d) -> bool:
    """Whether each output pixel is made of that pixel in other frames, and none is padded with anything but zeros."""
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return False
    space = (convolution.kernel_size[1:], convolution.stride[1:], convolution.padding[1:])
    return space == ((1, 1), (1, 1), (0, 0))


class FoldedConv3d(nn.Conv3d):
    """`nn.Conv3d` with a (k, 1, 1) kernel, computed as `nn.functional.conv2d` on views."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv3d`: `n c f h w` to `n c f h w`."""
        folded = self.convolve(input.flatten(3), self.weight.squeeze(-1))
        return folded.unflatten(3, input.shape[3:])

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """`n c f (h w)` to `n c f (h w)`, with a weight of `c_out c_in k 1`."""
        return nn.functional.conv2d(input, weight, self.bias, *self.settings)

    @property
    def settings(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups of the 2D convolution."""
        assert not isinstance(self.padding, str)  # such are not folded
        return self.stride[:2], self.padding[:2], self.dilation[:2], self.groups
