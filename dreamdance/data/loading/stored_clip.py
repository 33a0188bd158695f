"""One stored clip: its checked columns, its frames, which are decoded on demand, and the windows cut from it."""

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
        clip_id, num_frames, width, height, fps, metadata: the values of the columns.
        keypoints: `(f, 128, 3)` float32, or None.
    """

    def __init__(self, sample: Mapping[str, Any], *, where: str) -> None:
        """Checks the columns of a sample.

        Args:
            sample: the columns as the shard stores them.
            where: the shard and the sample's place in it, for error texts.

        Raises:
            ShardError: a column is damaged, or columns contradict one another.
        """
        check_schema_version(sample["schema_version"], where=where)
        self.clip_id = str(sample["clip_id"])
        self.where = f"{where} (clip '{self.clip_id}')"
        self.num_frames = int(sample["num_frames"])
        self.width, self.height = int(sample["width"]), int(sample["height"])
        self.fps = float(sample["fps"])
        self.metadata = self._parse_metadata(sample["metadata"])
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ShardError(f"{self.where}: the frame rate is {self.fps}; the shard is damaged")
        self._packed: dict[str, bytes] = {name: sample[name] for name in MODALITIES if sample.get(name)}
        self._decoded: dict[str, NDArray[Any]] = {}
        self._mirrored: dict[int, NDArray[Any]] = {}
        self._decoded_bytes = 0
        for name, data in self._packed.items():
            kind = read_frame_format(data, where=f"{self.where}, {name}")
            if (kind.num_frames, kind.width, kind.height) != (self.num_frames, self.width, self.height):
                raise ShardError(
                    f"{self.where}: {name} has {kind.num_frames} frames of {kind.width}x{kind.height}, "
                    f"but the clip has {self.num_frames} of {self.width}x{self.height}"
                )
            self._decoded_bytes += kind.num_frames * math.prod(kind.frame_shape) * kind.dtype.itemsize
        if "rgb" not in self._packed:
            raise ShardError(f"{self.where} has no rgb frames; the shard is damaged")
        packed_keypoints = sample["keypoints"]
        self.keypoints = unpack_keypoints(packed_keypoints, where=self.where) if packed_keypoints else None
        if self.keypoints is not None and len(self.keypoints) != self.num_frames:
            raise ShardError(
                f"{self.where} has key points for {len(self.keypoints)} frames, but {self.num_frames} frames"
            )

    def _parse_metadata(self, text: str) -> dict[str, Any]:
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self.where}: its metadata is not JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise ShardError(f"{self.where}: its metadata is not a JSON object")
        return metadata

    @property
    def decoded_bytes(self) -> int:
        """The size of all decoded frames in bytes, including mirrored poses."""
        mirrored = 0 if self.keypoints is None else self.num_frames * self.width * self.height * 3
        return self._decoded_bytes + mirrored

    def has(self, column: str) -> bool:
        """Whether the clip has frames of this column."""
        return column in self._packed or column in self._decoded

    def frames(self, column: str, indices: Sequence[int] | None = None) -> NDArray[Any]:
        """The stored frames of one column, `(n, H, W, 3)`, or `(n, H, W)` for depth and mask.

        Raises:
            ShardError: the clip has no such column, or the column is damaged.
        """
        if column in self._decoded:
            return self._decoded[column] if indices is None else self._decoded[column][list(indices)]
        if column not in self._packed:
            raise ShardError(
                f"{self.where} has no {column} frames, which this recipe needs; prepare clips with {column} frames, or "
                f"remove {column} from `model.controls` of stage 2"
            )
        return unpack_frames(self._packed[column], indices, where=f"{self.where}, {column}")

    def pictures(self, column: str, indices: Sequence[int] | None = None) -> NDArray[Any]:
        """The stored frames of one column, `(n, H, W, c)`; depth and mask have one channel.

        Raises:
            ShardError: the clip has no such column, or the column is damaged.
        """
        frames = self.frames(column, indices)
        return frames[..., None] if frames.ndim == 3 else frames

    def mirrored_pose(self, indices: Sequence[int]) -> NDArray[Any]:
        """The poses of the mirrored clip, drawn from its key points, `(n, H, W, 3)` uint8.

        If the clip's frames are kept decoded, the drawings are kept too.

        Raises:
            ShardError: the clip has no key points.
        """
        if self.keypoints is None:
            raise ShardError(f"{self.where} has no key points; a pose drawing without key points cannot be mirrored")
        drawn = {
            index: draw_pose(flip_keypoints(self.keypoints[index]), width=self.width, height=self.height)
            for index in indices
            if index not in self._mirrored
        }
        if self._decoded:
            self._mirrored.update(drawn)
        return np.stack([drawn[index] if index in drawn else self._mirrored[index] for index in indices])

    def decode_all(self) -> None:
        """Decodes every frame, keeps the result and frees the packed frames."""
        self._decoded = {name: self.frames(name) for name in [*self._packed, *self._decoded]}
        self._packed = {}


@dataclass(frozen=True)
class Window:
    """The part of a clip that one training sample uses.

    Attributes:
        frames: frame numbers.
        stride: distance between the frames.
        reference: frame number of the reference.
        flip: whether the clip is mirrored.
    """

    frames: list[int]
    stride: int
    reference: int
    flip: bool


def draw_window(
    clip: StoredClip, key: Sequence[int], *, num_frames: int, stride: tuple[int, int], flip_probability: float
) -> Window:
    """Draws a training window; the result depends only on the clip and the sample's key.

    The stride is drawn from its range, and reduced if the clip is too short for it. Only clips with key points are
    mirrored: the colours of a drawing distinguish left from right.

    Args:
        clip: the whole clip.
        key: (seed, epoch, sample id).
        num_frames: number of frames in the window.
        stride: smallest and largest distance between the frames of the window.
        flip_probability: probability of mirroring, in [0,1].

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
    """The window for validation: the clip's first frames, and its last frame as the reference.

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
        ShardError: the clip is shorter; the error names it and both lengths.
    """
    if clip.num_frames < num_frames:
        raise ShardError(
            f"{clip.where} has {clip.num_frames} frames, fewer than the window of {num_frames}; lower `num_frames`, "
            "or prepare the clips with a larger `min_clip_frames`"
        )


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator).item())
