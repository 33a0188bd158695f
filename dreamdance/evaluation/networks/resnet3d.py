"""The 3D ResNet-50 of FID-VID, trained on Kinetics (arXiv 1711.09577); its 2048 averaged features describe a clip.

Weights: `resnet-50-kinetics.pth` of the first release of kenshohara/3D-ResNets-PyTorch, whose names the layers have.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dreamdance.annotators.weights import NetworkFile
from dreamdance.evaluation.networks.weight_files import Form, load_first, read_torch

# Height and width of the network's input, and the mean colour (0..255) that is subtracted.
RESNET_SIZE = 112
RESNET_MEAN = (114.7748, 107.7354, 99.4750)
_FILE = NetworkFile(
    network="3D ResNet-50 (FID-VID)",
    file="resnet3d/resnet-50-kinetics.pth",
    licence="MIT",
    source="https://github.com/kenshohara/3D-ResNets-PyTorch (pretrained models of the first release)",
)


class ResNet3D(nn.Module):
    """The network without its classifier, with random weights until `load` is called.

    Attributes:
        files: the file of weights, with its hash.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        channels = 64
        for number, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            strides = [1 if number == 1 else 2, *[1] * (count - 1)]
            blocks = []
            for stride in strides:
                blocks.append(_Bottleneck(channels, width, stride))
                channels = 4 * width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.files: tuple[NetworkFile, ...] = ()

    def load(self, weights: Path | str) -> "ResNet3D":
        """Loads the weights from their folder.

        Raises:
            MissingInputError: they are missing or damaged.
        """
        form = Form(
            (_FILE,),
            lambda paths: {name: value for name, value in read_torch(paths[0]).items() if not name.startswith("fc.")},
            {},
        )
        self.files = load_first(weights, [form], self)
        return self

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        """Features `b 2048` of clips `b 3 16 112 112`: red, green, blue in 0..255 minus `RESNET_MEAN`."""
        hidden = functional.max_pool3d(functional.relu(self.bn1(self.conv1(clips))), 3, 2, padding=1)
        for number in range(1, 5):
            hidden = self.get_submodule(f"layer{number}")(hidden)
        return functional.avg_pool3d(hidden, (1, 4, 4), stride=1).flatten(1)


class _Bottleneck(nn.Module):
    """1x1x1, 3x3x3 and 1x1x1 convolutions beside a shortcut (type B: projected where the shape changes)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(channels, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, 4 * width, 1, bias=False), nn.BatchNorm3d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            projection = nn.Conv3d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm3d(4 * width))

    def forward(self, hidden: Tensor) -> Tensor:
        shortcut = hidden if self.downsample is None else self.downsample(hidden)
        inner = functional.relu(self.bn1(self.conv1(hidden)))
        inner = functional.relu(self.bn2(self.conv2(inner)))
        return functional.relu(self.bn3(self.conv3(inner)) + shortcut)
