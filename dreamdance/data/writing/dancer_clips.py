"""Clips of rendered dancers, in the encodings of the shards. A new map of dancers is one more entry of `maps` here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.render import render_clip
from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.clip_record import ClipRecord, References, spread_over
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.recipe.schema import DancersSource

# The references of a dancer are spread over this number of frames, which begin with the clip.
VIDEO_FRAMES = 360


def render_record(seed: int, source: DancersSource) -> ClipRecord:
    """Renders one dancer as a clip. Maps that were added since the first version are listed in `ADDED_TO_DANCERS`."""
    size = {"width": source.width, "height": source.height}
    positions = spread_over(max(VIDEO_FRAMES, source.num_frames), source.references)
    further_times = [position / source.fps for position in positions]
    clip = render_clip(seed, num_frames=source.num_frames, fps=source.fps, further_times=further_times, **size)
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
        clip_id=f"dancer_{seed:010d}",
        fps=source.fps,
        maps={name: frames[own] for name, frames in maps.items()},
        keypoints=clip.keypoints[own],
        metadata={
            "source": "dancers",
            "seed": seed,
            "depth_range": list(depth_range),
            "intrinsics": clip.intrinsics.tolist(),
        },
        references=references if positions else None,
    )
