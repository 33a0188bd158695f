"""One stored clip: its frames, which are read on demand, and the windows and references chosen from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dreamdance.data.shards.columns import ColumnClip
from dreamdance.data.shards.tracks import SUBJECTS, ClipHead, Subject, TrackClip
from dreamdance.errors import ShardError
from dreamdance.media.cropping import PartialCrop
from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_pose, draw_poses
from dreamdance.runtime.sample_random import sample_generator

# The range of `draw_window`'s crops that crops nothing.
NO_CROP = (1.0, 1.0)


class StoredClip:
    """A clip of a shard, of either schema. Frames that are asked for are read and decoded.

    Attributes:
        where: the clip's place, for error texts.
        clip_id, num_frames, fps, metadata: see `writing.shard_parts.ClipRecord`.
        width, height: the size of its frames: the stored size that serves the reader best.
        reference_positions, frame_step: see `shards.tracks.ClipHead`; without references the positions are empty.
    """

    def __init__(self, stored: TrackClip | ColumnClip) -> None:
        """Stores the clip; decodes no frame yet.

        Args:
            stored: the checked clip.
        """
        self._stored: TrackClip | ColumnClip = stored
        self.where, self.clip_id, self.metadata = stored.where, stored.clip_id, stored.metadata
        self.num_frames, self.fps = stored.num_frames, stored.fps
        self.width, self.height = stored.width, stored.height
        self.reference_positions, self.frame_step = stored.reference_positions, stored.frame_step
        self._decoded: dict[tuple[Subject, str], NDArray[Any]] = {}
        self._mirrored: dict[int, NDArray[Any]] = {}

    @property
    def frameless_head(self) -> ClipHead:
        """The clip's head for another record of the same clip: places and times, without frames and metadata."""
        return ClipHead(
            clip_id=self.clip_id,
            num_frames=self.num_frames,
            fps=self.fps,
            metadata={},
            tracks=(),
            reference_positions=self.reference_positions,
            frame_step=self.frame_step,
        )

    @property
    def has_keypoints(self) -> bool:
        """Whether the clip has key points."""
        return self.has_keypoints_of("clip")

    @cached_property
    def keypoints(self) -> NDArray[np.float32] | None:
        """The key points of all frames, `(f, 128, 3)` float32, or None."""
        return self._stored.keypoints(range(self.num_frames)) if self.has_keypoints else None

    def has_keypoints_of(self, subject: Subject) -> bool:
        """Whether the clip, or its references, have key points."""
        return self._stored.has_keypoints(subject)

    def keypoints_of(self, indices: Sequence[int], *, subject: Subject = "clip") -> NDArray[np.float32]:
        """The key points of some frames, `(n, 128, 3)` float32.

        Raises:
            ShardError: the clip has no key points, or they are damaged.
        """
        if not self.has_keypoints_of(subject):
            raise ShardError(f"{self.where} has no key points; a pose drawing without key points cannot be mirrored")
        return self._stored.keypoints(indices, subject)

    @property
    def decoded_bytes(self) -> int:
        """The size of all decoded frames in bytes, including references and mirrored poses."""
        mirrored = self.num_frames * self.width * self.height * 3 if self.has_keypoints else 0
        return mirrored + sum(self._stored.decoded_bytes(name, subject) for subject, name in self._maps())

    def _maps(self) -> list[tuple[Subject, str]]:
        return [(subject, name) for subject in SUBJECTS for name in self._stored.names(subject)]

    def has(self, column: str, subject: Subject = "clip") -> bool:
        """Whether the clip, or its references, have frames of this modality."""
        return column in self._stored.names(subject)

    def frames(self, column: str, indices: Sequence[int] | None = None, *, subject: Subject = "clip") -> NDArray[Any]:
        """The stored frames of one modality, `(n, H, W, 3)`, or `(n, H, W)` for depth and mask.

        Args:
            column: the modality.
            indices: the numbers of the frames, in any order, repeats allowed; None means all.
            subject: whether to read frames of the clip or its stored references.

        Raises:
            ShardError: there is no such modality, or a frame is damaged.
        """
        if not self.has(column, subject):
            raise ShardError(
                f"{self.where} has no {column} frames{'' if subject == 'clip' else ' of references'}, which this "
                f"recipe needs; prepare clips with {column} frames (stage 2 can do without: remove {column} from its "
                f"`model.controls`{'' if subject == 'clip' else ', or set `objective.reference_first: false`'})"
            )
        decoded = self._decoded.get((subject, column))
        if decoded is not None:
            return decoded if indices is None else decoded[list(indices)]
        every = range(self.num_frames if subject == "clip" else len(self.reference_positions))
        return self._stored.frames(column, every if indices is None else indices, subject)

    def pictures(self, column: str, indices: Sequence[int] | None = None, *, subject: Subject = "clip") -> NDArray[Any]:
        """The stored frames of one modality, `(n, H, W, c)`; depth and mask have one channel. See `frames`."""
        frames = self.frames(column, indices, subject=subject)
        return frames[..., None] if frames.ndim == 3 else frames

    def reference_picture(self, reference: "ReferenceFrame") -> NDArray[np.uint8]:
        """The picture `(H, W, 3)` of a reference.

        Raises:
            ShardError: the frame is damaged.
        """
        picture: NDArray[np.uint8] = self.frames("rgb", [reference.number], subject=reference.subject)[0]
        return picture

    def mirrored_pose(self, indices: Sequence[int], *, subject: Subject = "clip") -> NDArray[Any]:
        """The poses of the mirrored clip or of its references, drawn from key points, `(n, H, W, 3)` uint8.

        If the clip's frames are kept decoded, its drawings are kept too.

        Raises:
            ShardError: there are no key points.
        """
        if subject == "references":
            keypoints = flip_keypoints(self.keypoints_of(indices, subject=subject))
            return draw_poses(keypoints, width=self.width, height=self.height)
        missing = [index for index in dict.fromkeys(indices) if index not in self._mirrored]
        keypoints = flip_keypoints(self.keypoints_of(missing))
        drawn = {
            index: draw_pose(points, width=self.width, height=self.height)
            for index, points in zip(missing, keypoints, strict=True)
        }
        if self._decoded:
            self._mirrored.update(drawn)
        return np.stack([drawn[index] if index in drawn else self._mirrored[index] for index in indices])

    def decode_all(self) -> None:
        """Decodes every frame and keeps the result."""
        self._decoded = {(subject, name): self.frames(name, subject=subject) for subject, name in self._maps()}
        if isinstance(self._stored, ColumnClip):
            self._stored.drop_packed()


@dataclass(frozen=True)
class ReferenceFrame:
    """A frame that serves as the reference: of the clip itself, or of the references stored with it."""

    number: int
    subject: Subject = "clip"


@dataclass(frozen=True)
class Window:
    """The part of a clip that one training sample uses.

    Attributes:
        frames: frame numbers.
        stride: distance between the frames.
        reference: the frame that serves as the reference.
        flip: whether the clip is mirrored.
        crop: the part of the (mirrored) frames that is shown; None shows all.
        reference_crop: the same for the reference.
        reference_first: whether the reference, with its own maps, comes before the frames.
    """

    frames: list[int]
    stride: int
    reference: ReferenceFrame
    flip: bool
    crop: PartialCrop | None = None
    reference_crop: PartialCrop | None = None
    reference_first: bool = False


def draw_window(
    clip: StoredClip,
    key: Sequence[int],
    *,
    num_frames: int,
    stride: tuple[int, int],
    flip_probability: float,
    reference_margin: int = 0,
    crop_scale: tuple[float, float] = NO_CROP,
) -> Window:
    """Draws a training window; the result depends only on the clip and the sample's key.

    The stride is drawn from its range, and reduced if the clip is too short for it. Only clips with key points are
    mirrored: the colours of a drawing distinguish left from right. The reference is any frame of a clip without stored
    references; else one of those that `far_references` returns.

    Args:
        clip: the whole clip.
        key: (seed, epoch, sample id).
        num_frames: number of frames in the window.
        stride: smallest and largest distance between the frames of the window.
        flip_probability: probability of mirroring, in [0,1].
        reference_margin: smallest distance of the reference from the window, in frames of the source.
        crop_scale: smallest and largest share of the area that is shown; the reference has a draw of its own.

    Raises:
        ShardError: the clip has fewer frames than the window.
    """
    check_length(clip, num_frames)
    longest = (clip.num_frames - 1) // (num_frames - 1) if num_frames > 1 else stride[1]
    generator = sample_generator(key, "window")
    chosen = min(_draw(stride[0], stride[1] + 1, generator), longest)
    start = _draw(0, clip.num_frames - (num_frames - 1) * chosen, generator)
    frames = [start + chosen * frame for frame in range(num_frames)]
    candidates = far_references(clip, frames, reference_margin)
    reference = candidates[_draw(0, len(candidates), sample_generator(key, "reference"))]
    flip = torch.rand((), generator=sample_generator(key, "flip")).item() < flip_probability
    crops: tuple[PartialCrop | None, PartialCrop | None] = (None, None)
    if crop_scale != NO_CROP:
        crops = draw_crop(crop_scale, key, "crop"), draw_crop(crop_scale, key, "reference crop")
    return Window(frames, chosen, reference, flip and clip.has_keypoints, *crops)


def draw_crop(scale: tuple[float, float], key: Sequence[int], purpose: str) -> PartialCrop:
    """Draws a crop by the sample's key: its share of the area, then its place, all uniformly.

    Args:
        scale: smallest and largest share of the area.
        key: (seed, epoch, sample id).
        purpose: the draw's name; draws of different names are independent.
    """
    share, x, y = torch.rand(3, generator=sample_generator(key, purpose), dtype=torch.float64).tolist()
    return PartialCrop(share=scale[0] + share * (scale[1] - scale[0]), x=x, y=y)


def first_window(clip: StoredClip, *, num_frames: int, stride: int = 1) -> Window:
    """The window for validation: the clip's first frames, and the reference of `fixed_reference`.

    Raises:
        ShardError: the clip has fewer frames than the window.
    """
    check_length(clip, num_frames)
    chosen = min(stride, (clip.num_frames - 1) // (num_frames - 1)) if num_frames > 1 else stride
    frames = [chosen * frame for frame in range(num_frames)]
    return Window(frames=frames, stride=chosen, reference=fixed_reference(clip), flip=False)


def read_window(read: Callable[..., NDArray[Any]], window: Window) -> NDArray[Any]:
    """The frames of a window, `(n, H, W, c)`, after the reference's own if `window.reference_first`.

    Args:
        read: reads frames by their numbers; its argument `subject` says whether they are those of the references.
        window: a window of the clip.

    Raises:
        ShardError: there are no such frames or no key points, or a frame is damaged.
    """
    first, subject = window.reference.number, window.reference.subject
    if not window.reference_first:
        return read(window.frames)
    if subject == "clip":
        return read([first, *window.frames])
    return np.concatenate([read([first], subject=subject), read(window.frames)])


def far_references(clip: StoredClip, frames: Sequence[int], margin: int) -> list[ReferenceFrame]:
    """The references that may serve a window of the clip.

    Args:
        clip: the whole clip.
        frames: the window's frame numbers.
        margin: smallest distance of a reference from the window, in frames of the source. If the video is too short
            for it, it is half of the distance of the farthest reference.

    Returns:
        The stored references at least that far away; all frames of a clip without stored references.
    """
    if not clip.reference_positions:
        return [ReferenceFrame(number) for number in range(clip.num_frames)]
    distances = reference_distances(clip, frames)
    farthest = max(distances)
    least = margin if farthest >= margin else farthest / 2
    return [ReferenceFrame(number, "references") for number, far in enumerate(distances) if far >= least]


def fixed_reference(clip: StoredClip) -> ReferenceFrame:
    """The reference for validation and examples: the stored one farthest from the clip, else the clip's last frame.

    Of equally far ones, such as those of a video that is no longer than the clip, it is the latest.
    """
    if not clip.reference_positions:
        return ReferenceFrame(clip.num_frames - 1)
    distances = reference_distances(clip, range(clip.num_frames))
    _, _, number = max(zip(distances, clip.reference_positions, range(len(distances)), strict=True))
    return ReferenceFrame(number, "references")


def own_frame(clip: StoredClip, reference: ReferenceFrame) -> int | None:
    """The number of the clip's frame that shows the same picture as a reference; None if no frame does."""
    if reference.subject == "clip":
        return reference.number
    number, rest = divmod(clip.reference_positions[reference.number], clip.frame_step)
    return number if rest == 0 and 0 <= number < clip.num_frames else None


def reference_distances(clip: StoredClip, frames: Sequence[int]) -> list[int]:
    """The distance of each stored reference from the span of a window, in frames of the source; 0 inside the span."""
    first, last = min(frames) * clip.frame_step, max(frames) * clip.frame_step
    return [max(first - position, position - last, 0) for position in clip.reference_positions]


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
