"""Results in the form of `animate`, and the truth that they are compared with."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dreamdance.data.prepare import prepare
from dreamdance.evaluation.clips import Size, Truth, open_clips, read_truth
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.recipe.sections import Shards


def write_result(
    folder: Path,
    name: str,
    frames: Any,
    normals: Any = None,
    depths: Any = None,
    *,
    reference_frame: int | None,
    fps: float,
) -> None:
    """Writes a result in the form of `animate`.

    Args:
        folder: of all results.
        name: the clip's id.
        frames: `f H W 3` in [0, 1].
        normals: `f h w 3` unit vectors, or None.
        depths: `f h w` disparity in [0, 1], or None.
        reference_frame: its number, or None.
        fps: frames per second.
    """
    (folder / name).mkdir(parents=True)
    arrays = {"frames": np.rint(np.asarray(frames) * 255).astype(np.uint8)}
    if normals is not None:
        arrays |= {"normals": normals.astype(np.float16), "depths": depths.astype(np.float16)}
    np.savez_compressed(folder / name / "arrays.npz", **arrays)
    (folder / name / "result.json").write_text(json.dumps({"fps": fps, "reference_frame": reference_frame}))


def prepare_dancers(folder: Path, **dancers: Any) -> None:
    """Runs the real task `prepare` with these keys of its section `dancers`."""
    values = {"task": "prepare", "name": "tiny_prepare", "output": str(folder), "num_workers": 1, "dancers": dancers}
    prepare(PrepareRecipe.model_validate_json(json.dumps(values)), folder / "run")


def read_truths(shards: Path, *, frame_size: Size, map_size: Size) -> dict[str, Truth]:
    """Id -> the truth of all clips of a folder of shards."""
    clips = open_clips(Shards(local=str(shards)))
    stored = [clips.clip(number) for number in range(len(clips))]
    return {clip.clip_id: read_truth(clip, frame_size=frame_size, map_size=map_size) for clip in stored}
