"""Small folders of real shards with rendered dancers, for the tests of training."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS, render_clip
from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.shard_writer import ClipRecord, Part, ShardFormat, write_shards
from dreamdance.media.pose_drawing import draw_pose

WIDTH, HEIGHT, NUM_FRAMES = 16, 24, 6


def write_dancer_shards(folder: Path, *, num_train: int = 10, num_validation: int = 3) -> None:
    """Writes `folder`/train and `folder`/validation."""
    for name, seeds in (("train", TRAINING_SEEDS[:num_train]), ("validation", HELD_OUT_SEEDS[:num_validation])):
        parts = [
            Part(f"part_{seeds[start]}", partial(_render, seeds[start : start + 4]))
            for start in range(0, len(seeds), 4)
        ]
        shard_format = ShardFormat(compression="none")
        write_shards(folder / name, parts, settings={"dancers": len(seeds)}, shard_format=shard_format)


def _render(seeds: range) -> Iterator[ClipRecord]:
    for seed in seeds:
        clip = render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT)
        depth, _ = encode_disparity(clip.depth)
        yield ClipRecord(
            clip_id=f"dancer_{seed}",
            fps=clip.fps,
            maps={
                "rgb": clip.rgb,
                "pose": np.stack([draw_pose(points, width=WIDTH, height=HEIGHT) for points in clip.keypoints]),
                "normal": encode_normal(clip.normal),
                "depth": depth,
                "mask": clip.mask.astype(np.uint8) * 255,
            },
            keypoints=clip.keypoints,
        )
