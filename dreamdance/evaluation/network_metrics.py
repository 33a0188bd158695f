"""LPIPS of frames, and the features of clips from which FVD and FID-VID are computed over all clips of a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.annotators.weights import NetworkFile
from dreamdance.errors import MissingInputError
from dreamdance.evaluation.clips import ResultError
from dreamdance.evaluation.frechet import frechet_distance, min_windows
from dreamdance.evaluation.networks.i3d import I3D, I3D_SIZE
from dreamdance.evaluation.networks.lpips import Lpips
from dreamdance.evaluation.networks.resnet3d import RESNET_MEAN, RESNET_SIZE, ResNet3D
from dreamdance.evaluation.protocols import CLIP_FRAMES, Protocol, clip_frames, network_input
from dreamdance.evaluation.scores import Scores
from dreamdance.recipe.metric_section import MetricSettings

Frames = NDArray[np.float32] | NDArray[np.uint8]
# Row of the table -> metric -> features `n d` of its clips.
Features = dict[str, dict[str, NDArray[np.float32]]]
_DIGITS = 16  # of a hash, in the table


@dataclass
class Cost:
    """What a metric has cost: seconds of the processor (of the clock, on a GPU) for a number of frames."""

    seconds: float = 0.0
    frames: int = 0

    def add(self, other: "Cost") -> None:
        self.seconds += other.seconds
        self.frames += other.frames


@dataclass(frozen=True)
class NetworkMetrics:
    """The networks of a recipe that are there.

    Attributes:
        networks: name in the recipe -> network.
        absent: name in the recipe -> what is missing, and where to get it.
        device: where they run.
        watched: folders whose change may mean that an absent file is there now.
    """

    networks: Mapping[str, Lpips | I3D | ResNet3D] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    watched: Sequence[Path] = ()

    @property
    def files(self) -> dict[str, tuple[NetworkFile, ...]]:
        """Name in the recipe -> files of weights, with their hashes."""
        return {name: network.files for name, network in self.networks.items()}

    def lpips(
        self, answers: Mapping[str, Frames], truth: Frames, *, disco: bool, beat: Callable[[str], None]
    ) -> tuple[dict[str, Scores], dict[str, Cost]]:
        """LPIPS of each answer, the mean over its frames; a frame equal to the one before is not computed again.

        Args:
            answers: row of the table -> frames `f H W 3` in [0, 1], or bytes.
            truth: the true frames.
            disco: feeds VGG16 with [0, 1] as DisCo does (`lpips_disco`), not with [-1, 1].
            beat: called before each frame.

        Raises:
            ResultError: the frames are too small for a network.
        """
        wanted = {"lpips_vgg": "lpips_disco"} if disco else {name: name for name in ("lpips_alex", "lpips_vgg")}
        scores: dict[str, Scores] = {row: {} for row in answers}
        costs = {}
        for name, key in wanted.items():
            network = self.networks.get(name)
            if not isinstance(network, Lpips):
                continue
            height, width = truth.shape[1:3]
            if min(height, width) < network.least_size:
                raise ResultError(
                    f"frames of {width}x{height} pixels are too small for {name}, which needs {network.least_size} in "
                    "both directions: set metrics.width and metrics.height, or leave it out of metrics.networks"
                )
            started, count = self._now(), 0
            described: dict[str, tuple[NDArray[Any], list[Tensor]]] = {}
            sums = dict.fromkeys(answers, 0.0)
            for number in range(len(truth)):
                beat(f"{key} of frame {number}")
                for row, frames in {"": truth, **answers}.items():
                    frame = frames[number]
                    if row not in described or not np.array_equal(described[row][0], frame):
                        described[row] = (frame, network.describe(self._picture(frame, disco=disco)))
                        count += 1
                for row in answers:
                    sums[row] += float(network.compare(described[row][1], described[""][1]))
            for row, total in sums.items():
                scores[row][key] = total / len(truth)
            costs[key] = Cost(self._now() - started, count)
        return scores, costs

    def describe(
        self, frames: Frames, runs: Sequence[Sequence[int]], protocol: Protocol, *, beat: Callable[[str], None]
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Cost]]:
        """The features of all clips of a sequence, for each video network; a clip equal to the last is not repeated.

        Args:
            frames: `f H W 3`: floats in [0, 1] for the protocol `true`, bytes of 256x256 for the others.
            runs: frames that follow one another without a gap.
            protocol: how clips are cut and prepared.
            beat: called before each clip.

        Returns:
            Metric -> features `n d`, and what each cost. Empty if the sequence is too short for a clip.
        """
        features, costs = {}, {}
        clips = clip_frames(runs, protocol)
        for name in ("fvd", "fid_vid"):
            network = self.networks.get(name)
            if network is None or isinstance(network, Lpips) or not clips:
                continue
            key = name if protocol == "true" else f"{name}_{protocol}"
            started, found, before, count = self._now(), [], None, 0
            for clip in clips:
                beat(f"{key} of the clip at frame {clip[0]}")
                pictures = frames[clip]
                if before is None or not np.array_equal(before, pictures):
                    before, count = pictures, count + CLIP_FRAMES
                    feature = self._features(network, pictures, protocol)
                found.append(feature)
            features[key] = np.stack(found)
            costs[key] = Cost(self._now() - started, count)
        return features, costs

    def _features(self, network: I3D | ResNet3D, pictures: Frames, protocol: Protocol) -> NDArray[np.float32]:
        if isinstance(network, I3D):
            clip = network_input(pictures, I3D_SIZE, protocol).to(self.device) / 127.5 - 1
            logits: NDArray[np.float32] = network(clip[None])[0].float().cpu().numpy()
            return logits
        mean = torch.tensor(RESNET_MEAN, device=self.device)[:, None, None, None]
        clip = network_input(pictures, RESNET_SIZE, protocol).to(self.device) - mean
        parts = [network(part[None])[0] for part in clip.split(CLIP_FRAMES, dim=1)]
        averaged: NDArray[np.float32] = torch.stack(parts).mean(dim=0).float().cpu().numpy()
        return averaged

    def _picture(self, frame: NDArray[Any], *, disco: bool) -> Tensor:
        picture = rearrange(torch.from_numpy(np.ascontiguousarray(frame)), "h w c -> 1 c h w").to(self.device)
        values = picture.float() / 255 if frame.dtype == np.uint8 else picture
        return values if disco else values * 2 - 1

    def _now(self) -> float:
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


def open_networks(settings: MetricSettings) -> NetworkMetrics:
    """Loads the networks that a recipe names, as far as their weights are there."""
    makers: dict[str, Callable[[], Lpips | I3D | ResNet3D]] = {
        "lpips_alex": lambda: Lpips("alex"),
        "lpips_vgg": lambda: Lpips("vgg"),
        "fvd": I3D,
        "fid_vid": ResNet3D,
    }
    device, folder = torch.device(settings.device), Path(settings.weights)
    networks: dict[str, Lpips | I3D | ResNet3D] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(settings.networks):
        try:
            networks[name] = makers[name]().load(folder).to(device)
        except MissingInputError as error:
            absent[name] = str(error)
    subfolders = [folder / part for part in ("lpips", "i3d", "resnet3d")]
    watched = [path.absolute() for path in (folder, *subfolders) if path.is_dir()] if settings.networks else []
    return NetworkMetrics(networks, absent, device, watched)


def frechet_scores(clips: Sequence[Features], *, truth_row: str) -> tuple[dict[str, Scores], dict[str, int]]:
    """FVD and FID-VID of each row against the truth, over the windows of all clips, and the number of windows.

    Args:
        clips: the features of each clip; those that are too short have none.
        truth_row: the row of the true clips.
    """
    joined: dict[str, dict[str, list[NDArray[np.float32]]]] = {}
    for clip in clips:
        for row, features in clip.items():
            for key, values in features.items():
                joined.setdefault(row, {}).setdefault(key, []).append(values)
    truth = {key: np.concatenate(parts) for key, parts in joined.pop(truth_row, {}).items()}
    windows = {key: len(values) for key, values in truth.items()}
    scores: dict[str, Scores] = {row: {} for row in joined}
    for row, lists in joined.items():
        for key, parts in lists.items():
            values = np.concatenate(parts)
            if len(values) > 1:
                scores[row][key] = frechet_distance(values, truth[key])
    return scores, windows


def describe_networks(
    networks: NetworkMetrics, costs: Mapping[str, Cost], windows: Mapping[str, int]
) -> dict[str, str]:
    """Lines for the table: files with their hashes, numbers of clips, and what is absent.

    They hold no seconds: two evaluations of the same results give the same table.
    """
    lines = {}
    for name, files in networks.files.items():
        parts = [
            f"{file.file}, SHA-256 {str(file.sha256)[:_DIGITS]}{'' if file.is_pinned else ' (not pinned)'}"
            for file in files
        ]
        for key in costs:
            if key == name or key.startswith(f"{name}_") or (key, name) == ("lpips_disco", "lpips_vgg"):
                least = min_windows(key)
                few = f", too few (below {least})" if key in windows and windows[key] < least else ""
                parts.append(f"{key}: {windows[key]} clips of {CLIP_FRAMES} frames{few}" if key in windows else key)
        if not any(key == name or key.startswith(name) for key in costs) and name in ("fvd", "fid_vid"):
            parts.append(f"not measured: no clip has {CLIP_FRAMES} frames that follow one another")
        lines[name] = "; ".join(parts)
    return lines | {name: f"not measured: {reason}" for name, reason in networks.absent.items()}


def describe_costs(costs: Mapping[str, Cost]) -> str:
    """What each metric cost, for the log."""
    return ", ".join(f"{key} {CLIP_FRAMES * cost.seconds / cost.frames:.2g} s" for key, cost in costs.items())
