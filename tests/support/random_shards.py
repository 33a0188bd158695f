"""Small folders of real shards whose frames are random pictures, for the tests of the data."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.shards.range_reads import check_extent
from dreamdance.data.shards.tracks import Extent, TrackClip, read_head
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.recipe.sections import Shards

WIDTH, HEIGHT = 8, 12


def random_clip(
    seed: int, *, num_frames: int = 6, width: int = WIDTH, height: int = HEIGHT, with_keypoints: bool = True
) -> ClipRecord:
    """A clip whose frames all differ; the top left value of frame i of rgb is i."""
    generator = np.random.default_rng(seed)
    pictures = {
        name: generator.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8) for name in ("rgb", "pose")
    }
    pictures["rgb"][:, 0, 0] = np.arange(num_frames, dtype=np.uint8)[:, None]
    normal = generator.normal((0.0, 0.0, 3.0), size=(num_frames, height, width, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return ClipRecord(
        clip_id=f"clip_{seed:04d}",
        fps=8.0,
        maps={
            **pictures,
            "normal": np.rint((normal + 1.0) * 127.5).astype(np.uint8),
            "depth": generator.integers(0, 65536, (num_frames, height, width), dtype=np.uint16),
            "mask": generator.integers(0, 2, (num_frames, height, width), dtype=np.uint8) * 255,
        },
        keypoints=generator.random((num_frames, 128, 3), dtype=np.float32) if with_keypoints else None,
        metadata={"seed": seed},
    )


def random_clips(seeds: range, **options: Any) -> Iterator[ClipRecord]:
    return (random_clip(seed, **options) for seed in seeds)


def random_parts(num_clips: int, *, clips_per_part: int = 4, **options: Any) -> list[Part]:
    return [
        Part(
            f"part_{start:05d}", partial(random_clips, range(start, min(start + clips_per_part, num_clips)), **options)
        )
        for start in range(0, num_clips, clips_per_part)
    ]


def write_random_shards(
    folder: Path, num_clips: int = 12, *, compression: Any = "none", clips_per_part: int = 4, **options: Any
) -> Shards:
    """Writes `num_clips` clips, `clips_per_part` to a shard."""
    write_shards(
        folder,
        random_parts(num_clips, clips_per_part=clips_per_part, **options),
        settings={"clips": num_clips},
        shard_format=ShardFormat(shard_size_mib=4, compression=compression),
    )
    return Shards(local=str(folder))


def stored_clip(record: ClipRecord, *, where: str = "sample 3", **options: Any) -> StoredClip:
    """A clip as a reader opens it, without a file."""
    sample = record.to_sample(**options)
    head = read_head(sample["clip"], frames_bytes=len(sample["frames"]), where=where)

    def read(extents: Sequence[Extent]) -> list[bytes]:
        frames = memoryview(sample["frames"])
        return [check_extent(frames[extent.start :][: extent.size], extent, where=where) for extent in extents]

    return StoredClip(TrackClip(head, read, size=None, where=where))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes a folder's index.json in place."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def flip_byte(path: Path, position: int = -20) -> None:
    """Damages one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(bytes(content))
