"""Runs one stage alone on held-out clips, for tools/claims.py: stage 1's pictures and maps, or stage 2 on given maps.

    python tools/claims_animate.py JOBS.json [PART/PARTS]

`animate` always feeds stage 2 with the maps of a stage 1. Here stage 2 gets maps of a chosen error: the true ones plus
`map_error` times what stage 1 got wrong (0 the true maps, 1 stage 1's own). Results have the layout of `animate`, so
that `evaluate` reads them; the maps in them are those that were given. A result that is complete is not made again.
"""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.logging import disable_progress_bar
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.evaluation.clips import open_clips, read_result, read_truth
from dreamdance.inference.animate import run_geometry
from dreamdance.inference.entry_inputs import EntryInputs, Size, load_inputs, read_entry_states
from dreamdance.inference.manifest import ManifestEntry, read_entries
from dreamdance.inference.results import ClipResult, is_done
from dreamdance.media.transforms import encode_normals, tensor_to_pictures
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.recipe import AnimateRecipe, load_recipe
from dreamdance.recipe.sections import Shards
from dreamdance.runs.exports import SAFE_LOADING, find_export, hash_export, read_export
from dreamdance.runs.files import hash_file, replace_atomically
from dreamdance.runs.finished_clips import INDEX_FILE
from dreamdance.runs.layout import ARRAYS_FILE, RESULT_FILE
from dreamdance.runtime.sample_random import sample_generator

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/demo/animate.yaml"


@dataclass(frozen=True)
class Job:
    """One model on all clips of a manifest.

    Attributes:
        stage: `geometry` runs stage 1, `animation` stage 2.
        overrides: words `KEY=VALUE` for recipes/demo/animate.yaml; they name manifest, output, runs, seed.
        truth: folder of the true clips' shards.
        maps: folder of stage 1's results, whose maps stage 2 gets; not needed if `map_error` is 0.
        map_error: how much of the error of `maps` stage 2 gets.
        align: `bones`, `scale` or `none` in place of what the manifest says.
    """

    stage: str
    overrides: tuple[str, ...]
    truth: str
    maps: str | None = None
    map_error: float = 0.0
    align: str | None = None

    @cached_property
    def recipe(self) -> AnimateRecipe:
        """The recipe with this job's words.

        Raises:
            RecipeError: a word is refused.
        """
        recipe = load_recipe(RECIPE, list(self.overrides))
        assert isinstance(recipe, AnimateRecipe)
        return recipe


def main(arguments: list[str]) -> int:
    """Runs every job of a file, or a part of each job's clips."""
    logging.disable(logging.INFO)
    disable_progress_bar()
    file, part = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), (arguments[1:] or ["0/1"])[0]
    first, step = (int(number) for number in part.split("/"))
    for values in file["jobs"]:
        job = Job(**{**values, "overrides": tuple(values["overrides"])})
        entries = read_entries(Path(job.recipe.manifest))
        made = sum(run(job, entry, Path(file["runs"])) for entry in entries[first::step])
        print(f"{job.recipe.output}: {made} of {len(entries[first::step])} clips made, part {part}", flush=True)
    return 0


def run(job: Job, entry: ManifestEntry, runs: Path) -> bool:
    """Makes the result of one clip unless it is there; returns whether it was made."""
    recipe = job.recipe
    if job.align is not None:
        entry = replace(entry, align=cast(Any, None if job.align == "none" else job.align))
    pipeline, weights = load_stage(job.stage, recipe, runs)
    if isinstance(pipeline, AnimationPipeline) and pipeline.reference_first:
        entry = replace(entry, needs_reference_pose=True)
    request = describe_request(job, entry, weights)
    folder = Path(recipe.output) / entry.id
    if is_done(folder, request):
        return False
    frame_size, map_size = Size(recipe.width, recipe.height), Size(recipe.geometry_width, recipe.geometry_height)
    inputs = load_inputs(entry, aspect=frame_size, pose_sizes={frame_size, map_size})
    generator = sample_generator((recipe.seed, entry.seed, entry.line), "claims")
    if isinstance(pipeline, GeometryPipeline):
        result, starts = _geometry(pipeline, inputs, recipe, generator), []
    else:
        normals, depths = _maps(job, entry, map_size)
        result = _animation(pipeline, inputs, normals, depths, entry, recipe, generator)
        window = recipe.animation.window_frames, recipe.animation.window_overlap
        starts = pipeline.window_starts(len(result.frames), *window)
    details = {"id": entry.id, "reference_frame": entry.reference_frame, "window_starts": starts}
    write(folder, result, {"request": request, "num_frames": len(result.frames), "fps": result.fps, **details})
    return True


def describe_request(job: Job, entry: ManifestEntry, weights: str) -> dict[str, Any]:
    """Everything that a clip depends on, except for the code: equal requests have equal results.

    Args:
        job: what is made.
        entry: the clip, aligned as the job says.
        weights: hash of the stage's export.

    Raises:
        EntryError: a file of the entry cannot be read.
        OSError: the truth, or stage 1's maps that the job names, are missing.
    """
    sizes = {"width", "height", "geometry_width", "geometry_height"}
    maps = None
    if job.stage == "animation":
        made = hash_file(Path(cast(str, job.maps)) / entry.id / ARRAYS_FILE) if job.map_error else None
        # the index has the hashes of the true clips' shards
        maps = {"truth": hash_file(Path(job.truth) / INDEX_FILE), "made": made, "error": job.map_error}
    return {
        "stage": job.stage,
        "weights": weights,
        "inputs": {name: state.sha256 for name, state in read_entry_states(entry).items()},
        "entry": [entry.line, entry.seed, entry.fps, entry.reference_frame, entry.align],
        "settings": job.recipe.model_dump(mode="json", include={"seed", "geometry", "animation", *sizes}),
        "maps": maps,
    }


def write(folder: Path, result: ClipResult, content: dict[str, Any]) -> None:
    """Writes what `evaluate` reads, and no videos, which take as long as a stage; a result is complete or not there."""
    assert result.normals is not None, "both stages have maps"
    assert result.depths is not None, "both stages have maps"
    with replace_atomically(folder, is_only_writer=True) as temporary:
        temporary.mkdir(parents=True)
        np.savez_compressed(
            temporary / ARRAYS_FILE,
            frames=tensor_to_pictures(result.frames),
            normals=np.moveaxis(result.normals.numpy(), 1, -1).astype(np.float16),
            depths=result.depths[:, 0].numpy().astype(np.float16),
        )
        sizes = {ARRAYS_FILE: (temporary / ARRAYS_FILE).stat().st_size}
        (temporary / RESULT_FILE).write_text(json.dumps({**content, "sizes": sizes}) + "\n", encoding="utf-8")


def load_stage(stage: str, recipe: AnimateRecipe, runs: Path) -> tuple[GeometryPipeline | AnimationPipeline, str]:
    """The pipeline of the run that the recipe names for a stage, and the hash of its weights."""
    return _load(stage, str(recipe.geometry_from if stage == "geometry" else recipe.animation_from), runs)


@cache
def _load(stage: str, name: str, runs: Path) -> tuple[GeometryPipeline | AnimationPipeline, str]:
    pipeline: GeometryPipeline | AnimationPipeline
    # `find_export` looks beside the run folder of the caller.
    if stage == "geometry":
        folder = find_export(name, runs / "claims", GeometryPipeline, key="geometry_from")
        pipeline = GeometryPipeline.from_pretrained(folder, torch_dtype=torch.float32, **SAFE_LOADING)
    else:
        folder = find_export(name, runs / "claims", AnimationPipeline, key="animation_from")
        pipeline = AnimationPipeline.from_pretrained(folder, torch_dtype=torch.float32, **SAFE_LOADING)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, hash_export(folder, read_export(folder, {}))


def _geometry(
    pipeline: GeometryPipeline, inputs: EntryInputs, recipe: AnimateRecipe, generator: torch.Generator
) -> ClipResult:
    """Stage 1's maps, with its own pictures as the frames."""
    poses = inputs.poses[Size(recipe.geometry_width, recipe.geometry_height)]
    normals, depths, images = run_geometry(pipeline, inputs.reference, poses, recipe, generator)
    return ClipResult(inputs.reference, poses, images[0], normals[0], depths[0], inputs.fps)


def _animation(
    pipeline: AnimationPipeline,
    inputs: EntryInputs,
    normals: Tensor,
    depths: Tensor,
    entry: ManifestEntry,
    recipe: AnimateRecipe,
    generator: torch.Generator,
) -> ClipResult:
    """Stage 2's frames; a reference that comes first has the maps of its own frame."""
    size = Size(recipe.width, recipe.height)
    maps, of_reference = {"normal": encode_normals(normals)[None], "depth": depths[None]}, None
    if pipeline.reference_first:
        own = cast(int, entry.reference_frame)
        of_reference = {"pose": inputs.reference_poses[size], **{name: clip[:, own] for name, clip in maps.items()}}
    (frames,) = cast(
        tuple[Tensor],
        pipeline(
            inputs.reference,
            inputs.poses[size],
            maps=maps,
            reference_maps=of_reference,
            height=size.height,
            width=size.width,
            fps=pipeline.trained_fps or inputs.fps,
            **recipe.animation.model_dump(),
            generator=generator,
            output_type="pt",
            return_dict=False,
        ),
    )
    return ClipResult(inputs.reference, inputs.poses[size], frames[0], normals, depths, inputs.fps)


def _maps(job: Job, entry: ManifestEntry, size: Size) -> tuple[Tensor, Tensor]:
    """Normals `f 3 h w` and depths `f 1 h w`: the true ones plus `map_error` times stage 1's error."""
    clips, numbers = _truth(job.truth)
    shape = (size.height, size.width)
    true = read_truth(clips.clip(numbers[entry.id]), frame_size=shape, map_size=shape).pictures
    assert true.normals is not None, "rendered dancers have normals"
    assert true.disparity is not None, "rendered dancers have depth"
    normals, depths = true.normals, true.disparity
    if job.map_error != 0.0:
        made = read_result(Path(cast(str, job.maps)) / entry.id).prediction
        assert made.normals is not None, "stage 1 makes normals"
        assert made.disparity is not None, "stage 1 makes depth"
        normals = mix_normals(normals, made.normals, job.map_error)
        depths = (depths + job.map_error * (made.disparity - depths)).clip(0.0, 1.0)
    return torch.from_numpy(np.moveaxis(normals, -1, 1).copy()), torch.from_numpy(depths.copy())[:, None]


def mix_normals(true: NDArray[np.float32], made: NDArray[np.float32], error: float) -> NDArray[np.float32]:
    """Unit vectors `... 3`: the true normals moved by `error` times the way to the made ones; never of length zero."""
    moved = true + error * (made - true)
    length = np.linalg.norm(moved, axis=-1, keepdims=True)
    mixed: NDArray[np.float32] = np.where(length > 1e-6, moved / np.maximum(length, 1e-6), true).astype(np.float32)
    return mixed


@cache
def _truth(folder: str) -> tuple[StoredClips, Mapping[str, int]]:
    clips = open_clips(Shards(local=folder))
    return clips, {clips.clip(number).clip_id: number for number in range(len(clips))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
