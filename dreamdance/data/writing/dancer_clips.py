"""Clips of rendered dancers, in the encodings of the shards. A new map of dancers is one more entry of `maps` here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.render import render_clip
from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.clip_record import ClipRecord, References, spread_over
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.recipe.schema import DancersSource
from dreamdance.runs.layout import DRIVEN_BY

# The references of a dancer are spread over this number of frames, which begin with the clip.
VIDEO_FRAMES = 360


def clip_name(seed: int) -> str:
    """The id of a dancer's own clip."""
    return f"dancer_{seed:010d}"


def render_record(seed: int, source: DancersSource, *, person_seed: int | None = None) -> ClipRecord:
    """Renders one dancer as a clip. Maps that were added since the first version are listed in `ADDED_TO_DANCERS`.

    Args:
        seed: of the dancer.
        source: size and length of the clip.
        person_seed: another dancer, who performs the motion of `seed` in the clothes and at the place of its own clip.
            The metadata then name `seed`'s clip, whose poses drive this one.
    """
    size = {"width": source.width, "height": source.height}
    pair: dict[str, Any] = {}
    if person_seed is not None:
        pair = {"identity_seed": person_seed, "place_seed": person_seed, DRIVEN_BY: clip_name(seed)}
    positions = spread_over(max(VIDEO_FRAMES, source.num_frames), source.references)
    further_times = [position / source.fps for position in positions]
    clip = render_clip(
        seed,
        num_frames=source.num_frames,
        fps=source.fps,
        further_times=further_times,
        identity_seed=person_seed,
        place_seed=person_seed,
        **size,
    )
    disparity, depth_range = encode_disparity(clip.depth)
    maps: dict[str, NDArray[Any]] = {
        "rgb": clip.rgb,
        "pose": draw_poses(clip.keypoints, **size),
        "normal": encode_normal(clip.normal),
        "depth": disparity,
        "mask": clip.mask.astype(np.uint8) * np.uint8(255),
    }
    own, further = slice(source.num_frames), slice(source.num_frames, None)
    references = References(
        positions, {name: frames[further] for name, frames in maps.items()}, clip.keypoints[further]
    )
    return ClipRecord(
        clip_id=clip_name(seed) if person_seed is None else f"{clip_name(person_seed)}_as_{seed:010d}",
        fps=source.fps,
        maps={name: frames[own] for name, frames in maps.items()},
        keypoints=clip.keypoints[own],
        metadata={
            "source": "dancers",
            "seed": seed,
            **pair,
            "depth_range": list(depth_range),
            "intrinsics": clip.intrinsics.tolist(),
        },
        references=references if positions else None,
    )
