"""Mask, depth, normals and scores of one clip, made from its stored pictures and the followed person."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import AxesError, check_axes
from dreamdance.annotators.protocols import Depths, PersonPoses
from dreamdance.data.annotation.networks import Networks
from dreamdance.data.annotation.side_files import Arrays, StageKey, last_result
from dreamdance.data.annotation.video_stages import FollowedPoses, VideoStages
from dreamdance.data.shards.columns import encode_normal
from dreamdance.media.cropping import Crop
from dreamdance.media.video import VideoError

# The wall behind a person whose background no network sees, as a share of the person's own range of disparity.
_WALL_DISTANCE = 0.25
_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class ClipMaps:
    """The maps of a clip in their stored encodings (C9), and what its scores need.

    Attributes:
        mask: `(f, H, W)` uint8, 0 or 255.
        normal: `(f, H, W, 3)` uint8.
        depth: `(f, H, W)` uint16, disparity.
        depth_range: smallest and largest disparity; None for disparities without a unit.
        normals: `(f, H, W, 3)` float32.
        depths: depth as the annotator gave it.
        sees_background: whether depth and normals have a meaning outside of the mask.
    """

    mask: NDArray[np.uint8]
    normal: NDArray[np.uint8]
    depth: NDArray[np.uint16]
    depth_range: tuple[float, float] | None
    normals: NDArray[np.float32]
    depths: Depths
    sees_background: bool


@dataclass(frozen=True)
class GivenMaps:
    """The maps of a clip that files beside the video give; they win over those of the annotators.

    Attributes:
        maps: frames by modality, in the stored encodings and the clip's crop; without rgb and pose.
        sha256: the hashes of their files, by modality.
    """

    maps: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


def make_maps(
    stages: VideoStages,
    rgb: NDArray[np.uint8],
    poses: FollowedPoses,
    frames: list[int],
    crop: Crop,
    given: GivenMaps,
) -> Generator[None, None, ClipMaps]:
    """Makes mask, depth and normals of a clip, or takes the kept or the given ones.

    Args:
        stages: the stages of the clip's video.
        rgb: the clip's stored pictures `(f, H, W, 3)`.
        poses: the person of the clip's shot.
        frames: the clip's frames, as numbers in the video.
        crop: the part of the video's frames that the pictures show.
        given: the maps that need not be made.

    Raises:
        AxesError: normals and depth disagree in the sign of an axis.
        VideoError: the same, with a given map.
    """
    networks, rows = stages.networks, poses.rows(frames)
    seen = PersonPoses(
        keypoints=to_crop(poses.smoothed[rows], stages.video.width, stages.video.height, crop),
        landmarks=None
        if poses.landmarks is None
        else landmarks_to_crop(poses.landmarks[rows], stages.video.width, stages.video.height, crop),
    )
    what = {"frames": frames, "crop": [crop.left, crop.top, crop.width, crop.height], "size": list(rgb.shape[1:3])}

    def key(task: str, *inputs: str) -> StageKey:
        return stages.key(f"maps-{task}", {"network": networks.identity(task), **what}, poses.key, *inputs)

    mask_key = key("mask")
    if "mask" in given.maps:
        mask, mask_digest = given.maps["mask"].astype(np.float32) / 255, given.sha256["mask"]
    else:
        mask = yield from _kept(stages, mask_key, "mask", lambda: networks.mask.annotate_mask(rgb, seen))
        mask, mask_digest = mask.astype(np.float32), mask_key.digest
    if "normal" in given.maps:
        normals = decode_normal(given.maps["normal"])
    else:
        normal_key = key("normal", mask_digest)
        normals = yield from _kept(
            stages, normal_key, "normal", lambda: networks.normal.annotate_normal(rgb, seen, mask)
        )
        normals = normals.astype(np.float32)
    if "depth" in given.maps:
        depths = Depths(given.maps["depth"].astype(np.float32) / 65535, "disparity")
    else:
        depths = yield from _find_depths(stages, key("depth", mask_digest), rgb, seen, mask)
    try:
        check_axes(normals, depths, mask, names=(_maker(networks, given, "normal"), _maker(networks, given, "depth")))
    except AxesError as error:
        if "normal" not in given.maps and "depth" not in given.maps:
            raise
        raise VideoError(str(error)) from error  # a file of this video is wrong, not the annotators
    inside = mask > _MASK_THRESHOLD
    made = [task for task in ("normal", "depth") if task not in given.maps]
    without_background = [task for task in made if not getattr(networks, task).sees_background]
    if "normal" in without_background:
        normals = np.where(inside[..., None], normals, np.array([0, 0, 1], dtype=np.float32))
    depth, depth_range = given.maps.get("depth"), None
    if depth is None:
        depth, depth_range = encode_depths(depths, inside if "depth" in without_background else None)
    return ClipMaps(
        mask=np.where(inside, 255, 0).astype(np.uint8),
        normal=given.maps.get("normal", encode_normal(normals)),
        depth=depth,
        depth_range=depth_range,
        normals=normals,
        depths=depths,
        sees_background=not without_background,
    )


def decode_normal(normal: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit normals `(f, H, W, 3)` of stored ones."""
    vectors = normal.astype(np.float32) / 127.5 - 1
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-6), dtype=np.float32)


def _maker(networks: Networks, given: GivenMaps, task: str) -> str:
    return f"the given file of {task}" if task in given.maps else f"`videos.annotators.{task}` ({networks.names[task]})"


def _find_depths(
    stages: VideoStages, key: StageKey, rgb: NDArray[np.uint8], seen: PersonPoses, mask: NDArray[np.float32]
) -> Generator[None, None, Depths]:
    def stage() -> Iterator[Arrays | None]:
        yield None
        depths = stages.networks.depth.annotate_depth(rgb, seen, mask)
        yield {"depth": depths.values.astype(np.float32), "kind": np.array(depths.kind)}

    found = yield from last_result(stages.files.make(key, stage))
    return Depths(found["depth"], "depth" if str(found["kind"]) == "depth" else "disparity")


def _kept(
    stages: VideoStages, key: StageKey, name: str, make: Callable[[], NDArray[Any]]
) -> Generator[None, None, NDArray[Any]]:
    def stage() -> Iterator[Arrays | None]:
        yield None
        yield {name: make().astype(np.float16)}

    result = yield from last_result(stages.files.make(key, stage))
    return result[name]


def encode_depths(
    depths: Depths, inside: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint16], tuple[float, float] | None]:
    """Encodes depth as 16-bit disparity, near points bright, with one scale and shift for the whole clip.

    Args:
        depths: `(f, H, W)`.
        inside: the pixels whose depth has a meaning; the others become a wall behind them, with the value 0. None means
            all pixels.

    Returns:
        The disparity, and the disparities of its values 0 and 65535 if the depth has a unit.
    """
    values = depths.values.astype(np.float64)
    disparity = 1.0 / np.maximum(values, 1e-6) if depths.kind == "depth" else values
    known = disparity if inside is None else disparity[inside]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if inside is not None:
        low -= _WALL_DISTANCE * (high - low)
    scale = 65535.0 / (high - low) if high > low else 0.0
    encoded = np.rint((disparity - low).clip(0.0, high - low) * scale).astype(np.uint16)
    if inside is not None:
        encoded[~inside] = 0
    return encoded, (low, high) if depths.kind == "depth" and low > 0 else None


def to_crop(keypoints: NDArray[np.float32], width: int, height: int, crop: Crop) -> NDArray[np.float32]:
    """Key points `(f, 128, 3)` of a frame as those of a part of it."""
    moved = keypoints.astype(np.float64)
    moved[..., 0] = (moved[..., 0] * width - crop.left) / crop.width
    moved[..., 1] = (moved[..., 1] * height - crop.top) / crop.height
    return moved.astype(np.float32)


def landmarks_to_crop(landmarks: NDArray[np.float32], width: int, height: int, crop: Crop) -> NDArray[np.float32]:
    """Landmarks `(f, 33, 4)` of a frame as those of a part of it; z is in widths of the part."""
    moved = to_crop(landmarks, width, height, crop)
    moved[..., 2] = landmarks[..., 2] * width / crop.width
    return moved
