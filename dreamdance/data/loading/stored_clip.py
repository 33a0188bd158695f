"""One stored clip: its numbers, checked, and its frames, decoded as they are asked for; and windows cut from it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dreamdance.data.shards.columns import (
    check_schema_version,
    read_frame_format,
    unpack_frames,
    unpack_keypoints,
)
from dreamdance.errors import ShardError
from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.modalities import MODALITIES
from dreamdance.runtime.sample_random import sample_generator


class StoredClip:
    """A clip of a shard.

    Attributes:
        clip_id, num_frames, width, height, fps, metadata: as the writer gave them.
        keypoints: `(f, 128, 3)` float32, or None.
    """

    def __init__(self, sample: Mapping[str, Any], *, where: str) -> None:
        """Checks a sample of the schema's columns.

        Args:
            sample: what the shard holds.
            where: its shard and place, for the errors' text.

        Raises:
            ShardError: the columns contradict one another.
        """
        check_schema_version(sample["schema_version"], where=where)
        self.clip_id = str(sample["clip_id"])
        self.where = f"{where} (clip '{self.clip_id}')"
        self.num_frames = int(sample["num_frames"])
        self.width, self.height = int(sample["width"]), int(sample["height"])
        self.fps = float(sample["fps"])
        self.metadata = self._parse_metadata(sample["metadata"])
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ShardError(f"{self.where}: {self.fps} frames per second; damaged")
        self._packed: dict[str, bytes] = {name: sample[name] for name in MODALITIES if sample.get(name)}
        self._decoded: dict[str, NDArray[Any]] = {}
        self._mirrored: dict[int, NDArray[Any]] = {}
        self._decoded_bytes = 0
        for name, data in self._packed.items():
            kind = read_frame_format(data, where=f"{self.where}, {name}")
            if (kind.num_frames, kind.width, kind.height) != (self.num_frames, self.width, self.height):
                raise ShardError(
                    f"{self.where}: {name} has {kind.num_frames} frames of {kind.width}x{kind.height}, "
                    f"the clip {self.num_frames} of {self.width}x{self.height}"
                )
            self._decoded_bytes += kind.num_frames * math.prod(kind.frame_shape) * kind.dtype.itemsize
        if "rgb" not in self._packed:
            raise ShardError(f"{self.where} has no frames")
        packed_keypoints = sample["keypoints"]
        self.keypoints = unpack_keypoints(packed_keypoints, where=self.where) if packed_keypoints else None
        if self.keypoints is not None and len(self.keypoints) != self.num_frames:
            raise ShardError(f"{self.where} has key points of {len(self.keypoints)} of its {self.num_frames} frames")

    def _parse_metadata(self, text: str) -> dict[str, Any]:
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self.where}: its metadata is no JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise ShardError(f"{self.where}: its metadata is no JSON object")
        return metadata

    @property
    def decoded_bytes(self) -> int:
        """What all frames take once they are decoded, mirrored poses included."""
        mirrored = 0 if self.keypoints is None else self.num_frames * self.width * self.height * 3
        return self._decoded_bytes + mirrored

    def has(self, column: str) -> bool:
        """Whether the clip has frames of this column."""
        return column in self._packed or column in self._decoded

    def frames(self, column: str, indices: Sequence[int] | None = None) -> NDArray[Any]:
        """Frames of one column, `(n, H, W, 3)`, or `(n, H, W)` for depth and mask, as they are stored.

        Raises:
            ShardError: the clip has no such column, or it is damaged.
        """
        if column in self._decoded:
            return self._decoded[column] if indices is None else self._decoded[column][list(indices)]
        if column not in self._packed:
            raise ShardError(
                f"{self.where} has no {column} frames, which this recipe needs; prepare clips that have "
                f"them (`model.controls` of stage 2 may leave {column} out)"
            )
        return unpack_frames(self._packed[column], indices, where=f"{self.where}, {column}")

    def pictures(self, column: str, indices: Sequence[int] | None = None) -> NDArray[Any]:
        """Frames of one column, `(n, H, W, c)`, as they are stored; depth and mask have one channel.

        Raises:
            ShardError: the clip has no such column, or it is damaged.
        """
        frames = self.frames(column, indices)
        return frames[..., None] if frames.ndim == 3 else frames

    def mirrored_pose(self, indices: Sequence[int]) -> NDArray[Any]:
        """The pose of a mirrored clip, drawn from its key points, `(n, H, W, 3)` uint8; kept if the frames are kept.

        Raises:
            ShardError: the clip has no key points.
        """
        if self.keypoints is None:
            raise ShardError(f"{self.where} has no key points; a drawing alone cannot be mirrored")
        drawn = {
            index: draw_pose(flip_keypoints(self.keypoints[index]), width=self.width, height=self.height)
            for index in indices
            if index not in self._mirrored
        }
        if self._decoded:
            self._mirrored.update(drawn)
        return np.stack([drawn[index] if index in drawn else self._mirrored[index] for index in indices])

    def decode_all(self) -> None:
        """Decodes every frame once and for all, and lets go of the packed form."""
        self._decoded = {name: self.frames(name) for name in [*self._packed, *self._decoded]}
        self._packed = {}


@dataclass(frozen=True)
class Window:
    """What one training sample takes from its clip: frame numbers, the reference's frame number, mirrored or not."""

    frames: list[int]
    stride: int
    reference: int
    flip: bool


def draw_window(
    clip: StoredClip, key: Sequence[int], *, num_frames: int, stride: tuple[int, int], flip_probability: float
) -> Window:
    """Draws a training window, by the sample's key alone.

    The stride is drawn from its range and made smaller where the clip is too short for it. Only clips with key points
    are mirrored: a drawing's colours tell left from right.

    Args:
        clip: the whole clip.
        key: (seed, epoch, sample id).
        num_frames: frames in the window.
        stride: smallest and largest distance between its frames.
        flip_probability: in [0,1].

    Raises:
        ShardError: the clip has fewer frames than the window.
    """
    check_length(clip, num_frames)
    longest = (clip.num_frames - 1) // (num_frames - 1) if num_frames > 1 else stride[1]
    generator = sample_generator(key, "window")
    chosen = min(_draw(stride[0], stride[1] + 1, generator), longest)
    start = _draw(0, clip.num_frames - (num_frames - 1) * chosen, generator)
    reference = _draw(0, clip.num_frames, sample_generator(key, "reference"))
    flip = torch.rand((), generator=sample_generator(key, "flip")).item() < flip_probability
    return Window(
        frames=[start + chosen * frame for frame in range(num_frames)],
        stride=chosen,
        reference=reference,
        flip=flip and clip.keypoints is not None,
    )


def first_window(clip: StoredClip, *, num_frames: int, stride: int = 1) -> Window:
    """The window that validation looks at: the clip's first frames, and its last one as the reference.

    Raises:
        ShardError: the clip has fewer frames than the window.
    """
    check_length(clip, num_frames)
    chosen = min(stride, (clip.num_frames - 1) // (num_frames - 1)) if num_frames > 1 else stride
    frames = [chosen * frame for frame in range(num_frames)]
    return Window(frames=frames, stride=chosen, reference=clip.num_frames - 1, flip=False)


def check_length(clip: StoredClip, num_frames: int) -> None:
    """Refuses a clip that is shorter than a window.

    Raises:
        ShardError: naming the clip and both lengths.
    """
    if clip.num_frames < num_frames:
        raise ShardError(
            f"{clip.where} has {clip.num_frames} frames, fewer than the window of {num_frames}; lower `num_frames`, "
            "or prepare with a larger `min_clip_frames`"
        )


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator).item())
