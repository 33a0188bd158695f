"""Which frames of the true clips were compared, and which was the reference, in words for the table."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ComparedFrames:
    """What was compared of one clip.

    Attributes:
        numbers: of the compared frames, in their order.
        reference: number of the clip's frame that was the reference; None if it was a picture that the clip lacks.
        num_frames: length of the clip.
    """

    numbers: tuple[int, ...]
    reference: int | None
    num_frames: int

    @property
    def first(self) -> int:
        """Colour drift is measured against this frame."""
        return self.numbers[0]


def describe_references(clips: Collection[ComparedFrames]) -> str:
    """Which frame of the clips was the reference of the results."""
    frames = {clip.reference for clip in clips}
    are_last = all(clip.reference == clip.num_frames - 1 for clip in clips)
    if frames == {0}:
        return "frame 0 of each clip, its first"
    if frames == {None}:
        return "a picture that is stored with each clip and is none of its frames"
    if len(frames) == 1:
        return f"frame {frames.pop()} of each clip{', its last' * are_last}"
    if are_last:
        return "the last frame of each clip"
    known = [clip.reference for clip in clips if clip.reference is not None]
    low, high = min(known), max(known)
    text = f"each result's own, {f'frame {low}' if low == high else f'frames {low} to {high}'} of the clips"
    others = len(clips) - len(known)
    return text + f"; in {others} of {len(clips)} clips a picture that is none of its frames" * bool(others)


def describe_first(clips: Collection[ComparedFrames]) -> str:
    """Against which frame of the clips colour drift is measured."""
    frames = {clip.first for clip in clips}
    if len(frames) != 1:
        return "the first compared frame of each clip"
    first = frames.pop()
    follows = all(clip.reference == 0 for clip in clips)
    reason = ", since frame 0 is the reference" if follows else ", the first that was compared"
    return f"frame {first} of each clip{reason * bool(first)}"


def is_papers_reference(clips: Collection[ComparedFrames]) -> bool:
    """Whether the reference of every clip is its first frame, as in the papers' tables."""
    return all(clip.reference == 0 for clip in clips)
