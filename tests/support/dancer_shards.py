"""Small folders of real shards with rendered dancers, for the tests of training."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from dreamdance.dancers.render import HELD_OUT_SEEDS, TRAINING_SEEDS
from dreamdance.data.writing.dancer_clips import render_record
from dreamdance.data.writing.shard_writer import ClipRecord, Part, ShardFormat, write_shards
from dreamdance.recipe.schema import DancersSource

WIDTH, HEIGHT, NUM_FRAMES = 16, 24, 6


def write_dancer_shards(folder: Path, *, num_train: int = 10, num_validation: int = 3, references: int = 12) -> None:
    """Writes `folder`/train and `folder`/validation, clips with a number of references."""
    for name, seeds in (("train", TRAINING_SEEDS[:num_train]), ("validation", HELD_OUT_SEEDS[:num_validation])):
        parts = [
            Part(f"part_{seeds[start]}", partial(_render, seeds[start : start + 4], references))
            for start in range(0, len(seeds), 4)
        ]
        shard_format = ShardFormat(compression="none")
        write_shards(folder / name, parts, settings={"dancers": len(seeds)}, shard_format=shard_format)


def _render(seeds: range, references: int) -> Iterator[ClipRecord]:
    source = DancersSource(
        num_train_clips=1,
        num_validation_clips=1,
        num_frames=NUM_FRAMES,
        width=WIDTH,
        height=HEIGHT,
        references=references,
    )
    return (replace(render_record(seed, source), clip_id=f"dancer_{seed}", metadata={}) for seed in seeds)
