"""The batch that the objectives train on, and how clips become one. Knows nothing of shards or files."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dreamdance.errors import ShardError


@dataclass(frozen=True)
class ClipSample:
    """One training window: the fields of `ClipBatch` without their first dimension."""

    rgb: Tensor
    pose: Tensor
    normal: Tensor | None
    depth: Tensor | None
    mask: Tensor | None
    reference: Tensor
    fps: float
    key: tuple[int, int, int]
    clip_id: str


@dataclass(frozen=True)
class ClipBatch:
    """Windows of b clips, float32. Maps that were not asked for are None.

    Attributes:
        rgb: `b f 3 H W` in [0,1].
        pose: `b f 3 H W` in [0,1], drawing on black.
        normal: `b f 3 H W` in [0,1], (n+1)/2, of unit length after decoding.
        depth: `b f 3 H W` in [0,1], disparity, near bright, the same in all 3 channels.
        mask: `b f 1 H W` in {0,1}, 1 on the body.
        reference: `b 3 H W` in [0,1], some frame of the same clip.
        fps: `b`, frames per second after the stride.
        keys: `b 3` int64: seed, epoch, sample id; whatever is drawn about a sample is drawn from these.
        clip_ids: b names.
    """

    rgb: Tensor
    pose: Tensor
    normal: Tensor | None
    depth: Tensor | None
    mask: Tensor | None
    reference: Tensor
    fps: Tensor
    keys: Tensor
    clip_ids: list[str]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ClipBatch":
        """Returns the batch on another device; `keys` stay on the CPU, where random draws are made."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor) and field.name != "keys"
        }
        return replace(self, **moved)

    def pin_memory(self) -> "ClipBatch":
        """Returns the batch in page-locked memory (the loader asks for it where there is a GPU)."""
        pinned = {
            field.name: getattr(self, field.name).pin_memory()
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)

    def select(self, indices: Sequence[int]) -> "ClipBatch":
        """Returns the batch of the given clips of this one."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        parts = {
            field.name: getattr(self, field.name)[chosen.to(getattr(self, field.name).device)]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **parts, clip_ids=[self.clip_ids[index] for index in indices])


def collate_clips(samples: Sequence[ClipSample]) -> ClipBatch:
    """Stacks windows of equal size into a batch.

    Raises:
        ShardError: some of the clips have a map that others lack.
    """
    return ClipBatch(
        rgb=torch.stack([sample.rgb for sample in samples]),
        pose=torch.stack([sample.pose for sample in samples]),
        normal=_stack_maps(samples, "normal"),
        depth=_stack_maps(samples, "depth"),
        mask=_stack_maps(samples, "mask"),
        reference=torch.stack([sample.reference for sample in samples]),
        fps=torch.tensor([sample.fps for sample in samples], dtype=torch.float32),
        keys=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        clip_ids=[sample.clip_id for sample in samples],
    )


def _stack_maps(samples: Sequence[ClipSample], name: str) -> Tensor | None:
    maps = [getattr(sample, name) for sample in samples]
    lacking = [sample.clip_id for sample, found in zip(samples, maps, strict=True) if found is None]
    if len(lacking) == len(samples):
        return None
    if lacking:
        raise ShardError(f"clip '{lacking[0]}' has no {name} map while other clips of its batch have one")
    return torch.stack(maps)
