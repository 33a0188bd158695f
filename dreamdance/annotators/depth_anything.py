"""Depth Anything V2: depth of the whole picture, from a folder in the format of transformers.

L. Yang et al., "Depth Anything V2" (NeurIPS 2024). The network of the relative kind returns disparity (larger is
nearer) up to a scale and a shift that change from frame to frame (`depth_windows` removes this); the metric kind
returns metres. Not run with real weights: the tests run a tiny network of the same classes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dreamdance.annotators.depth_windows import steady_disparity
from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.local_models import find_weights, import_class, to_torch
from dreamdance.annotators.protocols import Depths, PersonPoses, check_shape

SOURCE = "https://huggingface.co/depth-anything (Depth-Anything-V2-Small-hf and others)"
# By the width of the backbone; the authors publish Small under another licence than Base and Large.
_LICENCES = {384: "Apache-2.0", 768: "CC-BY-NC-4.0", 1024: "CC-BY-NC-4.0"}
_UNKNOWN_LICENCE = "Apache-2.0 (Small) or CC-BY-NC-4.0 (Base, Large)"
# Metric depths are at least this many metres: enlarging the result may overshoot to zero.
_MIN_METRES = 1e-2


class DepthAnything:
    """Estimates the depth of frames by Depth Anything V2; it sees the background."""

    sees_background = True
    uses: Mapping[str, tuple[str, ...]] = {"depth": ()}

    def __init__(
        self, folder: Path | str, *, device: str = "cpu", dtype: str = "float32", frames_at_once: int = 4
    ) -> None:
        """Loads the network.

        Args:
            folder: the folder with `config.json`, `preprocessor_config.json` and `model.safetensors`.
            device, dtype: where the network runs and in which type: `float32`, `bfloat16` or `float16`.
            frames_at_once: number of frames in a batch.

        Raises:
            MissingInputError: a file is missing.
            UserError: the folder holds another network.
        """
        self._device, self._dtype = to_torch(device, dtype)
        config = Path(folder) / "config.json"
        width = _backbone_width(config) if config.is_file() else None
        self.networks = find_weights(
            folder,
            ("model.safetensors", "config.json", "preprocessor_config.json"),
            network="Depth Anything V2",
            licence=_LICENCES.get(width or 0, _UNKNOWN_LICENCE),
            source=SOURCE,
            kind=("config.json", "model_type", "depth_anything"),
        )
        self._processor = import_class("transformers", "AutoImageProcessor").from_pretrained(
            str(folder), use_fast=False, local_files_only=True
        )
        network = import_class("transformers", "AutoModelForDepthEstimation").from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True
        )
        self._network: Any = network.to(self._device, self._dtype).eval()
        self._frames_at_once = frames_at_once

    def annotate_depth(self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]) -> Depths:
        """Maps frames `(f, H, W, 3)` to disparity of one scale and shift, or to metres for a metric network."""
        batches = range(0, len(rgb), self._frames_at_once)
        values = np.concatenate([self._estimate(rgb[start : start + self._frames_at_once]) for start in batches])
        check_shape(self, values, rgb.shape[:3])
        if not np.isfinite(values).all():
            raise ValueError(f"Depth Anything returned values that are not finite, in {self._dtype}; use float32")
        if self._network.config.depth_estimation_type == "metric":
            return Depths(np.maximum(values, _MIN_METRES), "depth")
        return Depths(steady_disparity(values), "disparity")

    @torch.inference_mode()
    def _estimate(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        beat()
        inputs = self._processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
        pixels = inputs["pixel_values"].to(self._device, self._dtype)
        outputs = self._network(pixel_values=pixels)
        outputs.predicted_depth = outputs.predicted_depth.float()
        found = self._processor.post_process_depth_estimation(outputs, target_sizes=[frames.shape[1:3]] * len(frames))
        return np.stack([result["predicted_depth"].cpu().numpy() for result in found])


def _backbone_width(config: Path) -> int | None:
    backbone = json.loads(config.read_text()).get("backbone_config")
    return backbone.get("hidden_size") if isinstance(backbone, dict) else None
