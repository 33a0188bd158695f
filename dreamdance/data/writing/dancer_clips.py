"""Clips of rendered dancers, in the encodings of the shards. A new map of dancers is one more entry of `maps` here."""

import numpy as np

from dreamdance.dancers.render import render_clip
from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.shard_parts import ClipRecord
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.recipe.schema import DancersSource


def render_record(seed: int, source: DancersSource) -> ClipRecord:
    """Renders one dancer as a clip. Maps that were added since the first version are listed in `ADDED_TO_DANCERS`."""
    clip = render_clip(seed, num_frames=source.num_frames, width=source.width, height=source.height, fps=source.fps)
    disparity, depth_range = encode_disparity(clip.depth)
    return ClipRecord(
        clip_id=f"dancer_{seed:010d}",
        fps=source.fps,
        maps={
            "rgb": clip.rgb,
            "pose": draw_poses(clip.keypoints, width=source.width, height=source.height),
            "normal": encode_normal(clip.normal),
            "depth": disparity,
            "mask": clip.mask.astype(np.uint8) * np.uint8(255),
        },
        keypoints=clip.keypoints,
        metadata={
            "source": "dancers",
            "seed": seed,
            "depth_range": list(depth_range),
            "intrinsics": clip.intrinsics.tolist(),
        },
    )
