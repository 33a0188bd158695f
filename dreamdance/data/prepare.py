"""The `prepare` task: writes the shards that training reads (C9), and what `animate` needs to try held-out clips.

`output/train` and `output/validation` are folders of shards; `output/manifest.jsonl` lists the validation clips, each
with a reference picture and its poses in `output/examples/<clip>`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dreamdance.crew import Crew
from dreamdance.data.clips import StoredClips
from dreamdance.data.dancers import HELD_OUT_SEEDS, TRAINING_SEEDS, render_clip
from dreamdance.data.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.data.pose_drawing import draw_poses
from dreamdance.data.schema import encode_disparity, encode_normal
from dreamdance.data.shard_writer import ClipRecord, Part, ShardFormat, write_shards
from dreamdance.data.stored_clip import StoredClip
from dreamdance.data.streaming_compat import INDEX_FILE
from dreamdance.data.video_clips import Split, VideoPart, choose_validation, describe_files, find_videos
from dreamdance.data.video_io import write_video
from dreamdance.folder_claim import claim_folder
from dreamdance.ranks import Ranks
from dreamdance.recipe.schema import DancersSource, PrepareRecipe, VideosSource
from dreamdance.recipe.sections import Shards
from dreamdance.run_layout import ProgressLog

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.jsonl"
EXAMPLES_FOLDER = "examples"


def prepare(recipe: PrepareRecipe, run_folder: Path) -> None:
    """Writes the shards of a recipe; started again after a kill it goes on, and does nothing where all is done.

    Args:
        recipe: names dancers or videos, and the output folder.
        run_folder: for the progress log, and the note of what is done.

    Raises:
        UserError: no or unusable videos, or an output folder of other settings.
        LostWorkerError: another rank is lost, or a process of this one.
    """
    ranks = Ranks.from_environment()
    progress = ProgressLog(run_folder, ranks)
    output = Path(recipe.output)
    shard_format = ShardFormat(shard_size_mib=recipe.shard_size_mib, compression=recipe.compression)
    parts = plan_parts(recipe)
    total = sum(len(planned) for planned in parts.values())
    done_before = 0

    def report(split: Split, done: int, _: int) -> None:
        progress.write(done=done_before + done, total=total, unit="parts", message=f"writing {output / split}")

    claim = claim_folder(output, key="output") if ranks.is_main else nullcontext()
    with claim, Crew(ranks, cluster=recipe.cluster, run_folder=run_folder) as crew:
        for split, planned in parts.items():
            write_shards(
                output / split,
                planned,
                settings={**describe_source(recipe), "split": split, "shard_size_mib": recipe.shard_size_mib},
                shard_format=shard_format,
                num_workers=recipe.num_workers,
                crew=crew,
                on_part=partial(report, split),
            )
            done_before += len(planned)
        if ranks.is_main and "validation" in parts:
            count = write_examples(output, before_clip=partial(crew.watchdog.enter, "writing an example"))
            logger.info("%s lists %d validation clips for `animate`", output / MANIFEST_FILE, count)
    progress.write(done=total, total=total, unit="parts", message=f"{output} is complete")


def describe_source(recipe: PrepareRecipe) -> dict[str, Any]:
    """All settings that decide the content of the clips, and no others."""
    source = recipe.dancers or recipe.videos
    if source is None:
        raise ValueError("a prepare recipe names either `dancers` or `videos`")  # recipe.rules has refused it
    details: dict[str, Any] = {"clips_per_part": recipe.clips_per_part, **source.model_dump(mode="json")}
    if isinstance(source, VideosSource):
        details.update(seed=recipe.seed, files=describe_files(source.folder))
    return details


def plan_parts(recipe: PrepareRecipe) -> dict[Split, list[Part]]:
    """Divides the work of both splits into parts, the same on every rank.

    Raises:
        MissingInputError: no usable videos.
    """
    if recipe.dancers is not None:
        return plan_dancers(recipe.dancers, recipe.clips_per_part)
    if recipe.videos is None:
        raise ValueError("a prepare recipe names either `dancers` or `videos`")
    return plan_videos(recipe.videos, recipe.seed)


def plan_dancers(source: DancersSource, clips_per_part: int) -> dict[Split, list[Part]]:
    """Parts of `clips_per_part` dancers; training and validation take theirs from disjoint ranges of seeds."""
    seeds: dict[Split, range] = {
        "train": TRAINING_SEEDS[: source.num_train_clips],
        "validation": HELD_OUT_SEEDS[: source.num_validation_clips],
    }
    return {
        split: [
            Part(f"part_{number:05d}", DancerPart(source, chosen[start : start + clips_per_part]))
            for number, start in enumerate(range(0, len(chosen), clips_per_part))
        ]
        for split, chosen in seeds.items()
    }


def plan_videos(source: VideosSource, seed: int) -> dict[Split, list[Part]]:
    """One part for each video and split that it belongs to."""
    names = find_videos(source.folder)
    splits: dict[Split, list[str]] = {"train": names, "validation": names}
    if source.split_by == "clip":
        held_out = choose_validation(names, fraction=source.validation_fraction, seed=seed)
        splits = {
            "train": [name for name in names if name not in held_out],
            "validation": [name for name in names if name in held_out],
        }
    if source.validation_fraction == 0:
        del splits["validation"]
    return {
        split: [Part(f"part_{number:05d}", VideoPart(source, name, split)) for number, name in enumerate(chosen)]
        for split, chosen in splits.items()
    }


@dataclass(frozen=True)
class DancerPart:
    """Some dancers, rendered in the worker that writes them."""

    source: DancersSource
    seeds: range

    def __call__(self) -> Iterator[ClipRecord]:
        """Yields one clip per seed."""
        return (render_record(seed, self.source) for seed in self.seeds)


def render_record(seed: int, source: DancersSource) -> ClipRecord:
    """Renders one dancer in the encodings of the shards."""
    clip = render_clip(seed, num_frames=source.num_frames, width=source.width, height=source.height, fps=source.fps)
    disparity, depth_range = encode_disparity(clip.depth)
    return ClipRecord(
        clip_id=f"dancer_{seed:010d}",
        fps=source.fps,
        rgb=clip.rgb,
        pose=draw_poses(clip.keypoints, width=source.width, height=source.height),
        normal=encode_normal(clip.normal),
        depth=disparity,
        mask=clip.mask.astype("uint8") * 255,
        keypoints=clip.keypoints,
        metadata={
            "source": "dancers",
            "seed": seed,
            "depth_range": list(depth_range),
            "intrinsics": clip.intrinsics.tolist(),
        },
    )


def write_examples(output: Path, *, before_clip: Callable[[str], None]) -> int:
    """Writes reference and poses of each validation clip, and the manifest, last.

    The reference is the clip's last frame: the one that `data.clips.fixed_clips` shows too.

    Args:
        output: where `validation` lies.
        before_clip: called with the clip's number in words, before each.

    Returns:
        The number of clips.
    """
    manifest, index = output / MANIFEST_FILE, output / "validation" / INDEX_FILE
    clips = StoredClips(Shards(local=str(output / "validation")), verify="size", ranks=Ranks())
    if manifest.exists() and manifest.stat().st_mtime_ns >= index.stat().st_mtime_ns:
        return len(clips)
    lines = []
    for number in range(len(clips)):
        before_clip(f"clip {number} of {len(clips)}")
        clip = clips.clip(number)
        folder = Path(EXAMPLES_FOLDER) / clip.clip_id
        (output / folder).mkdir(parents=True, exist_ok=True)
        reference = clip.frames("rgb", [clip.num_frames - 1])[0]
        Image.fromarray(reference).save(output / folder / "reference.png")
        entry = {
            "id": clip.clip_id,
            "image": str(folder / "reference.png"),
            **_write_poses(clip, output, folder),
            "seed": number,
            "align": False,
            "fps": clip.fps,
            "reference_frame": clip.num_frames - 1,
        }
        lines.append(json.dumps(entry) + "\n")
    incoming = output / f".{MANIFEST_FILE}.incoming"
    incoming.write_text("".join(lines), encoding="utf-8")
    os.replace(incoming, manifest)
    return len(clips)


def _write_poses(clip: StoredClip, output: Path, folder: Path) -> dict[str, str]:
    """Writes the key points, or, where there are none, the drawings as a lossless video; returns the entry for it."""
    if clip.keypoints is not None:
        sequence = KeypointSequence(clip.keypoints, width=clip.width, height=clip.height, fps=clip.fps)
        write_keypoint_file(output / folder / "keypoints.json", sequence)
        return {"keypoints": str(folder / "keypoints.json")}
    write_video(output / folder / "pose.mkv", clip.frames("pose"), fps=clip.fps, lossless=True)
    return {"pose": str(folder / "pose.mkv")}
