"""The batch that the objectives train on, and the function that stacks clips into one. No shards or files here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dreamdance.data.shards.latents import PREFIX
from dreamdance.errors import ShardError
from dreamdance.media.transforms import scale_to_floats


@dataclass(frozen=True)
class ClipSample:
    """One training window: the fields of `ClipBatch` without the first dimension."""

    maps: Mapping[str, Tensor]
    reference: Tensor
    fps: float
    key: tuple[int, int, int]
    clip_id: str
    regions: Tensor = field(default_factory=lambda: torch.empty(0))

    def floats(self) -> "ClipSample":
        """The sample with maps and reference as the objectives use them: float32 in [0,1], 3 channels."""
        reference = as_floats(self.reference) if self.reference.numel() else self.reference
        return replace(self, maps=_maps_as_floats(self.maps), reference=reference)


@dataclass(frozen=True)
class ClipBatch:
    """Windows of b clips.

    The loader delivers maps and references that need no resizing as they are stored, uint8 or uint16, and maps with one
    value per pixel in one channel: a quarter or less of the bytes. `to` makes them what the attributes describe.

    Attributes:
        maps: `b f 3 H W` in [0,1] by modality, in the order of `modalities.MODALITIES`: rgb, pose and the requested
            ones, without those that stored latents replace. Normals are (n+1)/2, of unit length after decoding; depth
            is disparity, near points bright; a mask is 1 on the body, else 0. Maps with one value per pixel repeat it
            in all 3 channels. The stored latents are listed beside them, with names that begin with `latents.`.
            If the reference comes first (`ClipDataset`), frame 0 of each map is the reference's own.
            If the loader draws one domain of each clip, that is `target`, or `latents.target`; the others are absent.
        reference: `b 3 H W` in [0,1], a frame of the same clip; empty if its stored latents replace it.
        fps: `b`, frames per second after the stride.
        keys: `b 3` int64: seed, epoch, sample id; the source of every random number about a sample.
        clip_ids: b names.
        regions: `b f 3 5`, the boxes of face and hands in each frame as `media.keypoint_regions.region_boxes` gives
            them, and confidence `UNKNOWN` in clips without key points; empty if the loader was not asked for them.
    """

    maps: Mapping[str, Tensor]
    reference: Tensor
    fps: Tensor
    keys: Tensor
    clip_ids: list[str]
    regions: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.clip_ids)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], clip_ids: list[str]) -> "ClipBatch":
        """The inverse of `tensors`."""
        maps = dict(tensors)
        reference = maps.pop("reference", torch.empty(0))
        regions = maps.pop("regions", torch.empty(0))
        fps, keys = maps.pop("fps"), maps.pop("keys")
        return cls(maps, reference, fps, keys, clip_ids, regions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch by name."""
        optional = {"reference": self.reference, "regions": self.regions}
        present = {name: tensor for name, tensor in optional.items() if tensor.numel()}
        return {**self.maps, **present, "fps": self.fps, "keys": self.keys}

    @property
    def rgb(self) -> Tensor:
        """`b f 3 H W` in [0,1], the pictures."""
        return self.maps["rgb"]

    @property
    def pose(self) -> Tensor:
        """`b f 3 H W` in [0,1], the pose drawings on black."""
        return self.maps["pose"]

    @property
    def latents(self) -> dict[str, Tensor]:
        """Stored latents by name, see `latent_windows.read_latents`; empty if training encodes pictures itself."""
        return {name.removeprefix(PREFIX): values for name, values in self.maps.items() if name.startswith(PREFIX)}

    def select(self, indices: Sequence[int]) -> "ClipBatch":
        """The clips of the given numbers, without sharing memory."""
        chosen = {name: tensor[list(indices)] for name, tensor in self.tensors.items()}
        return self.from_tensors(chosen, [self.clip_ids[index] for index in indices])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ClipBatch":
        """Returns the batch on a device, as float32; `keys` stay on the CPU, where random numbers are drawn."""
        moved = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in self.tensors.items()
            if name != "keys"
        }
        pictures = {name: moved[name] for name in moved if name not in ("fps", "regions")}
        return self.from_tensors({**moved, **_maps_as_floats(pictures), "keys": self.keys}, self.clip_ids)

    def pin_memory(self) -> "ClipBatch":
        """Returns the batch in page-locked memory; the loader calls this if there is a GPU."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "ClipBatch":
        return self.from_tensors({name: change(tensor) for name, tensor in self.tensors.items()}, self.clip_ids)


def collate_clips(samples: Sequence[ClipSample]) -> ClipBatch:
    """Stacks windows of equal size into a batch.

    Raises:
        ShardError: a clip lacks a map that another clip has.
    """
    return ClipBatch(
        maps={name: _stack_maps(samples, name) for name in dict.fromkeys(n for sample in samples for n in sample.maps)},
        reference=_stack([sample.reference for sample in samples]),
        fps=torch.tensor([sample.fps for sample in samples], dtype=torch.float32),
        keys=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        clip_ids=[sample.clip_id for sample in samples],
        regions=torch.stack([sample.regions for sample in samples]),
    )


def _stack_maps(samples: Sequence[ClipSample], name: str) -> Tensor:
    lacking = [sample.clip_id for sample in samples if name not in sample.maps]
    if lacking:
        raise ShardError(f"clip '{lacking[0]}' has no {name} map while other clips of its batch have one")
    return _stack([sample.maps[name] for sample in samples])


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Stacks pictures; if they are not all stored in the same way, all become floats in 3 channels."""
    same = all((each.dtype, each.shape) == (images[0].dtype, images[0].shape) for each in images)
    return torch.stack(list(images) if same else [as_floats(each) for each in images])


def _maps_as_floats(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pictures as `as_floats` gives them, beside stored latents, which are no pictures and stay as they are."""
    return {name: values if name.startswith(PREFIX) else as_floats(values) for name, values in maps.items()}


def as_floats(images: Tensor) -> Tensor:
    """Pictures `(..., c, H, W)` as float32 in [0,1] with 3 channels; a single channel is repeated."""
    scaled = scale_to_floats(images)
    if scaled.shape[-3] == 3:
        return scaled
    return scaled.expand(*scaled.shape[:-3], 3, *scaled.shape[-2:]).contiguous()
