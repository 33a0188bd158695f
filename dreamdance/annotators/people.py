"""Follows one person through the frames of a shot, from the people that a detector found in each frame.

Plain geometry: boxes that overlap from frame to frame belong to one person. It knows no pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.boxes import overlaps
from dreamdance.annotators.protocols import Person
from dreamdance.errors import UserError

# Gaps up to this number of frames are bridged: DWPose and BlazePose lose people for some frames of fast motion.
MAX_GAP_FRAMES = 5
# A person who is lost for more frames is another one when found again.
_MAX_LOST_FRAMES = 30
# Boxes of one person overlap at least this much from one frame to the next.
_SMALLEST_OVERLAP = 0.2
# A person that `choice` names by a box overlaps it at least this much.
_CHOSEN_OVERLAP = 0.3
# The confidence of a bridged frame, as a share of the lower one of its neighbours.
_BRIDGED_SCORE = 0.5
# The distance from the centre, in half diagonals of the frame, at which a person counts exp(-1) of its area.
_CENTRAL_DISTANCE = 0.5

Box = tuple[float, float, float, float]


class NoSuchPersonError(UserError):
    """The chosen person is not in these frames; the text lists who is."""


@dataclass(frozen=True)
class FollowedPerson:
    """One person of a shot.

    Attributes:
        people: the person in each frame; None where it was not found, and the gap is too long to bridge.
        is_bridged: whether the person was not found in a frame, but stands between two where it was.
        num_people: number of people that were found in each frame, this one included.
        index: the person's place in the order of importance.
    """

    people: tuple[Person | None, ...]
    is_bridged: tuple[bool, ...]
    num_people: tuple[int, ...]
    index: int


@dataclass
class _Track:
    """One person's appearances, by the number of the frame."""

    seen: dict[int, Person] = field(default_factory=dict)

    def overlap(self, frame: int, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Overlap `(n,)` with boxes `(n, 4)`: where the person was, or should be now, whichever is more.

        The former is right for people who turn back between two frames, the latter for people who cross.
        """
        last = np.array(self.seen[max(self.seen)].box)
        return np.maximum(overlaps(last, boxes), overlaps(self._predict(frame), boxes))

    def _predict(self, frame: int) -> NDArray[np.float64]:
        """The last box, moved on with the speed of the last two appearances."""
        last = max(self.seen)
        box = np.array(self.seen[last].box)
        if last - 1 not in self.seen:
            return box
        before = np.array(self.seen[last - 1].box)
        middle, middle_before = ((part[:2] + part[2:]) / 2 for part in (box, before))
        steps = min(frame - last, MAX_GAP_FRAMES)
        return np.asarray(box + np.tile((middle - middle_before) * steps, 2), dtype=np.float64)


def follow_person(
    people: Sequence[Sequence[Person]],
    *,
    width: int,
    height: int,
    choice: int | Box | None = None,
    max_gap: int = MAX_GAP_FRAMES,
) -> FollowedPerson | None:
    """Follows one person through a shot.

    Args:
        people: the people found in each frame.
        width, height: size of the frames in pixels.
        choice: which person: its place in the order of importance (0, the default, is the largest and most central over
            the shot), or a box: left, top, right and bottom in fractions of the frame, at the first frame in which a
            person overlaps it well.
        max_gap: gaps of up to this number of frames are bridged by regions between those of their neighbours.

    Returns:
        The person, or None if nobody was found in any frame.

    Raises:
        NoSuchPersonError: there is no such person. If nobody was found, all choices but the default are such.
        UserError: the choice is neither.
    """
    check_choice(choice)
    tracks = _connect(people)
    tracks.sort(key=lambda track: -_importance(track, width, height))
    if not tracks:
        if not choice:  # the default
            return None
        raise NoSuchPersonError(f"person: {choice}: nobody was found in {len(people)} frames; leave the key person out")
    index = _choose(tracks, choice, width, height)
    bridged = _bridge(tracks[index].seen, max_gap)
    found = [{**tracks[index].seen, **bridged}.get(frame) for frame in range(len(people))]
    return FollowedPerson(
        people=tuple(found),
        is_bridged=tuple(frame in bridged for frame in range(len(people))),
        num_people=tuple(len(frame) for frame in people),
        index=index,
    )


def check_choice(choice: int | Box | None) -> None:
    """Raises UserError if a choice is neither a place in the order of importance nor a box."""
    if choice is None or (type(choice) is int and choice >= 0):
        return
    if isinstance(choice, Sequence) and len(choice) == 4 and all(type(value) in (int, float) for value in choice):
        left, top, right, bottom = choice
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return
    raise UserError(
        f"person: {choice!r}; accepted is a whole number from 0 (the largest and most central), or a box [left, top, "
        "right, bottom] in fractions of the frame with left < right and top < bottom"
    )


def _connect(people: Sequence[Sequence[Person]]) -> list[_Track]:
    """Joins the people of all frames to tracks: from frame to frame the pairs that overlap most, best first."""
    tracks: list[_Track] = []
    for frame, found in enumerate(people):
        alive = [track for track in tracks if frame - max(track.seen) <= _MAX_LOST_FRAMES + 1]
        free = set(range(len(found)))
        if alive and found:
            boxes = np.array([person.box for person in found])
            table = np.stack([track.overlap(frame, boxes) for track in alive])
            unmatched = set(range(len(alive)))
            for place in np.argsort(-table, axis=None, kind="stable"):
                row, column = divmod(int(place), len(found))
                if table[row, column] < _SMALLEST_OVERLAP:
                    break
                if row in unmatched and column in free:
                    alive[row].seen[frame] = found[column]
                    unmatched.remove(row)
                    free.remove(column)
        tracks += [_Track({frame: found[column]}) for column in sorted(free)]
    return tracks


def _importance(track: _Track, width: int, height: int) -> float:
    """The area of a person, summed over the shot; less for people far from the centre."""
    total = 0.0
    for person in track.seen.values():
        left, top, right, bottom = person.box
        distance = math.hypot((left + right) / 2 - width / 2, (top + bottom) / 2 - height / 2)
        share = distance / (_CENTRAL_DISTANCE * math.hypot(width, height) / 2)
        total += (right - left) * (bottom - top) / (width * height) * math.exp(-(share**2))
    return total


def _choose(tracks: list[_Track], choice: int | Box | None, width: int, height: int) -> int:
    if choice is None or isinstance(choice, int):
        if (choice or 0) < len(tracks):
            return choice or 0
        raise NoSuchPersonError(f"person: {choice}: there are {len(tracks)} people: {_describe(tracks, width, height)}")
    box = np.array(choice, dtype=np.float64) * (width, height, width, height)
    for frame in sorted({frame for track in tracks for frame in track.seen}):
        present = [index for index, track in enumerate(tracks) if frame in track.seen]
        shared = overlaps(box, np.array([tracks[index].seen[frame].box for index in present]))
        if shared.max() >= _CHOSEN_OVERLAP:
            return present[int(shared.argmax())]
    raise NoSuchPersonError(
        f"person: {list(choice)}: nobody is there; the people are: {_describe(tracks, width, height)}"
    )


def _describe(tracks: list[_Track], width: int, height: int, limit: int = 8) -> str:
    lines = []
    for index, track in enumerate(tracks[:limit]):
        first = min(track.seen)
        box = [round(value / side, 3) for value, side in zip(track.seen[first].box, (width, height) * 2, strict=True)]
        lines.append(f"{index}: in {len(track.seen)} frames, at {box} in frame {first}")
    return "; ".join([*lines, *(["..."] if len(tracks) > limit else [])])


def _bridge(seen: dict[int, Person], max_gap: int) -> dict[int, Person]:
    """The person in the frames of short gaps."""
    bridged = {}
    frames = sorted(seen)
    for before, after in pairwise(frames):
        if 1 < after - before <= max_gap + 1:
            for frame in range(before + 1, after):
                share = (frame - before) / (after - before)
                bridged[frame] = _between(seen[before], seen[after], share)
    return bridged


def _between(before: Person, after: Person, share: float) -> Person:
    box = (1 - share) * np.array(before.box) + share * np.array(after.box)
    region = (1 - share) * np.array(before.region) + share * np.array(after.region)
    turn = math.remainder(after.region[3] - before.region[3], 2 * math.pi)  # the shorter way round
    rotation = math.remainder(before.region[3] + share * turn, 2 * math.pi)
    left, top, right, bottom = (float(value) for value in box)
    x, y, side = (float(value) for value in region[:3])
    score = _BRIDGED_SCORE * min(before.score, after.score)
    return Person((left, top, right, bottom), score, (x, y, side, rotation))
