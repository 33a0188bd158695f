"""The only module that calls DeepSpeed: optimizer steps, and access to this rank's share of weights and moments.

This module does not know what is trained, where data comes from, or when and how checkpoints are written.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns at every start that there is no GPU
import deepspeed
from deepspeed.utils import groups

from dreamdance.errors import RecipeError
from dreamdance.models.autoencoding import keep_in_float32
from dreamdance.models.channels_last import contiguous_weights
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.deepspeed_config import deepspeed_config
from dreamdance.training.parameter_groups import REST, group_names

# Undocumented names of DeepSpeed that this module uses:
#   ops.__compatible_ops__     the operations that DeepSpeed compiles;
#   utils.groups._WORLD_GROUP  the process group of its collectives;
#   parameter._hp_mapping      the place of a parameter in this rank's flat partition;
#   optimizer.update_lp_params computes the weights on all ranks from the partitions.

# DeepSpeed uses this table only to build a shared-memory operation for *inference*. Without this line, the first start
# on a CPU compiles it for minutes, and a killed compilation leaves a lock that blocks all later starts.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step: norm of the whole gradient before clipping, and whether the step was applied."""

    gradient_norm: float
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the flattened parameter `name` from `start`, stored at `offset` in partition `shard`."""

    name: str
    shard: int
    offset: int
    start: int
    length: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """A view of the elements: flat, or a whole parameter if nothing is sharded."""
        partition = partitions[self.shard]
        if partition.numel() == self.length:
            return partition
        return partition.narrow(0, self.offset, self.length)


class Engine:
    """Trains an objective with DeepSpeed's ZeRO, and torch's AdamW on this rank's share of the fp32 masters."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, objective: nn.Module, recipe: TrainingRecipe, ranks: Ranks, *, deterministic: bool) -> None:
        """Moves the objective to the device, casts it to the recipe's precision, and creates the fp32 masters.

        Args:
            objective: `forward(batch)` returns a tuple that contains the loss; parameters with `requires_grad` train.
            recipe: the recipe, for its optimizer, precision and sharding.
            ranks: this process among all processes; the process group must be open.
            deterministic: see `deepspeed_config`.

        Raises:
            RecipeError: no parameter trains, the batch cannot be divided among the ranks, or the recipe has
                `precision: bf16` without sharding.
        """
        self.objective: Any = objective
        self.ranks = ranks
        section = self.optimizer_section = recipe.optimizer
        self.trainable = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        if not self.trainable:
            raise RecipeError("nothing to train: no parameter of the recipe's networks requires a gradient")
        frozen = [name for name, value in objective.named_parameters() if not value.requires_grad]
        parts = group_names(self.trainable, frozen, section.lr_scales)
        self._group_names = list(parts)
        # in the order of the optimizer's groups, as its tensors are if nothing is sharded
        self.trainable = {name: self.trainable[name] for members in parts.values() for name in members}
        self.sharded = recipe.sharding.zero_stage > 0
        if not self.sharded and recipe.precision == "bf16":
            raise RecipeError("sharding.zero_stage=0 has no fp32 masters for precision=bf16; use zero_stage 1 or 2")
        self.accumulation_steps = accumulation_steps(recipe.batch_size, recipe.micro_batch_size, ranks.world_size)
        config = deepspeed_config(
            recipe,
            world_size=ranks.world_size,
            num_trainable=sum(parameter.numel() for parameter in self.trainable.values()),
            deterministic=deterministic,
        )
        # True: one pass over weights and moments instead of about 20. None: torch chooses, and loops on a CPU.
        fused = True if ranks.device.type == "cuda" else None
        self._adamw = torch.optim.AdamW(
            [{"params": [self.trainable[name] for name in members]} for members in parts.values()],
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=fused,
        )
        exact: dict[str, Tensor] = {}
        if recipe.precision == "bf16":
            # no copies: casting gives each parameter new memory, and leaves the old one to `exact`
            exact = {name: parameter.detach() for name, parameter in self.trainable.items()}
            objective.to(torch.bfloat16)  # as from_pretrained; DeepSpeed would leave buffers in fp32
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed requires the variable
        if groups._WORLD_GROUP is None:  # DeepSpeed's own group would have the backend's default time-out
            groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=recipe.cluster.collective_timeout_seconds))
        with keep_in_float32(objective), contiguous_weights(objective):  # autoencoders keep their precision
            self._engine, *_ = deepspeed.initialize(model=objective, optimizer=self._adamw, config=config)
        if exact:
            self._set_masters(exact)
            exact.clear()
        for weight in self._partitions:  # as in AdamW's first step, so that there is always a state to save
            count = torch.zeros((), dtype=torch.float32, device=weight.device if fused else "cpu")
            self._adamw.state[weight] = {"step": count, **{name: torch.zeros_like(weight) for name in self.MOMENTS}}

    def forward(self, batch: Any) -> Any:
        """Runs the objective on one micro batch and returns its output."""
        return self._engine(batch)

    def backward(self, loss: Tensor, *, drop: bool = False) -> None:
        """Accumulates the gradient of one micro batch's mean loss.

        If a loss is not finite, or is to be dropped, the whole gradient becomes NaN: then its norm, which is the same
        on all ranks, is not finite, and every rank skips this update.
        """
        # computed on the device: reading the number here would wait for the device
        usual = math.nan if drop else 1.0
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), usual, math.nan))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro batch

    def update(self, learning_rate: float) -> Update:
        """Takes the optimizer step, after `accumulation_steps` calls of `backward`."""
        for name, group in zip(self._group_names, self._engine.optimizer.param_groups, strict=True):
            group["lr"] = learning_rate * self.optimizer_section.lr_scales.get(name, 1.0)
        if self.sharded:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return Update(norm, applied=self._engine.was_step_applied())
        return self._update_unsharded()

    def _update_unsharded(self) -> Update:
        """Measures, clips and, if necessary, drops the gradient: DeepSpeed does this only if it shards."""
        trainable = list(self.trainable.values())
        norm = torch.nn.utils.get_total_norm([value.grad for value in trainable if value.grad is not None])
        applied = bool(norm.isfinite())
        if not applied:
            self._engine.zero_grad()
        elif self.optimizer_section.gradient_clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(trainable, self.optimizer_section.gradient_clipping, norm)
        self._engine.step()
        return Update(float(norm), applied=applied)

    @property
    def scaled_rates(self) -> dict[str, float]:
        """The learning rates of the last update that `optimizer.lr_scales` scales, by name."""
        rates = (group["lr"] for group in self._engine.optimizer.param_groups)
        return {name: rate for name, rate in zip(self._group_names, rates, strict=True) if name != REST}

    @property
    def _partitions(self) -> list[Tensor]:
        """The tensors that AdamW updates: DeepSpeed replaces the parameters by this rank's partitions."""
        return [weight for group in self._adamw.param_groups for weight in group["params"]]

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights: flat partitions, or all parameters if nothing is sharded."""
        return [partition.data for partition in self._partitions]

    @torch.no_grad()
    def _set_masters(self, parameters: dict[str, Tensor]) -> None:
        """Copies the fp32 weights to the masters, which DeepSpeed has made from the bf16 weights."""
        for fragment in self.fragments():
            values = parameters[fragment.name].flatten().narrow(0, fragment.start, fragment.length)
            fragment.of(self.masters).copy_(values)

    def fragments(self) -> list[Fragment]:
        """The places of parameters in this rank's partitions; over all ranks they cover every element."""
        if not self.sharded:
            owned = enumerate(self.trainable.items())
            return [Fragment(name, shard, 0, 0, value.numel()) for shard, (name, value) in owned]
        found = []
        for name, parameter in self.trainable.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                partition, own = mapping.hp_fragment_address, mapping.lp_fragment_address
                found.append(Fragment(name, mapping.param_group_index, partition.start, own.start, own.numel))
        return found

    @contextmanager
    def weights(self, shards: list[Tensor]) -> Iterator[None]:
        """Inside the block, the objective's weights are `shards`; afterwards, bit for bit the same as before.

        Collective. If sharded, the old weights are computed again from the masters; otherwise a copy is kept.

        Args:
            shards: values in the layout of `masters`.
        """
        if self.sharded:
            masters = self.masters
            self._point_partitions_to(shards)
            self._engine.optimizer.update_lp_params()
            self._point_partitions_to(masters)
            try:
                yield
            finally:
                self._engine.optimizer.update_lp_params()
            return
        kept = [master.clone() for master in self.masters]
        torch._foreach_copy_(self.masters, shards)
        try:
            yield
        finally:
            torch._foreach_copy_(self.masters, kept)

    def _point_partitions_to(self, shards: list[Tensor]) -> None:
        for partition, shard in zip(self._partitions, shards, strict=True):
            partition.data = shard

    def gather_parameters(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Assembles whole fp32 parameters from the `shards` of all ranks, one at a time, so that memory hardly grows.

        Collective: every rank must iterate to the end, but only the main process gets the right values.
        """
        if not self.sharded:
            yield from zip(self.trainable, shards, strict=True)
            return
        own = {fragment.name: fragment for fragment in self.fragments()}
        for name, parameter in self.trainable.items():
            values = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if (fragment := own.get(name)) is not None:
                values.narrow(0, fragment.start, fragment.length).copy_(fragment.of(shards))
            dist.reduce(values, dst=0)
            yield name, values.reshape(parameter.shape)

    def moments(self) -> dict[str, list[Tensor]]:
        """AdamW's two moments, in the layout of `masters`."""
        states = [self._adamw.state[partition] for partition in self._partitions]
        return {name: [state[name] for state in states] for name in self.MOMENTS}

    def step_counts(self) -> list[float]:
        """The number of steps that AdamW has applied to each of `masters`."""
        counts: list[float] = torch.stack([self._adamw.state[one]["step"] for one in self._partitions]).tolist()
        return counts

    def apply_restored(self, step_counts: Mapping[str, float]) -> None:
        """Computes the weights from `masters`; the caller has set these and `moments` before. Collective.

        Args:
            step_counts: name of the parameter -> number of steps that AdamW has applied to it.
        """
        partitions = self._partitions
        for fragment in self.fragments():
            self._adamw.state[partitions[fragment.shard]]["step"].fill_(step_counts[fragment.name])
        if self.sharded:
            self._engine.optimizer.update_lp_params()
