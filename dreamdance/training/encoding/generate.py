"""The maps that a trained stage 1 makes of the poses and references of a folder of shards, for the training of stage 2.

The maps of a clip are made as in `animate`: from its poses and one reference, the farthest one (`fixed_reference`).
Those of a stored reference are made from its own picture and pose, as a clip of one frame. The noise is keyed by the
clip, so that neither the ranks nor a restart change a map.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.annotators.heartbeats import beat
from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, Window, fixed_reference
from dreamdance.data.shards.columns import encode_normal
from dreamdance.data.shards.generated_maps import MapSettings, map_sample
from dreamdance.data.shards.latents import source_digest
from dreamdance.data.shards.tracks import Subject
from dreamdance.errors import RecipeError
from dreamdance.pipelines import GeometryPipeline
from dreamdance.recipe.schema import EncodeRecipe
from dreamdance.runs.exports import SAFE_LOADING, find_export, hash_export, read_export
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.sample_random import sample_generator


class MapGenerator:
    """A trained stage 1, and the poses and references of the shards as a training shows them."""

    def __init__(self, recipe: EncodeRecipe, run_folder: Path, ranks: Ranks) -> None:
        """Opens the export and the shards.

        Raises:
            MissingInputError: there is no such export.
            RecipeError: the export is of stage 2, or cannot run with the recipe's windows.
            ShardError: the shards are missing or damaged.
        """
        assert recipe.geometry_from is not None, "the caller checks it"
        self.recipe, self.device = recipe, ranks.device
        export = find_export(recipe.geometry_from, run_folder, GeometryPipeline, key="geometry_from")
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.pipeline = GeometryPipeline.from_pretrained(export, torch_dtype=dtype, **SAFE_LOADING).to(ranks.device)
        self.pipeline.set_progress_bar_config(disable=True)
        network, frames = self.pipeline.unet.config, recipe.geometry.window_frames
        trained = network.trained_frames or network.max_frames
        if network.temporal_attention and frames > trained:
            raise RecipeError(
                f"geometry.window_frames {frames} is more than the {trained} frames that the stage 1 of geometry_from "
                f"was trained on; set it to {trained} or less"
            )
        self.export_digest = hash_export(export, read_export(export, {}))
        self.clips = ClipDataset(
            recipe.shards, width=recipe.width, height=recipe.height, num_frames=1, ranks=ranks, cache_bytes=0
        )

    def settings(self) -> MapSettings:
        """What decides the content of the folder of maps."""
        return MapSettings(
            source=source_digest(self.clips.index),
            geometry=self.export_digest,
            width=self.recipe.width,
            height=self.recipe.height,
            sampling=self.recipe.geometry.model_dump(mode="json"),
            seed=self.recipe.seed,
            precision=self.recipe.precision,
        )

    def generate(self, sample_id: int) -> Iterator[dict[str, Any] | None]:
        """Makes the maps of a clip; yields None now and then, and the columns of its sample last."""
        clip = self.clips.clip(sample_id)
        maps: dict[Subject, dict[str, NDArray[Any]]] = {}
        batch = self._pictures(clip, list(range(clip.num_frames)), fixed_reference(clip))
        maps["clip"] = self._sample(batch.reference, batch.pose, sample_id, "generated maps")
        yield None
        own = list[dict[str, NDArray[Any]]]()
        for number in range(len(clip.reference_positions)):
            batch = self._pictures(clip, [], ReferenceFrame(number, "references"))
            own.append(self._sample(batch.reference, batch.pose, sample_id, f"generated maps of reference {number}"))
            yield None
        if own:
            maps["references"] = {name: np.concatenate([each[name] for each in own]) for name in own[0]}
        yield map_sample(clip.frameless_head, maps)

    def _pictures(self, clip: StoredClip, frames: list[int], reference: ReferenceFrame) -> ClipBatch:
        """Poses of frames and a reference of a clip; without frames, the reference's own pose."""
        window = Window(frames=frames, stride=1, reference=reference, flip=False, reference_first=not frames)
        return collate_clips([self.clips.cut(clip, window, (0, 0, 0), left_out={"rgb"})]).to(self.device)

    def _sample(self, reference: Tensor, poses: Tensor, sample_id: int, purpose: str) -> dict[str, NDArray[Any]]:
        sampling = self.recipe.geometry
        normals, depths, _ = cast(
            tuple[Tensor, Tensor, Tensor],
            self.pipeline(
                reference,
                poses,
                height=self.recipe.height,
                width=self.recipe.width,
                guidance_scales=sampling.guidance_scales.in_order,
                **sampling.model_dump(exclude={"guidance_scales"}),
                generator=sample_generator((self.recipe.seed, 0, sample_id), purpose),
                callback_on_step_end=_beat,
                output_type="pt",
                return_dict=False,
            ),
        )
        disparity = depths[0, :, 0].clamp(0, 1).double() * np.iinfo(np.uint16).max
        return {
            "normal": encode_normal(rearrange(normals[0], "f c h w -> f h w c").float().cpu().numpy()),
            "depth": np.rint(disparity.cpu().numpy()).astype(np.uint16),
        }


def _beat(*_: Any) -> None:
    """Shows the watchdog that a long clip is being sampled; the callback of a denoising step."""
    beat()
