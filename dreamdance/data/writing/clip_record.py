"""A clip to store, its references, and their form in a shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.frame_codecs import Codec, FrameFormat, encode_frame, frame_format
from dreamdance.data.shards.tracks import ClipHead, Subject, TrackWriter
from dreamdance.media.transforms import pictures_to_tensor, resize_map
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.stored_sizes import smaller_sizes_problem

# Pictures stored as JPEG of this quality with colours at full resolution. Measured at 512x768 on rendered dancers:
# 45.9 dB, 91 kB and 1.6 ms to decode, against 149 kB and 4.4 ms as PNG.
RGB_QUALITY = 95

# The format of a map's frames, and each frame encoded.
EncodedMap = tuple[FrameFormat, list[bytes]]


@dataclass(frozen=True)
class References:
    """Frames of the clip's video that may serve as its reference; they are spread over the whole video.

    Attributes:
        positions: for each reference, its number in the source minus that of the clip's first frame; counted in the
            frames of the source, and negative before the clip.
        maps: frames by modality, as in `ClipRecord`; rgb is required.
        keypoints: `(n, 128, 3)` float32.
        depth_ranges: for each reference, its `depth_range` (`data.shards.columns`), or None if its depth has no unit;
            empty if all have the clip's. The clip's metadata store them as `reference_depth_ranges`.
        encoded: the maps that were encoded already. The clips of a video share it by `seen_from`, so that their common
            references are resized and encoded once.
    """

    positions: Sequence[int]
    maps: Mapping[str, NDArray[Any]]
    keypoints: NDArray[np.float32] | None = None
    depth_ranges: Sequence[tuple[float, float] | None] = ()
    encoded: dict[tuple[Any, ...], EncodedMap] = field(default_factory=dict, compare=False, repr=False)

    def seen_from(self, first: int) -> "References":
        """The same references for a clip that begins `first` frames of the source later."""
        return replace(self, positions=[position - first for position in self.positions])


@dataclass(frozen=True)
class NoClips:
    """What a part gives in place of clips if its video has none.

    Attributes:
        reason: for users. Reasons of one kind differ in numbers alone, so that they can be counted.
    """

    reason: str


@dataclass(frozen=True)
class ClipRecord:
    """A clip to store.

    Attributes:
        clip_id: name of the clip, unique in its set.
        fps: frames per second.
        maps: frames by modality, in the encodings of `data.shards.columns`: rgb, pose, normal `(f, H, W, 3)` uint8;
            depth `(f, H, W)` uint16; mask `(f, H, W)` uint8, 255 on the body. rgb is required.
        keypoints: `(f, 128, 3)` float32.
        metadata: any further information, JSON-able.
        references: frames of the same video and of the same size as the clip's, or None.
        frame_step: frames of the source from one frame of the clip to the next.
    """

    clip_id: str
    fps: float
    maps: Mapping[str, NDArray[Any]]
    keypoints: NDArray[np.float32] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    references: References | None = None
    frame_step: int = 1

    def to_sample(
        self,
        *,
        rgb_format: Codec = "png",
        rgb_quality: int = RGB_QUALITY,
        smaller_sizes: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Any]:
        """The clip as the columns of a shard.

        Args:
            rgb_format: codec of the pictures; all other maps are stored as PNG, without loss.
            rgb_quality: of JPEG and WebP, 1 to 100.
            smaller_sizes: further, different sizes (width, height) at which all frames are stored.

        Raises:
            ValueError: maps or key points contradict one another, or a further size does not fit the frames.
        """
        writer = TrackWriter()
        num_frames, height, width = self.maps["rgb"].shape[:3]
        if problem := smaller_sizes_problem((width, height), smaller_sizes):
            raise ValueError(f"clip '{self.clip_id}': `smaller_sizes` {problem}")
        for size in ((width, height), *smaller_sizes):
            for subject, maps, count in self._subjects():
                for name in MODALITIES:
                    if name in maps:
                        codec: Codec = rgb_format if name == "rgb" else "png"
                        form = (name, size, codec, rgb_quality)
                        known = {} if subject == "clip" or self.references is None else self.references.encoded
                        if form not in known:
                            frames = _resized(maps[name], name, *size)
                            _check_frames(f"{name} of {subject} '{self.clip_id}'", frames, (count, size[1], size[0]))
                            payloads = [encode_frame(frame, codec, quality=rgb_quality) for frame in frames]
                            known[form] = frame_format(frames, codec), payloads
                        writer.add(name, subject, *known[form])
        if self.keypoints is not None:
            writer.add_keypoints("clip", _checked_keypoints(self.keypoints, num_frames))
        references = self.references
        if references is not None and references.keypoints is not None:
            writer.add_keypoints("references", _checked_keypoints(references.keypoints, len(references.positions)))
        metadata = self.metadata
        if references is not None and any(references.depth_ranges):
            metadata = metadata | {"reference_depth_ranges": list(references.depth_ranges)}
        head = ClipHead(
            clip_id=self.clip_id,
            num_frames=num_frames,
            fps=self.fps,
            metadata=metadata,
            tracks=(),
            reference_positions=() if references is None else tuple(int(place) for place in references.positions),
            frame_step=self.frame_step,
        )
        return writer.sample(head)

    def _subjects(self) -> list[tuple[Subject, Mapping[str, NDArray[Any]], int]]:
        subjects: list[tuple[Subject, Mapping[str, NDArray[Any]], int]] = [("clip", self.maps, len(self.maps["rgb"]))]
        if self.references is not None and len(self.references.positions) > 0:
            subjects.append(("references", self.references.maps, len(self.references.positions)))
        return subjects


def spread_over(num_frames: int, count: int) -> list[int]:
    """The numbers of up to `count` frames that are spread evenly over a video of `num_frames`."""
    count = min(count, num_frames)
    return [(2 * number + 1) * num_frames // (2 * count) for number in range(count)]


def _resized(frames: NDArray[Any], name: str, width: int, height: int) -> NDArray[Any]:
    """Frames of a modality at another size, rounded to their own type."""
    frames = np.asarray(frames)
    if frames.shape[1:3] == (height, width):
        return frames
    largest = np.iinfo(frames.dtype).max
    resized = np.empty((len(frames), height, width, *frames.shape[3:]), frames.dtype)
    for row, frame in enumerate(frames):
        images = pictures_to_tensor(frame if frame.ndim == 3 else frame[..., None])
        values = resize_map(images, height, width, kind=MODALITIES[name].kind).numpy()
        rounded = np.rint(values.clip(0.0, 1.0).astype(np.float64) * largest).astype(frames.dtype)
        resized[row] = np.moveaxis(rounded, 0, -1) if frame.ndim == 3 else rounded[0]
    return resized


def _check_frames(name: str, frames: NDArray[Any], expected: tuple[int, int, int]) -> None:
    if frames.shape[:3] != expected:
        raise ValueError(f"{name}: frames of shape {frames.shape}, expected {expected} like the clip's rgb")


def _checked_keypoints(keypoints: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    if len(keypoints) != count or not np.isfinite(keypoints).all():
        raise ValueError(f"key points for {len(keypoints)} frames, expected are finite ones for {count}")
    return keypoints
