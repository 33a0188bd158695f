"""Mask, depth, normals and scores of one clip, made from its stored pictures and the followed person."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import AxesError
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
# The stored range of disparity holds all but this share of the known pixels at each end, and what lies beyond by up to
# this share of that range: a body's own ends are stored exactly, a wrong pixel far away is clipped.
_OUTLIERS, _OUTLIER_MARGIN = 0.001, 0.25


@dataclass(frozen=True)
class ClipMaps:
    """The maps of a clip in their stored encodings (C9), and what its scores need.

    Attributes:
        mask: `(f, H, W)` uint8, 0 or 255.
        normal: `(f, H, W, 3)` uint8.
        depth: `(f, H, W)` uint16, disparity.
        depth_range: smallest and largest disparity; None for disparities without a unit.
        normals, depths: `(f, H, W, 3)` float32 and `(f, H, W)`, the stored ones decoded.
        sees_background: whether depth and normals have a meaning outside of the mask. If the annotator of one sees no
            background, that of the other is not stored either.
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
        given: the maps that need not be made; a map has no background either if the other's annotator sees none.

    Raises:
        AxesError: normals and depth disagree in the sign of an axis.
        VideoError: the same, with a given map.
    """
    networks, rows = stages.networks, poses.rows(frames)
    seen = _poses_in_crop(stages, poses, rows, crop)
    what = {"frames": frames, "crop": [crop.left, crop.top, crop.width, crop.height], "size": list(rgb.shape[1:3])}

    made = [task for task in ("normal", "depth") if task not in given.maps]
    sees_background = all(getattr(networks, task).sees_background for task in made)

    def key(task: str, mask_digest: str) -> StageKey:
        reads_mask = task != "mask" and (networks.uses(task, "mask") or not sees_background)
        inputs = [poses.key] if networks.uses(task, "poses") else []
        settings = {"network": networks.identity(task), "background": sees_background, **what}
        return stages.key(f"maps-{task}", settings, *inputs, *([mask_digest] if reads_mask else []))

    def make_mask() -> Arrays:
        found = networks.mask.annotate_mask(rgb, seen)
        return {"mask": np.rint(found.clip(0.0, 1.0) * 255).astype(np.uint8)}

    def make_normal() -> Arrays:
        return {"normal": encode_normal(networks.normal.annotate_normal(rgb, seen, mask))}

    def make_depth() -> Arrays:
        found = networks.depth.annotate_depth(rgb, seen, mask)
        encoded, ends = encode_depths(found, None if sees_background else inside)
        return {"depth": encoded, "ends": np.array(ends), "kind": np.array(found.kind)}

    if "mask" in given.maps:
        grey, mask_digest = given.maps["mask"], given.sha256["mask"]
    else:
        mask_key = key("mask", "")
        grey, mask_digest = (yield from _kept(stages, mask_key, make_mask))["mask"], mask_key.digest
    mask = grey.astype(np.float32) / 255
    inside = mask > _MASK_THRESHOLD
    if "normal" in given.maps:
        normal = given.maps["normal"]
    else:
        normal = (yield from _kept(stages, key("normal", mask_digest), make_normal))["normal"]
    if not sees_background:
        normal = np.where(inside[..., None], normal, encode_normal(np.array([0, 0, 1])))
    depth_range = None
    if "depth" in given.maps:
        depth = given.maps["depth"] if sees_background else np.where(inside, given.maps["depth"], np.uint16(0))
        depths = Depths(depth.astype(np.float32) / 65535, "disparity")
    else:
        kept = yield from _kept(stages, key("depth", mask_digest), make_depth)
        depth, (low, high) = kept["depth"], kept["ends"].tolist()
        depths = decode_depths(depth, low, high, metric=str(kept["kind"]) == "depth")
        depth_range = (low, high) if depths.kind == "depth" and low > 0 else None
    normals = decode_normal(normal)
    _check_axes(stages, given, normals, depths, mask)
    return ClipMaps(
        mask=np.where(inside, 255, 0).astype(np.uint8),
        normal=normal,
        depth=depth,
        depth_range=depth_range,
        normals=normals,
        depths=depths,
        sees_background=sees_background,
    )


def _poses_in_crop(stages: VideoStages, poses: FollowedPoses, rows: list[int], crop: Crop) -> PersonPoses:
    width, height, landmarks = stages.video.width, stages.video.height, poses.landmarks
    return PersonPoses(
        keypoints=to_crop(poses.smoothed[rows], width, height, crop),
        landmarks=None if landmarks is None else landmarks_to_crop(landmarks[rows], width, height, crop),
    )


def _check_axes(
    stages: VideoStages, given: GivenMaps, normals: NDArray[np.float32], depths: Depths, mask: NDArray[np.float32]
) -> None:
    tasks = ("normal", "depth")
    any_given = any(task in given.maps for task in tasks)
    try:
        makers = (_maker(stages.networks, given, task) for task in tasks)
        stages.axes_check(*makers, given=any_given).add(normals, depths, mask)
    except AxesError as error:
        if not any_given:
            raise
        raise VideoError(str(error)) from error  # a file of this video is wrong, not the annotators


def decode_normal(normal: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit normals `(f, H, W, 3)` of stored ones."""
    vectors = normal.astype(np.float32) / 127.5 - 1
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-6), dtype=np.float32)


def _maker(networks: Networks, given: GivenMaps, task: str) -> str:
    return f"the given file of {task}" if task in given.maps else f"`videos.annotators.{task}` ({networks.names[task]})"


def _kept(stages: VideoStages, key: StageKey, make: Callable[[], Arrays]) -> Generator[None, None, Arrays]:
    def stage() -> Iterator[Arrays | None]:
        yield None
        yield make()

    return (yield from last_result(stages.files.make(key, stage)))


def encode_depths(depths: Depths, inside: NDArray[np.bool_] | None) -> tuple[NDArray[np.uint16], tuple[float, float]]:
    """Encodes depth as 16-bit disparity, near points bright, with one scale and shift for the whole clip.

    Disparities far outside those of nearly all pixels are clipped: a single wrong pixel would take most of the range.

    Args:
        depths: `(f, H, W)`.
        inside: the pixels whose depth has a meaning; the others become a wall behind them, with the value 0. None means
            all pixels.

    Returns:
        The encoded disparities, and the disparities of the values 0 and 65535.
    """
    values = depths.values.astype(np.float64)
    disparity = 1.0 / np.maximum(values, 1e-6) if depths.kind == "depth" else values
    known = disparity if inside is None else disparity[inside]
    low, high = 0.0, 0.0
    if known.size:
        first, last = np.quantile(known, (_OUTLIERS, 1 - _OUTLIERS)).tolist()
        margin = _OUTLIER_MARGIN * (last - first)
        low, high = max(float(known.min()), first - margin), min(float(known.max()), last + margin)
    disparity = disparity.clip(low, high)
    if inside is not None:
        low -= _WALL_DISTANCE * (high - low)
    scale = 65535.0 / (high - low) if high > low else 0.0
    encoded = np.rint((disparity - low) * scale).astype(np.uint16)
    if inside is not None:
        encoded[~inside] = 0
    return encoded, (low, high)


def decode_depths(encoded: NDArray[np.uint16], low: float, high: float, *, metric: bool) -> Depths:
    """The depths `(f, H, W)` that `encode_depths` stored; the wall behind a person may be infinitely far.

    Args:
        encoded: the stored disparities.
        low, high: the disparities of the values 0 and 65535.
        metric: whether they are inverse distances.
    """
    disparity = low + encoded.astype(np.float32) * ((high - low) / 65535)
    if not metric:
        return Depths(disparity.astype(np.float32), "disparity")
    return Depths((1.0 / np.maximum(disparity, 1e-6)).astype(np.float32), "depth")


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
