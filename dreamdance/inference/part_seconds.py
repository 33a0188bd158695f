"""Seconds that each part of the pipelines takes for a clip, as in Table 2 of the paper."""

import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamdance.inference.stages import Stages
from dreamdance.runs.layout import RESULT_FILE
from dreamdance.runtime.stopwatch import Stopwatch

# The parts of each stage and the networks, or the parts of networks, whose passes belong to them.
PARTS = {
    "geometry": {
        "encoding": ("image_encoder", "vae.encoder"),
        "pose encoder": ("pose_encoder",),
        "reference network": ("reference_unet",),
        "denoising": ("unet",),
        "decoding": ("vae.decoder",),
    },
    "animation": {
        "encoding": ("image_encoder", "vae.encoder"),
        "controller": ("controller",),
        "ControlNet": ("controlnet",),
        "decoding": ("vae.decoder",),
    },
}
TITLES = {"geometry": "geometry guidance (stage 1)", "animation": "animation (stage 2)"}
# What remains: in stage 2 SVD's UNet, whose blocks the pipeline calls one by one.
REST = {"geometry": "the rest", "animation": "SVD's UNet and the rest"}


class PartSeconds:
    """Measures the passes of the pipelines' networks from now on, by hooks that change nothing."""

    def __init__(self, stages: Stages) -> None:
        self._device = stages.animation.device
        self._reset()
        for stage, pipeline in (("geometry", stages.geometry), ("animation", stages.animation)):
            if pipeline is not None:
                self._measure_parts(stage, pipeline.components)

    def of_stage(self, stage: str) -> AbstractContextManager[None]:
        """Within it, a stage runs: what its parts do not take belongs to the rest."""
        return self._watches[stage, "whole"].running()

    def take(self) -> dict[str, dict[str, float]]:
        """Seconds since the last call, by stage and part; waits until the device has finished."""
        seconds = {key: watch.seconds() for key, watch in self._watches.items()}
        self._reset()
        found: dict[str, dict[str, float]] = {}
        for stage, parts in PARTS.items():
            if (whole := seconds.get((stage, "whole"))) is None:
                continue
            known = {part: seconds.get((stage, part), 0.0) for part in parts}
            known[REST[stage]] = max(whole - sum(known.values()), 0.0)
            found[stage] = {part: round(value, 4) for part, value in known.items()}
        return found

    def _reset(self) -> None:
        self._watches: dict[tuple[str, str], Stopwatch] = defaultdict(lambda: Stopwatch(self._device))

    def _measure_parts(self, stage: str, components: Mapping[str, Any]) -> None:
        for part, names in PARTS[stage].items():
            for name in names:
                component, _, child = name.partition(".")
                network = components[component]
                # PatchAutoencoder has no network inside; its work belongs to the rest.
                if isinstance(measured := getattr(network, child, None) if child else network, nn.Module):
                    self._measure(measured, stage, part)

    def _measure(self, network: nn.Module, stage: str, part: str) -> None:
        running: list[AbstractContextManager[None]] = []

        def begin(*_: Any) -> None:
            running[:] = [self._watches[stage, part].running()]  # one of a pass that failed is forgotten
            running[0].__enter__()

        def end(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end)


def machine_name(device: torch.device) -> str:
    """The machine and the device that computed."""
    if device.type == "cuda":
        return f"{platform.node()}, {torch.cuda.get_device_name(device)}"
    return f"{platform.node()}, {platform.processor() or platform.machine()} with {torch.get_num_threads()} threads"


def describe_parts(output: Path, ids: Iterable[str]) -> list[str]:
    """Seconds per frame of each part, over the results that each machine computed; one line for a stage and a machine.

    Args:
        output: the folder of the results.
        ids: the entries; those without a measured result are left out.
    """
    frames: dict[str, int] = defaultdict(int)
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for entry_id in ids:
        try:
            found = json.loads((output / entry_id / RESULT_FILE).read_text(encoding="utf-8"))
            machine, parts, num_frames = found["machine"], found["part_seconds"], int(found["num_frames"])
        except (OSError, ValueError, KeyError):
            continue
        frames[machine] += num_frames
        for stage, seconds in parts.items():
            for part, value in seconds.items():
                sums[machine, stage][part] += value
    return [_line(stage, parts, frames[machine], machine) for (machine, stage), parts in sums.items()]


def _line(stage: str, parts: Mapping[str, float], num_frames: int, machine: str) -> str:
    listed = ", ".join(f"{part} {seconds / num_frames:.3g}" for part, seconds in parts.items())
    whole = sum(parts.values()) / num_frames
    return f"{TITLES[stage]}: {whole:.3g} s per frame ({listed}), {num_frames:,} frames on {machine}"
