"""Estimates the memory that a training step needs beside weights and optimizer state, by a simulation without data.

The objective's own forward and backward pass run on fake tensors, which have shapes but no content; every storage that
is allocated or freed is counted. So the count includes the true effect of checkpointing, frozen parts and `no_grad`.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.modalities import ALWAYS_READ
from dreamdance.training.objectives.output import Objective
from dreamdance.training.stages.training_stage import TrainingStage


def peak_activation_bytes(objective: Objective, stage: TrainingStage[Any]) -> int:
    """The largest number of bytes allocated at once during the forward and backward pass of one micro batch.

    Weights are not counted; neither are their gradients, because sharding removes each gradient when it is ready.

    Args:
        objective: built on the meta device, with `requires_grad` set; it cannot be used afterwards.
        stage: gives the shapes of a micro batch and the precision.
    """
    dtype = torch.bfloat16 if stage.recipe.precision == "bf16" else torch.float32
    objective.to(dtype)
    # Only the objective, not its networks: dropout decisions read random values, which fake tensors lack.
    objective.training = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        batch = _empty_batch(stage)
        live = LiveBytes(beside=(*objective.parameters(), *objective.buffers()))
        with live:
            objective(batch).loss.backward()
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _empty_batch(stage: TrainingStage[Any]) -> ClipBatch:
    """A micro batch of the recipe's shapes."""
    data, clips = stage.recipe.data, stage.recipe.micro_batch_size
    names = (*ALWAYS_READ, *stage.maps)
    return ClipBatch(
        maps={name: torch.empty(clips, data.num_frames, 3, data.height, data.width) for name in names},
        reference=torch.empty(clips, 3, data.height, data.width),
        fps=torch.empty(clips),
        keys=_FixedKeys(clips),  # type: ignore[arg-type]  # only `tolist` and `to` are called
        clip_ids=["simulated"] * clips,
    )


class _FixedKeys:
    """Sample keys with real values: fake tensors have none."""

    def __init__(self, num_clips: int) -> None:
        self.num_clips = num_clips

    def tolist(self) -> list[list[int]]:
        return [[0, 0, sample] for sample in range(self.num_clips)]

    def to(self, *_: Any, **__: Any) -> "_FixedKeys":
        return self


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate and that Python frees.

    Attributes:
        current: bytes allocated now.
        peak: largest value of `current` so far.
    """

    def __init__(self, *, beside: Iterable[Tensor] = ()) -> None:
        """Begins at zero.

        Args:
            beside: tensors that are not counted, such as weights. A view of one, such as a transposed weight, is the
                result of an operation too, but shares its storage.
        """
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in beside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.current -= size
