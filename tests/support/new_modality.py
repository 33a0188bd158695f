"""Takes the modality `part` from a video to the controller; run by a copy of the package whose table has that entry.

The arguments are a folder, for its work and `found.json`, and a folder of shards from before the entry.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dreamdance.data.loading.batch import ClipSample, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.prepare import prepare
from dreamdance.errors import ShardError
from dreamdance.inference.manifest import read_entries
from dreamdance.media.video import write_video
from dreamdance.recipe.sections import Shards
from dreamdance.training.stages.training_stage import stage_of
from support.recipes import HEIGHT, WIDTH, perturb, record_inputs, tiny_stage2_recipe
from support.video_folders import FPS, stored_clips, videos_recipe, write_videos


def main(folder: Path, older: Path) -> None:
    """Prepares a video, trains one batch, draws a sample, and reads a manifest and older shards."""
    write_videos(folder / "videos", "a")
    bright = np.zeros((20, 96, 64, 3), np.uint8)
    bright[:, 32:64] = 250
    write_video(folder / "videos" / "a.part.mp4", bright, fps=FPS)
    prepare(videos_recipe(folder / "data", folder / "videos", split_by="time", validation_fraction=0.4), folder / "run")
    stored = stored_clips(folder / "data", "train")[0].frames("part")

    recipe = tiny_stage2_recipe({"model.controls": ["pose", "part"]})
    stage = stage_of(recipe)
    batch = collate_clips([read(folder / "data" / "train", stage.maps)])
    objective = perturb(stage.build()).eval()
    calls = record_inputs(objective.controller)
    objective(batch).loss.backward()
    (maps,) = calls[0][0]
    samples = stage.sample(objective, batch)

    (folder / "manifest.jsonl").write_text(
        json.dumps({"id": "a", "image": "a.png", "pose": "videos/a.pose.mp4", "part": "videos/a.part.mp4"}) + "\n"
    )
    (entry,) = read_entries(folder / "manifest.jsonl")
    found = {
        "bright rows": [int(value) for value in stored[0, :, 20]],
        "read besides rgb and pose": list(stage.maps),
        "shape": list(batch.maps["part"].shape),
        "values": batch.maps["part"].unique().tolist(),
        "reaches the controller": torch.equal(maps["part"], batch.maps["part"].flatten(0, 1)),
        "gradient": float(objective.controller.encoders["part"].conv_in.weight.grad.abs().sum()),
        "a sample is finite": bool(samples.predictions["rgb"].isfinite().all()),
        "maps of the manifest": {name: path.name for name, path in entry.maps.items()},
        "maps of older shards": list(read(older, ["mask"]).maps),
    }
    try:
        read(older, ["part"])
    except ShardError as error:
        found["refusal"] = str(error)
    (folder / "found.json").write_text(json.dumps(found))


def read(shards: Path, maps: Sequence[str]) -> ClipSample:
    """A training window of the first stored clip."""
    clips = ClipDataset(Shards(local=str(shards)), width=WIDTH, height=HEIGHT, num_frames=4, maps=maps)
    return clips.training_sample(SampleKey(0, 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
