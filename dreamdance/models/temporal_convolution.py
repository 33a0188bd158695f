"""Computes convolutions over frames alone as 2D convolutions.

SVD's UNet, the ControlNet and the video decoder hold 93 of them, with (3, 1, 1) kernels. 3D convolutions are slow on
CPUs, and on GPUs some releases of cuDNN compute them wrongly in bf16 or take gigabytes of workspace. With height and
width as one axis they are 2D convolutions.
"""

from torch import Tensor, nn


def fold_temporal_convolutions(network: nn.Module) -> None:
    """Makes a network compute its convolutions over frames as 2D ones; the result is equal up to rounding.

    Weights, their names and shapes, hooks and modes do not change; a second call changes nothing. Constructors and
    loaders do not call this function: until then a network equals diffusers' own bit for bit.

    Args:
        network: an SVD UNet, a ControlNet, a video autoencoder or another network; changed in place.
    """
    for module in network.modules():
        if type(module) is nn.Conv3d and _spans_frames_alone(module):
            module.__class__ = FoldedConv3d


def _spans_frames_alone(convolution: nn.Conv3d) -> bool:
    """Whether each output pixel depends on that pixel in other frames alone, and padding is zero."""
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
        assert not isinstance(self.padding, str)  # these are not folded
        return self.stride[:2], self.padding[:2], self.dilation[:2], self.groups
