"""Loads the inputs of a manifest entry: the reference picture, the pose drawings and the control maps."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.annotators.driving_video import choose_frames, fit_sequence
from dreamdance.errors import UserError
from dreamdance.inference.driving_videos import KeypointFinder
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.inference.reference_pose import draw_reference_pose
from dreamdance.media.cropping import centred_crop
from dreamdance.media.keypoint_formats import read_any_keypoints
from dreamdance.media.keypoints import KeypointSequence
from dreamdance.media.leg_sides import describe_exchanged_legs
from dreamdance.media.pictures import MAX_PICTURE_PIXELS, read_picture
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.media.transforms import pictures_to_tensor, resize_images, resize_map
from dreamdance.media.video import VideoInfo, iterate_frames, probe_video
from dreamdance.modalities import MODALITIES
from dreamdance.pipelines.drawing_sizes import describe_drawing_size
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runtime.available_memory import available_memory

logger = logging.getLogger(__name__)

MAX_FRAMES = 50_000
_Value = TypeVar("_Value")


class EntryError(UserError):
    """A file that an entry names cannot be used; the other entries are not affected."""


@dataclass(frozen=True)
class Size:
    """Size of a picture in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class EntryInputs:
    """The inputs of the pipelines.

    Attributes:
        reference: `3 H W` in [0, 1], with the aspect of the result and the resolution of the picture.
        poses: `f 3 H W` in [0, 1] for each requested size.
        fps: frames per second.
        maps: the requested control maps by modality, `f 3 H W` in [0, 1], in the size of the result.
        video: the driving video, whose sound the result gets; None if poses were given.
        reference_poses: the pose drawing of the reference, `3 H W`, for each requested size; empty if not needed.
        reference_maps: the reference's own `maps`, `3 H W`; empty if not needed.
    """

    reference: Tensor
    poses: dict[Size, Tensor]
    fps: float
    maps: dict[str, Tensor]
    video: VideoInfo | None = None
    reference_poses: dict[Size, Tensor] = field(default_factory=dict)
    reference_maps: dict[str, Tensor] = field(default_factory=dict)


def read_entry_states(entry: ManifestEntry, known: Mapping[Path, FileState] | None = None) -> dict[str, FileState]:
    """The states of all files that an entry's result depends on, by field of the entry.

    Args:
        entry: an entry of the manifest.
        known: known states by absolute path; a file with the same size and times is not read again.

    Raises:
        EntryError: a file is missing or cannot be read.
    """
    states = {}
    for name, path in entry.files.items():
        try:
            state = read_state(path, (known or {}).get(path.absolute()))
            if state is None and path.exists() and not path.is_file():
                raise EntryError(f"{path} cannot be read: it is not a regular file")
            if state is None:
                path.open("rb").close()  # raises the reason
                raise EntryError(f"{path} cannot be read: it did not exist a moment ago")
        except OSError as error:
            raise EntryError(f"{path} cannot be read: {error.strerror}") from error
        states[name] = state
    return states


def load_inputs(
    entry: ManifestEntry,
    *,
    aspect: Size,
    pose_sizes: set[Size],
    maps: Sequence[str] = (),
    finder: KeypointFinder | None = None,
    trained: Size | None = None,
) -> EntryInputs:
    """Loads an entry. Pictures of another aspect are cropped around their centre, as in training.

    Args:
        entry: an entry of the manifest.
        aspect: size of the result; the reference is cropped to its aspect but not resized.
        pose_sizes: the sizes of the pose drawings; each is resized from the original drawing.
        maps: control maps that the entry must give as videos.
        finder: finds the key points of a driving video; needed for entries that name one.
        trained: the size at which stage 2 was trained, of which drawings should be; None if its export lacks it.

    Raises:
        UserError: a file is missing, damaged or too large, the frames exceed the free memory, nobody is found in a
            video, or the skeleton cannot be aligned.
    """
    pixels = sum(size.width * size.height for size in (*pose_sizes, *[aspect] * (1 + len(maps))))
    check_memory = partial(_check_memory, entry, frame_bytes=pixels * 3 * 4)  # float32
    picture = read_picture(entry.image)
    reference = _cut(picture, aspect)
    video = None if entry.video is None else probe_video(entry.video)
    if entry.pose is not None:
        drawings, num_frames, fps = _decode(entry.pose)
        check_memory(num_frames)
        drawings = _warning_of_size(drawings, entry, aspect, trained)
    else:
        if video is not None:
            check_memory(len(choose_frames(video, entry.fps)))  # before a long search
        sequence = _read_skeleton(entry, video, finder)
        if entry.align is not None:
            sequence = fit_sequence(sequence, _read_body(entry, picture, finder), entry.align)
        num_frames, fps = len(sequence.keypoints), sequence.fps
        check_memory(num_frames)
        drawings = _draw(sequence, entry.keypoints or _given(entry.video))
    poses = {size: torch.zeros(num_frames, 3, size.height, size.width) for size in pose_sizes}
    for number, drawing in enumerate(drawings):
        cut = pictures_to_tensor(_cut(drawing, aspect))
        for size, resized in poses.items():
            resized[number] = resize_images(cut, size.height, size.width).clamp(0, 1)
    given = {name: _read_map(entry, name, aspect, num_frames=num_frames) for name in maps}
    return EntryInputs(
        reference=pictures_to_tensor(reference),
        poses=poses,
        fps=entry.fps or fps,
        maps=given,
        video=video,
        reference_poses=_reference_poses(entry, picture, poses, aspect, finder),
        reference_maps=_reference_maps(entry, given),
    )


def _reference_poses(
    entry: ManifestEntry,
    picture: NDArray[np.uint8],
    poses: Mapping[Size, Tensor],
    aspect: Size,
    finder: KeypointFinder | None,
) -> dict[Size, Tensor]:
    """The drawing of the reference's pose in each size of `poses`, if stage 2 needs it."""
    if entry.reference_pose_from is None:
        return {}
    if entry.reference_pose_from == "reference_frame":
        return {size: drawings[_own_frame(entry, len(drawings))] for size, drawings in poses.items()}
    cut = pictures_to_tensor(_cut(draw_reference_pose(entry, picture, finder), aspect))
    return {size: resize_images(cut, size.height, size.width).clamp(0, 1) for size in poses}


def _reference_maps(entry: ManifestEntry, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's own frames of the maps that the entry gives, if stage 2 needs them."""
    if entry.reference_pose_from is None or not given:
        return {}
    if entry.reference_frame is None:
        raise EntryError(
            f"stage 2 was trained with objective.reference_first and reads {' and '.join(given)} of the reference too; "
            "only a reference that is a frame of the sequence has it: give 'reference_frame'"
        )
    return {name: frames[_own_frame(entry, len(frames))] for name, frames in given.items()}


def _own_frame(entry: ManifestEntry, num_frames: int) -> int:
    number = _given(entry.reference_frame)
    if number >= num_frames:
        raise EntryError(f"reference_frame {number} is not one of the {num_frames} frames of the pose sequence")
    return number


def _check_memory(entry: ManifestEntry, num_frames: int, *, frame_bytes: int) -> None:
    """Refuses an entry whose drawings, maps and results alone take more than the free memory."""
    needed, available = num_frames * frame_bytes, available_memory()
    if available is not None and needed > available:
        file = entry.pose or entry.keypoints or entry.video
        cure = "lower 'fps', or cut the video" if entry.video is not None else "divide it into shorter entries"
        raise EntryError(
            f"{file}: the drawings and results of {num_frames} frames take at least {needed / 2**30:.1f} GiB of "
            f"memory, and {available / 2**30:.1f} GiB are free; {cure}"
        )


def _read_skeleton(entry: ManifestEntry, video: VideoInfo | None, finder: KeypointFinder | None) -> KeypointSequence:
    """The driving skeleton, from a file of key points or from a video."""
    if video is not None:
        return _given(finder).of_video(video, _state(video.path), person=entry.person, fps=entry.fps)
    person = entry.person
    assert person is None or isinstance(person, int), "the check of the manifest refuses a box for key points"
    sequence = read_any_keypoints(_given(entry.keypoints), size=entry.keypoints_size, fps=entry.fps, person=person)
    if (warning := describe_exchanged_legs(sequence)) is not None:
        logger.warning("%s: %s", entry.keypoints, warning)
    return sequence


def _read_body(entry: ManifestEntry, picture: NDArray[np.uint8], finder: KeypointFinder | None) -> KeypointSequence:
    """The body of the reference picture."""
    if entry.reference_keypoints is None:
        return _given(finder).of_picture(entry.image, picture, _state(entry.image))
    return read_any_keypoints(entry.reference_keypoints, size=(picture.shape[1], picture.shape[0]), fps=1.0)


def _state(path: Path) -> FileState:
    state = read_state(path)
    if state is None:
        raise EntryError(f"{path} was removed while it was read")
    return state


def _given(value: _Value | None) -> _Value:
    assert value is not None, "the check of the manifest refuses an entry without poses; the caller gives a finder"
    return value


def _draw(sequence: KeypointSequence, path: Path) -> Iterator[NDArray[np.uint8]]:
    """Draws poses in the size of the key points' original frames, as the shards store them."""
    if sequence.width * sequence.height > MAX_PICTURE_PIXELS:
        raise EntryError(
            f"{path}: frames of {sequence.width}x{sequence.height}; accepted are up to {MAX_PICTURE_PIXELS} pixels"
        )
    return (draw_pose(points, width=sequence.width, height=sequence.height) for points in sequence.keypoints)


def _decode(path: Path) -> tuple[Iterator[NDArray[np.uint8]], int, float]:
    """The frames of a video, their number and their rate."""
    video = probe_video(path)
    if video.num_frames > MAX_FRAMES:
        raise EntryError(f"{path} has {video.num_frames} frames; accepted are up to {MAX_FRAMES}")
    frames = video.constant_rate_frames()
    return iterate_frames(video, frames), len(frames), video.fps


def _warning_of_size(
    drawings: Iterator[NDArray[np.uint8]], entry: ManifestEntry, size: Size, trained: Size | None
) -> Iterator[NDArray[np.uint8]]:
    """The drawings; warns if they are much larger or smaller than the pictures of the training."""
    for number, drawing in enumerate(drawings):
        if number == 0:
            problem = describe_drawing_size(
                f"the drawings of {entry.pose}",
                (drawing.shape[1], drawing.shape[0]),
                shown=(size.width, size.height),
                trained=None if trained is None else (trained.width, trained.height),
            )
            if problem is not None:
                logger.warning("'%s': %s", entry.id, problem)
        yield drawing


def _read_map(entry: ManifestEntry, name: str, size: Size, *, num_frames: int) -> Tensor:
    """Reads a control map that the entry gives as a video, `f 3 H W` in [0, 1]."""
    if name not in entry.maps:
        raise EntryError(f"stage 2 reads {name} maps, which stage 1 does not make: add '{name}', a video of them")
    frames, _, _ = _decode(entry.maps[name])
    kind = MODALITIES[name].kind
    cuts = (pictures_to_tensor(_cut(frame, size)) for frame in frames)
    images = torch.stack([resize_map(cut, size.height, size.width, kind=kind) for cut in cuts]).clamp(0, 1)
    if len(images) != num_frames:
        raise EntryError(
            f"{entry.maps[name]} has {len(images)} frames and the pose sequence has {num_frames}; the numbers must be "
            "equal"
        )
    return images


def _cut(picture: NDArray[np.uint8], aspect: Size) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    return centred_crop(width, height, to_width=aspect.width, to_height=aspect.height).cut(picture)
