"""Finds videos that show the same footage, by one hash per second.

Re-encoded, rescaled, trimmed, brightened and mirrored copies are found; cropped, rotated and recoloured ones are not.
Videos of one unmoved camera are found too, since the background fills most of their pictures. All of a group belongs to
one side of the split: a held-out video must not be one that was trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Two seconds are the same if at most this many of the 64 bits of their hashes differ.
MAX_DISTANCE = 6
# ... and if their mean colours (Cb and Cr, of 255) differ by at most this. Hashes ignore colours, and without this
# condition 1 of the 124,750 pairs among 500 dancers of three seconds on different stages counts as the same.
MAX_COLOUR_DISTANCE = 10.0
# Two videos are the same if this share of the seconds of the shorter one is found in the other.
MIN_SHARE = 0.6

_SIDE = 8
_BITS = _SIDE * _SIDE
# Each hash is of the mean of two seconds, one second after the previous one. A hash of single frames misses copies that
# begin elsewhere: half a second later, a fast dancer differs in more than 6 bits (found: 0 % of the seconds of a real
# video and of one of four dancers; of means 100 %).
_WINDOW_SECONDS = 2
# Hashes of one video are compared with those of others in blocks of this many pairs, of at most 64 rows: 1 MiB, so
# that the memory does not grow with the length of a video.
_BLOCK_VALUES = 1 << 18
_MAX_ROWS = 64
# Pictures whose brightness varies less (standard deviation, of 255) have no hash: black, white and faded ones.
_LEAST_CONTRAST = 4.0


@dataclass(frozen=True)
class VideoHashes:
    """The hashes of a video.

    Attributes:
        name: of the video, unique.
        frames: `(s, 64)` bool, one row per second; those without contrast are left out.
        mirrored: `(s, 64)` bool, of the same pictures mirrored from left to right.
        colours: `(s, 2)` float32, their mean Cb and Cr, 0 to 255.
    """

    name: str
    frames: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]
    colours: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """The hashes as hexadecimal numbers, and the colours."""
        bits = {"frames": _to_hex(self.frames), "mirrored": _to_hex(self.mirrored)}
        return {"name": self.name, **bits, "colours": self.colours.astype(np.float64).round(2).tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "VideoHashes":
        """The inverse of `to_json`."""
        colours = np.array(content["colours"], np.float32).reshape(-1, 2)
        return cls(str(content["name"]), _from_hex(content["frames"]), _from_hex(content["mirrored"]), colours)


def hash_video(name: str, frames: Iterable[NDArray[np.uint8]], *, fps: float) -> VideoHashes:
    """Hashes a video.

    The bits of a difference hash compare neighbours in each row of a grey picture of 9 x 8 pixels.

    Args:
        name: of the video.
        frames: all its frames, `(H, W, 3)` uint8 of any size: small ones, such as those for the detection of shots,
            are enough.
        fps: frames per second.
    """
    size = (_SIDE + 1, _SIDE)
    small = [cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)
             for frame in map(np.ascontiguousarray, frames)]  # fmt: skip
    kept, mirrored = [np.zeros((0, _BITS), bool)], [np.zeros((0, _BITS), bool)]
    colours = []
    for second in range(max(1, round(len(small) / fps) - _WINDOW_SECONDS + 1) if small else 0):
        start = round(second * fps)
        window = small[start : max(start + 1, round((second + _WINDOW_SECONDS) * fps))]
        if not window:
            break  # less than a frame per second: the last windows begin behind the last frame
        picture = np.stack(window).mean(axis=0, dtype=np.float32)
        brightness = picture[..., 0]
        if brightness.std() >= _LEAST_CONTRAST:
            kept.append(_difference_bits(brightness))
            mirrored.append(_difference_bits(brightness[:, ::-1]))
            colours.append(picture[..., :0:-1].mean(axis=(0, 1)))
    return VideoHashes(
        name, np.concatenate(kept), np.concatenate(mirrored), np.array(colours, np.float32).reshape(-1, 2)
    )


def _difference_bits(small: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray(small[:, 1:] > small[:, :-1]).reshape(1, _BITS)


def find_duplicates(
    videos: Sequence[VideoHashes],
    *,
    max_distance: int = MAX_DISTANCE,
    min_share: float = MIN_SHARE,
    before_video: Callable[[str], None] = lambda name: None,
) -> list[tuple[str, str]]:
    """Finds all pairs of videos that show the same footage, also mirrored.

    Every second of a video is compared with every second of all others, so that the time grows with the square of the
    number of seconds; pairs of seconds that are alike take longer than others. The memory does not depend on these.

    Args:
        videos: in any order; a video without any hash is never part of a pair.
        max_distance: see `MAX_DISTANCE`.
        min_share: see `MIN_SHARE`.
        before_video: called with the name of a video before it is compared with all that follow it.

    Returns:
        Pairs of names, each in the order of `videos`.
    """
    seconds = _Seconds(videos)
    pairs = []
    for number, video in enumerate(seconds.videos[:-1]):
        before_video(video.name)
        found = seconds.same_footage(video, number + 1, max_distance=max_distance, min_share=min_share)
        pairs += [(video.name, other) for other in found]
    return pairs


class _Seconds:
    """The hashes of the seconds of many videos; `videos` are those that have any."""

    def __init__(self, videos: Sequence[VideoHashes]) -> None:
        self.videos = [video for video in videos if len(video.frames)]
        self._lengths = np.array([len(video.frames) for video in self.videos], np.int64)
        self._starts = np.cumsum([0, *self._lengths])
        self._video_of = np.repeat(np.arange(len(self.videos)), self._lengths)
        none = np.zeros((0, _BITS), np.float32)
        self._signs = np.concatenate([none, *(_signs(one.frames) for one in self.videos)])
        self._mirrored = np.concatenate([none, *(_signs(one.mirrored) for one in self.videos)])
        self._colours = np.concatenate([np.zeros((0, 2), np.float32), *(one.colours for one in self.videos)])

    def same_footage(
        self,
        video: VideoHashes,
        first: int,
        *,
        max_distance: int = MAX_DISTANCE,
        min_share: float = MIN_SHARE,
        known: NDArray[np.bool_] | None = None,
    ) -> list[str]:
        """The names of the videos from number `first` on that show the footage of another video.

        The answer does not depend on which of two videos is asked for: each is compared with the other's mirrored
        pictures, whose hashes differ where neighbours are equal, and of two equal lengths the larger share counts.
        Videos that are `known`, a flag for each from `first` on, are left out.
        """
        if known is not None and known.all():
            return []
        left_out = None if known is None or not known.any() else np.repeat(known, self._lengths[first:])
        lengths, share = self._lengths[first:], np.zeros(len(self.videos) - first)
        own, mirrored = _signs(video.frames), _signs(video.mirrored)
        for hashes, signs in ((own, self._signs), (mirrored, self._signs), (own, self._mirrored)):
            # Which seconds of the video are found in each other video, and which seconds of those are found in it.
            found_here = np.zeros((0, 0), bool)
            found_there = np.zeros(0, bool)
            for here, there in _near_seconds(hashes, signs[self._starts[first] :], max_distance, left_out):
                colours = self._colours[self._starts[first] + there]
                alike = np.abs(video.colours[here] - colours).max(axis=1) <= MAX_COLOUR_DISTANCE
                if not found_there.size:
                    found_here = np.zeros((len(hashes), len(lengths)), bool)
                    found_there = np.zeros(len(self._signs) - self._starts[first], bool)
                found_here[here[alike], self._video_of[self._starts[first] + there[alike]] - first] = True
                found_there[there[alike]] = True
            if found_there.any():
                num_there = np.add.reduceat(found_there, self._starts[first:-1] - self._starts[first], dtype=np.int64)
                here_share = np.where(len(hashes) <= lengths, found_here.sum(axis=0) / len(hashes), 0.0)
                there_share = np.where(lengths <= len(hashes), num_there / lengths, 0.0)
                share = np.maximum(share, np.maximum(here_share, there_share))
        return [self.videos[first + int(number)].name for number in np.flatnonzero(share >= min_share)]


def _near_seconds(
    some: NDArray[np.float32],
    others: NDArray[np.float32],
    max_distance: int,
    left_out: NDArray[np.bool_] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields the pairs of hashes, as signs `(s, 64)`, of which at most `max_distance` bits differ: numbers in both."""
    for top in range(0, len(some), _MAX_ROWS):
        rows = some[top : top + _MAX_ROWS]
        size = max(1, _BLOCK_VALUES // len(rows))
        for start in range(0, len(others), size):
            # The product of signs is 64 - 2 x the number of bits that differ.
            near = rows @ others[start : start + size].T >= _BITS - 2 * max_distance
            if left_out is not None:
                near &= ~left_out[start : start + size]
            if near.any():
                here, there = np.nonzero(near)
                yield here + top, there + start


def find_groups(
    names: Sequence[str],
    videos: Sequence[VideoHashes],
    *,
    before_video: Callable[[str], None] = lambda name: None,
) -> list[list[str]]:
    """The groups of `group_duplicates` over all pairs of `find_duplicates`, without a look at pairs within a group.

    Two videos that are in one group already need no comparison. So many videos of one camera, which are all alike, take
    a comparison of the first with the others, and not of all with all.

    Args:
        names: of all videos.
        videos: the hashes of those that have any, with unique names.
        before_video: called with the name of a video before it is compared with all that follow it.
    """
    seconds = _Seconds(videos)
    places = {video.name: place for place, video in enumerate(seconds.videos)}
    group = np.arange(len(places))
    pairs = []
    for number, video in enumerate(seconds.videos[:-1]):
        before_video(video.name)
        known = group[number + 1 :] == group[number]
        for other in seconds.same_footage(video, number + 1, known=known):
            pairs.append((video.name, other))
            group[group == group[places[other]]] = group[number]
    return group_duplicates(names, pairs)


def group_duplicates(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Unites pairs to groups, which a split must not divide.

    Args:
        names: of all videos.
        pairs: from `find_duplicates`.

    Returns:
        All names in groups, most of one name, in the order of `names`.
    """
    group_of = {name: [name] for name in names}
    for first, second in pairs:
        kept, joined = group_of[first], group_of[second]
        if kept is not joined:
            kept += joined
            group_of.update(dict.fromkeys(joined, kept))
    order = {name: place for place, name in enumerate(names)}
    unique = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values()}
    return sorted(unique.values(), key=lambda group: order[group[0]])


def check_leaks(
    train: Sequence[VideoHashes],
    validation: Sequence[VideoHashes],
    *,
    before_video: Callable[[str], None] = lambda name: None,
) -> list[tuple[str, str]]:
    """Finds footage on both sides of a split: pairs of a training video and a validation video; empty if sound.

    Args:
        train, validation: all videos of each side.
        before_video: called with the name of each training video before it is compared.

    Raises:
        ValueError: a name is on both sides.
    """
    of_train, of_validation = ({video.name for video in side} for side in (train, validation))
    if both := sorted(of_train & of_validation):
        raise ValueError(f"in the training set and in the validation set: {', '.join(both)}")
    held_out = _Seconds(validation)
    pairs = []
    for video in _Seconds(train).videos:
        before_video(video.name)
        pairs += [(video.name, other) for other in held_out.same_footage(video, 0)]
    return pairs


def _signs(bits: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(bits, np.float32(1), np.float32(-1))


def _to_hex(bits: NDArray[np.bool_]) -> list[str]:
    return [row.tobytes().hex() for row in np.packbits(bits, axis=1)]


def _from_hex(numbers: Sequence[str]) -> NDArray[np.bool_]:
    if any(len(number) != _BITS // 4 for number in numbers):
        raise ValueError(f"a hash is not {_BITS // 4} hexadecimal digits")
    packed = np.frombuffer(bytes.fromhex("".join(numbers)), np.uint8)
    return np.unpackbits(packed).astype(bool).reshape(-1, _BITS)
