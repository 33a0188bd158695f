"""The dataset of training windows, which are cut from stored clips; `loader` delivers the windows to the ranks.

This module does not use the process group: ranks need no synchronisation, and a single rank may open a dataset.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamdance.data.loading.batch import ClipSample
from dreamdance.data.loading.clip_frames import ClipFrames, crop_and_resize, flip_clip, open_pictures
from dreamdance.data.loading.domain_draw import draw_domain, name_target
from dreamdance.data.loading.latent_windows import read_latents
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import NO_CROP, StoredClip, Window, draw_window, read_window
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.loading.window_regions import window_regions
from dreamdance.data.shards.generated_maps import GENERATED, GeneratedClip
from dreamdance.data.shards.latents import REFERENCE, LatentClip
from dreamdance.errors import ShardError
from dreamdance.media.cropping import PartialCrop
from dreamdance.media.transforms import flip_images
from dreamdance.modalities import ALWAYS_READ, DOMAINS, MODALITIES, Kind
from dreamdance.recipe.sections import Shards, Verify
from dreamdance.runtime.ranks import Ranks

CACHE_BYTES = 256 << 20


class ClipDataset(StoredClips):
    """Training windows of stored clips. The random numbers of a sample depend only on its key."""

    def __init__(
        self,
        shards: Shards,
        *,
        width: int,
        height: int,
        num_frames: int,
        stride: tuple[int, int] = (1, 1),
        flip_probability: float = 0.0,
        reference_margin: int = 0,
        crop_scale: tuple[float, float] = NO_CROP,
        reference_first: bool = False,
        seed: int = 0,
        maps: Sequence[str] = (),
        map_sizes: Mapping[str, tuple[int, int]] | None = None,
        verify: Verify = "first_use",
        ranks: Ranks | None = None,
        cache_bytes: int = CACHE_BYTES,
        before_shard: Callable[[str], None] | None = None,
        latents: StoredClips | None = None,
        latent_names: Sequence[str] = (),
        generated: StoredClips | None = None,
        domain_weights: Tensor | None = None,
        with_regions: bool = False,
    ) -> None:
        """Checks the shards.

        Args:
            shards, verify, ranks, cache_bytes, before_shard: see `StoredClips`.
            width, height: size of the returned frames in pixels.
            num_frames: number of frames in a window, with the reference if it comes first.
            stride: smallest and largest distance between the frames of a window.
            flip_probability: probability of mirroring a clip that has key points.
            reference_margin, crop_scale: see `stored_clip.draw_window`.
            reference_first: whether the reference, with its own maps, is the first frame of every window.
            seed: the first part of every sample's key.
            maps: the modalities to read besides rgb and pose; a clip that lacks one of them is an error.
            map_sizes: the size (width, height) of maps that are returned smaller than the others, with their aspect, if
                the set is stored at that size too; else they are returned like the others, as they are if frames are
                cropped, so that a crop shows the same of all maps.
            latents: the folder of these clips' latents, which fit the recipe (`encoding.fit`); then no clip is cached.
            latent_names: what is read from it, see `read_latents`; it replaces the pictures of the same name.
            generated: the folder of the maps of these clips that a stage 1 made, which replace the true ones.
            domain_weights: if given, only one domain of each sample is read; see `domain_draw`.
            with_regions: whether samples have the boxes of face and hands (`ClipBatch.regions`).

        Raises:
            ShardError: shards are missing, damaged, of another format or hostile.
        """
        super().__init__(
            shards,
            verify=verify,
            ranks=ranks,
            cache_bytes=cache_bytes if latents is None else 0,  # the cache decodes all maps of a clip
            size=(width, height),
            map_sizes=map_sizes if crop_scale == NO_CROP else None,
            before_shard=before_shard,
        )
        settings = self.index.details.get("settings")
        listed = settings.get("smaller_sizes", []) if isinstance(settings, dict) else []
        self._generated = generated
        if generated is None:  # generated maps have that size
            self._map_sizes = {name: size for name, size in self._map_sizes.items() if list(size) in listed}
        self.width, self.height, self.num_frames = width, height, num_frames
        self.stride, self.flip_probability, self.seed = stride, flip_probability, seed
        self.reference_margin, self.crop_scale = reference_margin, crop_scale
        self.maps, self.domain_weights, self.with_regions = tuple(maps), domain_weights, with_regions
        self.reference_first = reference_first
        self._latents, self._latent_names = latents, frozenset(latent_names if latents is not None else ())

    def training_sample(self, key: SampleKey) -> ClipSample:
        """The training window of a sample in an epoch, as floats; see `stored_sample`."""
        return self.stored_sample(key).floats()

    def stored_sample(self, key: SampleKey) -> ClipSample:
        """The training window of a sample in an epoch, as the loader delivers it (`ClipBatch`).

        Raises:
            ShardError: the sample's shard is missing or damaged, or its clip is too short or lacks a map.
        """
        clip = self.clip(key.sample_id)
        full_key = (self.seed, key.epoch, key.sample_id)
        window = draw_window(
            clip,
            full_key,
            num_frames=self.num_frames - self.reference_first,
            stride=self.stride,
            flip_probability=self.flip_probability,
            reference_margin=self.reference_margin,
            crop_scale=self.crop_scale,
        )
        if self.reference_first:
            flip = window.flip and clip.has_keypoints_of(window.reference.subject)
            window = replace(window, reference_first=True, flip=flip)
        if self.domain_weights is None:
            return self.cut(clip, window, full_key)
        drawn = DOMAINS[int(draw_domain(self.domain_weights, full_key))]
        return name_target(self.cut(clip, window, full_key, left_out={*DOMAINS} - {drawn}), drawn)

    def cut(
        self, clip: StoredClip, window: Window, key: tuple[int, int, int], left_out: Set[str] = frozenset()
    ) -> ClipSample:
        """Cuts a window from a clip: reads its frames, mirrors them if `window.flip`, crops, resizes."""
        wanted = {*ALWAYS_READ, *self.maps} - self._latent_names - left_out
        maps = {name: self._open_map(clip, window, name, key[2]) for name in MODALITIES if name in wanted}
        if window.flip:
            keypoints = torch.from_numpy(clip.keypoints_of(window.frames))
            maps = dict(flip_clip(ClipFrames(maps, keypoints), drawn_pose=maps["pose"]).maps)
        return ClipSample(
            maps={name: self._resize_frames(images, window, name) for name, images in maps.items()}
            | self._read_latents(clip, window, key[2], self._latent_names - left_out),
            reference=self._reference(clip, window),
            fps=clip.fps / window.stride,
            key=key,
            clip_id=clip.clip_id,
            regions=window_regions(clip, window, width=self.width, height=self.height)
            if self.with_regions
            else torch.empty(0),
        )

    def _open_map(self, clip: StoredClip, window: Window, name: str, sample_id: int) -> Tensor:
        """The stored frames of a map; of a mirrored window the poses are drawn instead, already mirrored."""
        kind = MODALITIES[name].kind
        read: Callable[..., NDArray[Any]] = partial(clip.pictures, name)
        if self._generated is not None and name in GENERATED:
            generated = self._generated.generated(sample_id)
            _check_same_clip(generated, clip)
            read = partial(generated.pictures, name)
        elif window.flip and kind == "drawing":
            read = clip.mirrored_pose
        return self._open_pictures(read_window(read, window), kind, window, name)

    def _open_pictures(self, pictures: NDArray[Any], kind: Kind, window: Window, name: str = "rgb") -> Tensor:
        width, height = self._size_of(name)
        cropped = window.crop is not None
        return open_pictures(pictures, kind, flip=window.flip, width=width, height=height, cropped=cropped)

    def _reference(self, clip: StoredClip, window: Window) -> Tensor:
        """The reference picture, `3 H W`; empty if stored latents replace it."""
        if REFERENCE in self._latent_names:
            return torch.empty(0)
        reference = self._open_pictures(clip.reference_picture(window.reference), "colours", window)
        return self._resize(flip_images(reference) if window.flip else reference, "colours", window.reference_crop)

    def _read_latents(self, clip: StoredClip, window: Window, sample_id: int, names: Set[str]) -> dict[str, Tensor]:
        if self._latents is None:
            return {}
        stored = self._latents.latents(sample_id)
        _check_same_clip(stored, clip)
        return read_latents(stored, window, sorted(names))

    def _resize_frames(self, images: Tensor, window: Window, name: str) -> Tensor:
        """Crops and resizes the frames of a map; the reference before them has a crop of its own."""
        kind = MODALITIES[name].kind
        if not window.reference_first or window.crop == window.reference_crop:
            return self._resize(images, kind, window.crop, name)
        parts = (images[:1], window.reference_crop), (images[1:], window.crop)
        return torch.cat([self._resize(frames, kind, crop, name) for frames, crop in parts])

    def _resize(self, images: Tensor, kind: Kind, crop: PartialCrop | None, name: str = "rgb") -> Tensor:
        width, height = self._size_of(name)
        return crop_and_resize(images, kind, width=width, height=height, crop=crop)

    def _size_of(self, name: str) -> tuple[int, int]:
        return self._map_sizes.get(name, (self.width, self.height))


def _check_same_clip(stored: LatentClip | GeneratedClip, clip: StoredClip) -> None:
    if (stored.clip_id, stored.num_frames) != (clip.clip_id, clip.num_frames):
        raise ShardError(f"{stored.where} does not belong to {clip.where}; encode the shards again")
