"""All scores of one clip: maps and frames, over time, by networks, and by DisCo's protocol where it is asked for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dreamdance.evaluation.clips import Prediction, Size, Truth
from dreamdance.evaluation.compared_frames import ComparedFrames, describe_first, is_papers_reference
from dreamdance.evaluation.frechet import min_windows
from dreamdance.evaluation.network_metrics import Cost, Features, NetworkMetrics, describe_networks
from dreamdance.evaluation.protocols import CLIP_FRAMES, Protocol, disco_frames, resize_frames
from dreamdance.evaluation.scores import TRUTH_KEYS, Scores, score, score_disco
from dreamdance.evaluation.temporal_metrics import LAST_SHARE, STILL_LEVELS, colour_drift, flicker, seam_ratio
from dreamdance.media.transforms import resize_map
from dreamdance.recipe.metric_section import MetricSettings


@dataclass(frozen=True)
class Measures:
    """What is measured.

    Attributes:
        settings: the section of the recipe.
        networks: its networks, as far as they are there.
        beat: called before each pass of a network, so that a watchdog sees progress.
    """

    settings: MetricSettings = field(default_factory=MetricSettings)
    networks: NetworkMetrics = field(default_factory=NetworkMetrics)
    beat: Callable[[str], None] = lambda _: None

    @property
    def size(self) -> Size | None:
        """Size at which frames are compared; None means that of the results."""
        height, width = self.settings.height, self.settings.width
        return None if height is None or width is None else (height, width)


@dataclass(frozen=True)
class Measured:
    """Scores of all answers, features of their windows, and the costs of networks."""

    scores: dict[str, Scores]
    features: Features
    costs: dict[str, Cost]


def measure_clip(
    answers: Mapping[str, Prediction],
    truth: Truth,
    *,
    truth_row: str,
    runs: Sequence[Sequence[int]],
    seams: Sequence[int] = (),
    measures: Measures,
) -> Measured:
    """Measures all answers.

    Args:
        answers: row of the table -> prediction; the first is the result, the others were made without windows.
        truth: the true clip.
        truth_row: the row of the truth itself, without the scores that are perfect there.
        runs: frames that follow one another without a gap.
        seams: frames with which a window of the sampling begins, except the first.
        measures: what is measured.
    """
    as_given, true_as_given = answers, truth.pictures.given_frames
    if measures.size is not None:
        answers = {row: _resized(answer, measures.size) for row, answer in answers.items()}
        mask = None if truth.frame_mask is None else _resize_mask(truth.frame_mask, measures.size)
        truth = replace(truth, pictures=_resized(truth.pictures, measures.size), frame_mask=mask)
    itself = Prediction(normals=truth.pictures.normals, disparity=truth.pictures.disparity)
    scores = {row: score(answer, truth) for row, answer in answers.items()}
    scores[truth_row] = {key: value for key, value in score(itself, truth).items() if key in TRUTH_KEYS}
    true_frames = truth.pictures.given_frames
    frames = {row: answer.frames for row, answer in answers.items() if answer.frames is not None}
    for row, those in {**frames, truth_row: true_frames}.items():
        scores[row]["flicker"] = flicker(those, true_frames, truth.frame_mask, runs=runs)
        scores[row]["colour_drift"] = colour_drift(those)
        if seams and row == next(iter(answers)):
            scores[row]["seam_ratio"] = seam_ratio(those, true_frames, runs=runs, seams=seams)
    measured = Measured(scores, {}, {})
    _add_networks(measured, frames, true_frames, ("true",), truth_row=truth_row, runs=runs, measures=measures)
    if measures.settings.protocols:  # DisCo's has a size of its own
        small = {row: disco_frames(answer.frames) for row, answer in as_given.items() if answer.frames is not None}
        true_small = disco_frames(true_as_given)
        if "disco" in measures.settings.protocols:
            for row, those_bytes in small.items():
                scores[row] |= score_disco(those_bytes, true_small)
        protocols = measures.settings.protocols
        _add_networks(measured, small, true_small, protocols, truth_row=truth_row, runs=runs, measures=measures)
    return measured


def _add_networks(
    measured: Measured,
    frames: Mapping[str, NDArray[Any]],
    true_frames: NDArray[Any],
    protocols: Sequence[Protocol],
    *,
    truth_row: str,
    runs: Sequence[Sequence[int]],
    measures: Measures,
) -> None:
    """Adds LPIPS and the features of windows, for protocols that see the same frames."""
    networks = measures.networks
    if protocols != ["disco_gif"]:
        distances, costs = networks.lpips(frames, true_frames, disco="disco" in protocols, beat=measures.beat)
        for row, found in distances.items():
            measured.scores[row] |= found
        _add_costs(measured.costs, costs)
    for protocol in protocols:
        for row, those in {truth_row: true_frames, **frames}.items():
            features, costs = networks.describe(those, runs, protocol, beat=measures.beat)
            measured.features.setdefault(row, {}).update(features)
            _add_costs(measured.costs, costs)


def describe_measures(
    measures: Measures, costs: Mapping[str, Cost], windows: Mapping[str, int], clips: Collection[ComparedFrames]
) -> dict[str, str]:
    """Lines for the table: protocols, networks with their hashes and numbers of clips, and what is absent.

    Args:
        measures: what was measured.
        costs: metrics that were measured, by key; their seconds are for the log (`describe_costs`).
        windows: numbers of windows of the distances between sets.
        clips: which frames were compared.
    """
    lines = {
        "over time": f"flicker: change from frame to frame of pixels that change by at most {STILL_LEVELS:g} of 255 in "
        f"the truth, outside of the body if there is a mask; drift: mean colour of the last {100 * LAST_SHARE:g} % "
        f"of the frames against that of {describe_first(clips)}; seams: frames with which a window of "
        "stage 2 begins, 1 is no jump",
        "detail of the background": "energy of the Laplacian outside of the body, or of the whole frame if there is no "
        "mask, relative to the truth's: above 1 is grain, below 1 is blur",
    }
    if measures.settings.networks:
        lines["protocol true"] = (
            "floats at the size above; LPIPS of values in [-1, 1], the mean over a clip's frames, then over clips; "
            f"FVD (I3D logits) and FID-VID (3D ResNet-50) over windows of {CLIP_FRAMES} frames side by side"
        )
    if "disco" in measures.settings.protocols:
        lines["protocol disco"] = (
            "frames as bytes, resized to 256x256 (bilinear, not antialiased; the aspect is not kept), means over the "
            f"frames of all clips; LPIPS (VGG16) is fed with [0, 1]; windows of {CLIP_FRAMES} frames from every frame "
            "on but the last possible one"
        )
        if not is_papers_reference(clips):
            lines["protocol disco"] += "; the papers take the first frame as the reference, these results do not"
    if "disco_gif" in measures.settings.protocols:
        lines["protocol disco_gif"] = "the same windows in 256 colours for each frame, each frame 8 times"
    lines |= describe_networks(measures.networks, costs, windows)
    if few := {f"{min_windows(key)} for {key}" for key, count in windows.items() if count < min_windows(key)}:
        lines["too few"] = (
            f"distances of sets with fewer windows than features ({', '.join(sorted(few))}) do not compare with other "
            "tables"
        )
    left_out = [
        name for name in ("lpips_alex", "lpips_vgg", "fvd", "fid_vid") if name not in measures.settings.networks
    ]
    if left_out:
        lines["not measured"] = f"{', '.join(left_out)}: metrics.networks does not name them"
    return lines


def sum_costs(clips: Sequence[Mapping[str, Cost]]) -> dict[str, Cost]:
    """What each metric cost over all clips."""
    total: dict[str, Cost] = {}
    for costs in clips:
        _add_costs(total, costs)
    return total


def _add_costs(total: dict[str, Cost], costs: Mapping[str, Cost]) -> None:
    for key, cost in costs.items():
        total.setdefault(key, Cost()).add(cost)


def _resized(prediction: Prediction, size: Size) -> Prediction:
    frames = prediction.frames
    return replace(prediction, frames=None if frames is None else resize_frames(frames, size))


def _resize_mask(mask: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    resize = partial(resize_map, height=size[0], width=size[1], kind="region")
    resized: NDArray[np.bool_] = resize(torch.from_numpy(mask)[:, None].float())[:, 0].bool().numpy()
    return resized
