"""The fixed clips of a set that validation and samples show."""

from collections.abc import Sequence
from dataclasses import replace

from dreamdance.data.loading.batch import ClipSample
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.stored_clip import first_window
from dreamdance.modalities import OPTIONAL
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runtime.ranks import Ranks


def fixed_clips(
    shards: Shards,
    *,
    width: int,
    height: int,
    num_frames: int,
    count: int,
    stride: int = 1,
    maps: Sequence[str] | None = None,
    verify: Verify = "first_use",
    share_of: Ranks | None = None,
    reference_first: bool = False,
) -> list[ClipSample]:
    """The first clips of a set, always the same ones, for validation and samples.

    Args:
        shards, width, height, num_frames, verify: see `ClipDataset`.
        count: number of clips; a smaller set gives all its clips.
        stride: distance between the frames of the window.
        maps: the modalities to read besides rgb and pose; None reads those that all of these clips have.
        reference_first: whether the reference, with its own maps, is the first of the `num_frames` frames.
        share_of: if given, rank r of n ranks gets only the clips r, r + n, ...; that may be none.

    Returns:
        The first window of each clip with the reference of `stored_clip.fixed_reference`; the key is (0, 0, number of
        the clip).

    Raises:
        ShardError: shards are missing, damaged or of another format, or a clip is shorter than the window.
    """
    dataset = ClipDataset(
        shards, width=width, height=height, num_frames=num_frames, maps=maps or (), verify=verify, cache_bytes=0
    )
    clips = [dataset.clip(number) for number in range(min(count, len(dataset)))]
    if maps is None:
        dataset.maps = tuple(name for name in OPTIONAL if all(clip.has(name) for clip in clips))
    windows = [
        replace(
            first_window(clip, num_frames=num_frames - reference_first, stride=stride), reference_first=reference_first
        )
        for clip in clips
    ]  # for all clips, so that all ranks raise the same errors
    ranks = share_of or Ranks()
    share = range(ranks.rank, len(clips), ranks.world_size)
    return [dataset.cut(clips[number], windows[number], (0, 0, number)).floats() for number in share]
