"""The seam for networks that make maps from pictures: pose, normals, depth. None is built in; each has its own weights.

An annotator is named by where it is made, `package.module:factory`, so that one that lives in another package needs no
change here. It is called with a clip's frames and returns its result in this package's conventions (contract C9).
"""

import importlib
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.shard_parts import ClipRecord
from dreamdance.errors import MissingInputError
from dreamdance.media.keypoints import NUM_KEYPOINTS
from dreamdance.media.pose_drawing import draw_poses


@runtime_checkable
class PoseAnnotator(Protocol):
    """Finds the person's key points."""

    def annotate_pose(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """From frames `(f, H, W, 3)` uint8: `(f, 128, 3)` float32, x and y in [0,1] of the frame, confidence."""


@runtime_checkable
class NormalAnnotator(Protocol):
    """Estimates the normals of all that is seen."""

    def annotate_normal(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """From frames `(f, H, W, 3)` uint8: `(f, H, W, 3)` float32, unit length, x right, y up, z to the camera."""


@runtime_checkable
class DepthAnnotator(Protocol):
    """Estimates the depth of all that is seen."""

    def annotate_depth(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """From frames `(f, H, W, 3)` uint8: `(f, H, W)` float32, positive; metres, or any unit of its own."""


Annotator = PoseAnnotator | NormalAnnotator | DepthAnnotator


def load_annotator(name: str, **options: Any) -> Annotator:
    """Makes the annotator of a name.

    Args:
        name: `package.module:factory`.
        options: the factory's arguments (paths of weights, devices).

    Raises:
        MissingInputError: no such module or factory, or what it makes annotates nothing.
    """
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MissingInputError(
            f"annotator '{name}' cannot be made, it is named 'package.module:factory': {error}"
        ) from error
    annotator = factory(**options)
    if not isinstance(annotator, PoseAnnotator | NormalAnnotator | DepthAnnotator):
        raise MissingInputError(
            f"'{name}' makes a {type(annotator).__name__}, which has no annotate_pose, _normal or _depth"
        )
    return annotator


def annotate_clip(record: ClipRecord, annotator: Annotator) -> ClipRecord:
    """Returns the clip with what the annotator adds to it; maps that were there are replaced.

    Raises:
        ValueError: the annotator's result has another shape than it promises.
    """
    rgb, maps, metadata = record.maps["rgb"], dict(record.maps), record.metadata
    num_frames, height, width = rgb.shape[:3]
    if isinstance(annotator, PoseAnnotator):
        keypoints = np.asarray(annotator.annotate_pose(rgb), dtype=np.float32)
        _check_shape(annotator, keypoints, (num_frames, NUM_KEYPOINTS, 3))
        record = replace(record, keypoints=keypoints)
        maps["pose"] = draw_poses(keypoints, width=width, height=height)
    if isinstance(annotator, NormalAnnotator):
        normal = annotator.annotate_normal(rgb)
        _check_shape(annotator, normal, (num_frames, height, width, 3))
        maps["normal"] = encode_normal(normal)
    if isinstance(annotator, DepthAnnotator):
        depth = annotator.annotate_depth(rgb)
        _check_shape(annotator, depth, (num_frames, height, width))
        maps["depth"], depth_range = encode_disparity(depth)
        metadata = {**metadata, "depth_range": list(depth_range)}
    return replace(record, maps=maps, metadata=metadata)


def _check_shape(annotator: Annotator, result: NDArray[Any], shape: tuple[int, ...]) -> None:
    if result.shape != shape:
        raise ValueError(f"{type(annotator).__name__} returned {result.shape} where {shape} is expected")
