"""The only module that calls DeepSpeed: its steps, and the memory in which it keeps this rank's share of the optimizer.

It must not know what is trained, where data comes from, or when and how checkpoints are written.
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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed warns at every start that it saw no GPU
import deepspeed
from deepspeed.utils import groups

from dreamdance.errors import RecipeError
from dreamdance.models.autoencoding import kept_in_float32
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.deepspeed_config import deepspeed_config

# Names of DeepSpeed that it does not document, all in this file:
#   ops.__compatible_ops__     what it would compile;
#   utils.groups._WORLD_GROUP  the process group of its collectives;
#   parameter._hp_mapping      where a parameter lies in this rank's flat partition;
#   optimizer.update_lp_params makes the weights of all ranks from their partitions.

# DeepSpeed's only use of its op table is to build a shared-memory operation for *inference*. Left on, every first start
# on a CPU compiles it for minutes, and a killed compilation leaves a lock behind that blocks all later starts.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step: the norm of the whole gradient before clipping, and whether it was applied."""

    gradient_norm: float
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the flattened parameter `name`, from `start`; they lie at `offset` of partition `shard`."""

    name: str
    shard: int
    offset: int
    start: int
    length: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """The elements themselves, as they lie in memory: flat, or a whole parameter where nothing is sharded."""
        partition = partitions[self.shard]
        if partition.numel() == self.length:
            return partition
        return partition.narrow(0, self.offset, self.length)


class Engine:
    """An objective under DeepSpeed's ZeRO, with torch's AdamW on this rank's share of the fp32 masters."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, objective: nn.Module, recipe: TrainingRecipe, ranks: Ranks, *, deterministic: bool) -> None:
        """Moves the objective to the device and in the recipe's precision, and gives its trainable parameters masters.

        Args:
            objective: `forward(batch)` returns a tuple that holds the loss; `requires_grad` says what trains.
            recipe: optimizer, precision and sharding.
            ranks: this process among all; the process group must be open.
            deterministic: see `deepspeed_config`.

        Raises:
            RecipeError: nothing trains, the batch does not divide, or plain data parallelism is asked for in bf16.
        """
        self.objective: Any = objective
        self.ranks = ranks
        section = self.optimizer_section = recipe.optimizer
        self.trainable = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        if not self.trainable:
            raise RecipeError("nothing to train: no parameter of the recipe's networks requires a gradient")
        self.sharded = recipe.sharding.zero_stage > 0
        if not self.sharded and recipe.precision == "bf16":
            raise RecipeError("sharding.zero_stage=0 keeps no fp32 masters for precision=bf16; use zero_stage 1 or 2")
        self.accumulation_steps = accumulation_steps(recipe.batch_size, recipe.micro_batch_size, ranks.world_size)
        config = deepspeed_config(
            recipe,
            world_size=ranks.world_size,
            num_trainable=sum(parameter.numel() for parameter in self.trainable.values()),
            deterministic=deterministic,
        )
        # One pass over weights and moments instead of about 20; None leaves the choice to torch, which loops on a CPU.
        fused = True if ranks.device.type == "cuda" else None
        self._adamw = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=fused,
        )
        exact: dict[str, Tensor] = {}
        if recipe.precision == "bf16":
            exact = {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
            objective.to(torch.bfloat16)  # DeepSpeed would leave buffers in fp32, from_pretrained does not
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed insists on the variable
        if groups._WORLD_GROUP is None:  # DeepSpeed's own would wait for as long as the backend's default
            groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=recipe.cluster.collective_timeout_seconds))
        with kept_in_float32(objective):  # what the objective itself did not let be cast: autoencoders
            self._engine, *_ = deepspeed.initialize(model=objective, optimizer=self._adamw, config=config)
        if exact:
            self._set_masters(exact)
        for weight in self._partitions:  # as AdamW would at its first step, so that there is always a state to save
            count = torch.zeros((), dtype=torch.float32, device=weight.device if fused else "cpu")
            self._adamw.state[weight] = {"step": count, **{name: torch.zeros_like(weight) for name in self.MOMENTS}}

    def forward(self, batch: Any) -> Any:
        """Runs the objective on one micro batch and returns its own output."""
        return self._engine(batch)

    def backward(self, loss: Tensor, *, drop: bool = False) -> None:
        """Accumulates the gradient of one micro batch's mean loss.

        A loss that is not finite, or is to be dropped, is made to poison the whole gradient: then its norm, which all
        ranks share, is not finite either, and every rank skips this update.
        """
        # chosen on the device: asking for the number here would hold up the queue of the backward pass
        usual = math.nan if drop else 1.0
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), usual, math.nan))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro batch

    def update(self, learning_rate: float) -> Update:
        """Takes the optimizer step, after `accumulation_steps` calls of `backward`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.sharded:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            return Update(norm, applied=self._engine.was_step_applied())
        return self._update_unsharded()

    def _update_unsharded(self) -> Update:
        """Measures, clips and, where it must, drops the gradient itself: DeepSpeed does so only where it shards."""
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
    def _partitions(self) -> list[Tensor]:
        """What AdamW updates: DeepSpeed gives it this rank's partitions in place of the parameters."""
        return [weight for group in self._adamw.param_groups for weight in group["params"]]

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights: flat partitions, or every parameter where nothing is sharded."""
        return [partition.data for partition in self._partitions]

    @torch.no_grad()
    def _set_masters(self, parameters: dict[str, Tensor]) -> None:
        """Gives the masters the precision of the weights that were read: DeepSpeed makes them from the bf16 ones."""
        for fragment in self.fragments():
            values = parameters[fragment.name].flatten().narrow(0, fragment.start, fragment.length)
            fragment.of(self.masters).copy_(values)

    def fragments(self) -> list[Fragment]:
        """Where the parameters lie in this rank's partitions; over all ranks every element occurs."""
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
        """Within, the objective's weights are `shards` (as `masters` lie); after, bit for bit what they were.

        Collective. Sharded, the weights return from the masters and cost no memory; else a copy is kept meanwhile.
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

    def gathered(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Puts whole fp32 parameters together from every rank's `shards`, one at a time, so that memory hardly grows.

        Collective: every rank must run through it, but only the main process is given the true values.
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
        """AdamW's two moments, as `masters` lie."""
        states = [self._adamw.state[partition] for partition in self._partitions]
        return {name: [state[name] for state in states] for name in self.MOMENTS}

    def step_counts(self) -> list[float]:
        """How many steps AdamW has applied to each of `masters`."""
        counts: list[float] = torch.stack([self._adamw.state[one]["step"] for one in self._partitions]).tolist()
        return counts

    def restored(self, step_counts: Mapping[str, float]) -> None:
        """Makes the weights from `masters`, which the caller has set, as well as `moments`. Collective.

        Args:
            step_counts: how many steps AdamW has applied, by the name of the parameter.
        """
        partitions = self._partitions
        for fragment in self.fragments():
            self._adamw.state[partitions[fragment.shard]]["step"].fill_(step_counts[fragment.name])
        if self.sharded:
            self._engine.optimizer.update_lp_params()
