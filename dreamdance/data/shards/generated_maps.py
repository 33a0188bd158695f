"""Stored maps that a trained stage 1 made of a clip's poses and reference, in the form of schema 2.

A folder of maps has one sample for each sample of the shards that it was made from, in the same order, with tracks
`normal` and `depth` of the clip and of its references. This module does not know the networks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.frame_codecs import decode_frame, encode_frame, frame_format
from dreamdance.data.shards.index import ShardIndex
from dreamdance.data.shards.tracks import ClipHead, ReadExtents, Subject, Track, TrackWriter
from dreamdance.errors import ShardError

# The maps that are stored: all that stage 1 predicts but its pictures, which are dropped (Eq. 2).
GENERATED = ("normal", "depth")


@dataclass(frozen=True)
class MapSettings:
    """What decides the content of a folder of maps; the index contains it.

    Attributes:
        source: hash of the shards whose poses and references were used (`latents.source_digest`).
        geometry: hash of the files of stage 1's export.
        width, height: size of the maps.
        sampling: stage 1's sampling, by key.
        seed: seed of the noise.
        precision: number format of the networks.
    """

    source: str
    geometry: str
    width: int
    height: int
    sampling: dict[str, Any]
    seed: int
    precision: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kind": "maps"}

    @classmethod
    def of_index(cls, index: ShardIndex) -> "MapSettings":
        """Reads the settings of a folder.

        Raises:
            ShardError: the folder contains no generated maps.
        """
        found = index.details.get("settings")
        try:
            if not isinstance(found, dict) or found["kind"] != "maps":
                raise KeyError("kind")
            return cls(**{name: found[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise ShardError(
                f"{index.path} lists no generated maps; a recipe with `task: encode` and geometry_from writes them"
            ) from error


def map_sample(clip: ClipHead, maps: Mapping[Subject, Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
    """The columns of a shard.

    Args:
        clip: the head of the clip; its tracks are not used.
        maps: for the clip, and for its references if it has any, each map in the encoding of the shards (C9):
            normal `(n, H, W, 3)` uint8, depth `(n, H, W)` uint16.
    """
    writer = TrackWriter()
    for subject, by_name in maps.items():
        for name in GENERATED:
            frames = by_name[name]
            writer.add(name, subject, frame_format(frames, "png"), [encode_frame(frame, "png") for frame in frames])
    return writer.sample(clip)


class GeneratedClip:
    """The generated maps of a clip; reads those that are asked for."""

    def __init__(self, head: ClipHead, read: ReadExtents, *, where: str) -> None:
        """Reads nothing yet; see `latents.LatentClip`."""
        self.clip_id, self.num_frames, self.where = head.clip_id, head.num_frames, f"{where} (clip '{head.clip_id}')"
        self._read = read
        self._tracks: Mapping[tuple[str, str], Track] = {(track.subject, track.name): track for track in head.tracks}

    def pictures(self, name: str, indices: Sequence[int], *, subject: Subject = "clip") -> NDArray[Any]:
        """The maps of frames, `(n, H, W, c)`; depth has one channel.

        Raises:
            ShardError: there are none, or they are damaged.
        """
        track = self._tracks.get((subject, name))
        if track is None or track.kind is None:
            raise ShardError(f"{self.where} has no generated {name} ({subject}); make the maps of the shards again")
        extents = [track.extent(index) for index in indices]
        frames: NDArray[Any] = np.stack(
            [
                decode_frame(payload, track.kind, where=f"{self.where}, {extent.name}")
                for extent, payload in zip(extents, self._read(extents), strict=True)
            ]
        )
        return frames[..., None] if frames.ndim == 3 else frames
