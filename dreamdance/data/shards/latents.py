"""Stored latents: what the frozen networks of a training make of a clip's frames, in the form of schema 2.

A folder of latents is a folder of shards with one sample for each sample of the shards that it was encoded from, in
the same order. Its tracks are named `latents.rgb` for the means and `latents.rgb.deviation` for the standard
deviations, which references lack in stage 1's folders; both have `.mirrored` appended for the mirrored frames. This
module does not know the networks.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.data.shards.frame_codecs import FLOAT_CODECS, FloatCodec, FrameFormat, decode_floats, encode_floats
from dreamdance.data.shards.index import ShardIndex
from dreamdance.data.shards.tracks import ClipHead, ReadExtents, Subject, Track, TrackWriter
from dreamdance.errors import ShardError

PREFIX = "latents."
# The image encoder's embedding of a picture that may serve as the reference.
EMBEDDING = "embedding"
# The name of the reference's latents, the mean of their distribution, among the latents of a training window.
REFERENCE = "reference"
# What is appended to the name of a modality for its standard deviations.
DEVIATION = ".deviation"


@dataclass(frozen=True)
class LatentSettings:
    """What decides the content of a folder of latents; the index contains it.

    Attributes:
        source: hash of the shards that were encoded (`source_digest`).
        autoencoder, image_encoder: hashes of the networks that encoded, with their scaling conventions.
        width, height: size of the pictures.
        domains: the modalities of the clips whose latents are stored.
        flip: whether the mirrored frames were encoded too.
        precision: number format of the stored values.
        reference_moments: whether references have standard deviations too, as stage 2 needs them.
    """

    source: str
    autoencoder: str
    image_encoder: str
    width: int
    height: int
    domains: tuple[str, ...]
    flip: bool
    precision: FloatCodec
    reference_moments: bool = False

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "domains": list(self.domains), "kind": "latents"}
        if not self.reference_moments:  # as folders of earlier versions, which lack the entry
            del values["reference_moments"]
        return values

    @classmethod
    def of_index(cls, index: ShardIndex) -> "LatentSettings":
        """Reads the settings of a folder.

        Raises:
            ShardError: the folder contains no latents.
        """
        found = dict(index.details.get("settings", {}))
        try:
            if found.pop("kind") != "latents":
                raise KeyError("kind")
            found.setdefault("reference_moments", False)
            values = {name: found[name] for name in cls.__dataclass_fields__}
            return cls(**{**values, "domains": tuple(values["domains"])})
        except (KeyError, TypeError) as error:
            raise ShardError(f"{index.path} lists no latents; a recipe with `task: encode` writes them") from error


def source_digest(index: ShardIndex) -> str:
    """A hash of the content of a folder of shards, by the hashes that its index lists."""
    listed = [[shard.num_samples, shard.raw.hashes] for shard in index.shards]
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


@dataclass
class LatentRecord:
    """The latents of a clip that are to be stored.

    Attributes:
        clip: the head of the clip; its tracks are not used.
        precision: number format.
    """

    clip: ClipHead
    precision: FloatCodec
    _writer: TrackWriter = field(default_factory=TrackWriter)

    def add(self, name: str, values: Tensor, *, subject: Subject, mirrored: bool) -> None:
        """Adds a track.

        Args:
            name: a modality or `EMBEDDING`.
            values: moments `n 2 c h w`, mean and standard deviation; means alone, `n 1 c h w`; or embeddings `n c`.
            subject: whose frames they are.
            mirrored: whether the frames were mirrored before.

        Raises:
            ShardError: a value is not finite.
        """
        if not torch.isfinite(values).all():
            raise ShardError(f"clip '{self.clip.clip_id}': the {name} latents contain values that are not finite")
        values = values.float().cpu()
        if values.ndim == 2:
            self._add_track(_track_name(name, mirrored), rearrange(values, "n c -> n 1 1 c"), subject)
            return
        for part, of_part in zip((name, name + DEVIATION), values.unbind(dim=1), strict=False):
            self._add_track(_track_name(part, mirrored), rearrange(of_part, "n c h w -> n h w c"), subject)

    def _add_track(self, name: str, values: Tensor, subject: Subject) -> None:
        frames = values.contiguous().numpy()
        count, height, width, channels = frames.shape
        kind = FrameFormat(count, height, width, channels, frames.dtype, self.precision)
        self._writer.add(name, subject, kind, [encode_floats(frame, self.precision) for frame in frames])

    def to_sample(self) -> dict[str, Any]:
        """The columns of a shard."""
        return self._writer.sample(self.clip)


class LatentClip:
    """The stored latents of a clip; reads those that are asked for."""

    def __init__(self, head: ClipHead, read: ReadExtents, *, where: str) -> None:
        """Reads nothing yet.

        Args:
            head: the head of the sample.
            read: reads ranges of the column `frames`.
            where: the shard and the sample's place in it, for error texts.
        """
        self.clip_id, self.num_frames, self.where = head.clip_id, head.num_frames, f"{where} (clip '{head.clip_id}')"
        self._read = read
        self._tracks: Mapping[tuple[str, str], Track] = {(track.subject, track.name): track for track in head.tracks}

    def moments(self, name: str, indices: Sequence[int], *, subject: Subject = "clip", mirrored: bool) -> Tensor:
        """Mean and standard deviation of frames, `n 2 c h w` float32.

        Raises:
            ShardError: there are none, or they are damaged.
        """
        parts = [self.means(part, indices, subject=subject, mirrored=mirrored) for part in (name, name + DEVIATION)]
        return torch.stack(parts, dim=1)

    def means(self, name: str, indices: Sequence[int], *, subject: Subject = "clip", mirrored: bool) -> Tensor:
        """Means of frames, `n c h w` float32. See `moments`."""
        return rearrange(self._frames(name, indices, subject, mirrored), "n h w c -> n c h w").contiguous()

    def embeddings(self, indices: Sequence[int], *, subject: Subject = "clip", mirrored: bool) -> Tensor:
        """Embeddings of pictures, `n c` float32. See `moments`."""
        return rearrange(self._frames(EMBEDDING, indices, subject, mirrored), "n 1 1 c -> n c")

    def _frames(self, name: str, indices: Sequence[int], subject: Subject, mirrored: bool) -> Tensor:
        track = self._tracks.get((subject, _track_name(name, mirrored)))
        if track is None or track.kind is None or track.kind.codec not in FLOAT_CODECS:
            raise ShardError(
                f"{self.where} has no latents of {'mirrored ' if mirrored else ''}{name} ({subject}); encode the "
                "shards again with the recipe's `domains` and `flip`"
            )
        extents = [track.extent(index) for index in indices]
        frames: list[NDArray[np.float32]] = [
            decode_floats(payload, track.kind, where=f"{self.where}, {extent.name}")
            for extent, payload in zip(extents, self._read(extents), strict=True)
        ]
        return torch.from_numpy(np.stack(frames))


def _track_name(name: str, mirrored: bool) -> str:
    return f"{PREFIX}{name}{'.mirrored' if mirrored else ''}"
