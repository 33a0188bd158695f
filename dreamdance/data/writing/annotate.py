"""The interface for annotators: networks that make maps (pose, normals, depth) from pictures.

None is included, because each needs its own weights. The name of an annotator is `package.module:factory`, so an
annotator of another package needs no change here. It takes the frames of a clip and returns its result in the
conventions of this package (contract C9).
"""

import importlib
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import encode_disparity, encode_normal
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.errors import MissingInputError
from dreamdance.media.keypoints import NUM_KEYPOINTS
from dreamdance.media.pose_drawing import draw_poses


@runtime_checkable
class PoseAnnotator(Protocol):
    """Detects the key points of the person."""

    def annotate_pose(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` uint8 to `(f, 128, 3)` float32: x and y in [0,1] of the frame, confidence."""


@runtime_checkable
class NormalAnnotator(Protocol):
    """Estimates the surface normal at every pixel."""

    def annotate_normal(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` uint8 to `(f, H, W, 3)` float32: unit length, x right, y up, z to the camera."""


@runtime_checkable
class DepthAnnotator(Protocol):
    """Estimates the depth at every pixel."""

    def annotate_depth(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` uint8 to `(f, H, W)` float32: positive, in metres or any other unit."""


Annotator = PoseAnnotator | NormalAnnotator | DepthAnnotator


def load_annotator(name: str, **options: Any) -> Annotator:
    """Makes the annotator of the given name.

    Args:
        name: `package.module:factory`.
        options: the arguments of the factory (paths of weights, devices).

    Raises:
        MissingInputError: there is no such module or factory, or the factory returns no annotator.
    """
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise MissingInputError(
            f"annotator '{name}' cannot be loaded: {error}; its name must have the form 'package.module:factory'"
        ) from error
    annotator = factory(**options)
    if not isinstance(annotator, PoseAnnotator | NormalAnnotator | DepthAnnotator):
        raise MissingInputError(
            f"'{name}' returns a {type(annotator).__name__}, which has no method annotate_pose, annotate_normal or "
            "annotate_depth"
        )
    return annotator


def annotate_clip(record: ClipRecord, annotator: Annotator) -> ClipRecord:
    """Returns the clip with the maps of the annotator, which replace existing ones.

    Raises:
        ValueError: the annotator's result has the wrong shape.
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
        raise ValueError(f"{type(annotator).__name__} returned shape {result.shape}, expected is {shape}")
