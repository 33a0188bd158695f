"""Small folders of videos like those of users, some damaged, for the tests of `prepare`."""

from pathlib import Path
from typing import Any

import av
import numpy as np

from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.media.video import write_video
from dreamdance.recipe.schema import PrepareRecipe, VideosSource
from dreamdance.recipe.sections import Shards

FPS = 8


def write_videos(folder: Path, name: str, *, num_frames: int = 20, with_maps: bool = False, seed: int = 0) -> None:
    """A letterboxed video and its maps: bars of 16 pixels above and below, 8 on the left, moving blocks between."""
    generator = np.random.default_rng(seed)
    for modality in ("rgb", "pose", *(("normal", "depth") if with_maps else ())):
        blocks = generator.integers(60, 256, (num_frames, 8, 7, 3), dtype=np.uint8)
        frames = np.zeros((num_frames, 96, 64, 3), np.uint8)
        frames[:, 16:80, 8:] = blocks.repeat(8, axis=1).repeat(8, axis=2)
        write_video(folder / f"{name}.{modality}.mp4", frames, fps=FPS)


def damage_video(path: Path, *, packet: int = 12) -> None:
    """Overwrites the stored data of one frame of a video; the header does not show the damage."""
    with av.open(str(path)) as container:
        packets = [one for one in container.demux(video=0) if one.size]
        place, size = packets[packet].pos, packets[packet].size
    assert place is not None, "this container does not state the places of its packets"
    content = bytearray(path.read_bytes())
    content[place + 4 : place + size] = b"\xff" * (size - 4)
    path.write_bytes(content)


def videos_recipe(output: Path, folder: Path, *, num_workers: int = 1, **changes: Any) -> PrepareRecipe:
    """A recipe that cuts a folder's videos into clips of 8 frames; PNG shows whether pictures are the right ones."""
    source = VideosSource(**{"folder": str(folder), "clip_frames": 8, "min_clip_frames": 4, **changes})
    return PrepareRecipe(
        name="p", task="prepare", output=str(output), videos=source, num_workers=num_workers, rgb_format="png"
    )


def stored_clips(output: Path, split: str) -> list[StoredClip]:
    """All clips of a split."""
    clips = StoredClips(Shards(local=str(output / split)))
    return [clips.clip(number) for number in range(len(clips))]
