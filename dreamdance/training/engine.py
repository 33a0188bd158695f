"""The only module that calls DeepSpeed: its steps, its master weights and its files.

It must not know what is trained, where data comes from, or when to save.
"""

import copyreg
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed warns at every start that it saw no GPU
import deepspeed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import groups
from deepspeed.utils.tensor_fragment import fragment_address

from dreamdance.errors import CheckpointError, RecipeError
from dreamdance.models.autoencoding import kept_in_float32
from dreamdance.recipe.batch import accumulation_steps
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.deepspeed_config import deepspeed_config

# What DeepSpeed itself pickles into its files; everything else in them is tensors and plain containers.
_DEEPSPEED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))  # else 3.11.2, Debian's, calls getattr
_TAG = "deepspeed"

# DeepSpeed's only use of its op table is to build a shared-memory operation for *inference*. Left on, every first start
# on a CPU compiles it for minutes, and a killed compilation leaves a lock behind that blocks all later starts.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step: the norm of the whole gradient before clipping, and whether it was applied."""

    gradient_norm: float
    applied: bool


@dataclass(frozen=True)
class SavedOptimizer:
    """One rank's part of a checkpoint: flat partitions as `Engine.masters`, and AdamW's state of each."""

    masters: list[Tensor]
    moments: list[list[Tensor]]
    step: float


@dataclass(frozen=True)
class Fragment:
    """`length` elements of the flattened parameter `name`, from `start`; they lie at `offset` of partition `shard`."""

    name: str
    shard: int
    offset: int
    start: int
    length: int


class _FilesToSave(TorchCheckpointEngine):
    """Learns from DeepSpeed's save what would be written where, and writes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = state_dict


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
        self._fused = True if ranks.device.type == "cuda" else None
        adamw = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=self._fused,
        )
        exact: dict[str, Tensor] = {}
        if recipe.precision == "bf16":
            exact = {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
            objective.to(torch.bfloat16)  # DeepSpeed would leave buffers in fp32, from_pretrained does not
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed insists on the variable
        if groups._WORLD_GROUP is None:  # it would make its own, which waits as long as the backend's default
            groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=recipe.cluster.collective_timeout_seconds))
        with kept_in_float32(objective):  # what the objective itself did not let be cast: autoencoders
            self._engine, *_ = deepspeed.initialize(model=objective, optimizer=adamw, config=config)
        # Beside its files it would leave scripts that unpickle anything; our own reader does not.
        self._engine._copy_recovery_script = lambda folder: None
        if exact:
            self._set_masters(exact)

    # ---------------------------------------------------------------------------------------------- one step

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

    # ---------------------------------------------------------------------------------------------- master weights

    @property
    def _masters_attribute(self) -> str:
        """DeepSpeed's two sharding optimizers (the second serves bf16 at stage 1) name the same thing differently."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(name for name in names if hasattr(self._engine.optimizer, name))

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights: flat partitions, or every parameter where nothing is sharded."""
        if not self.sharded:
            return [parameter.data for parameter in self.trainable.values()]
        return list(getattr(self._engine.optimizer, self._masters_attribute))

    @torch.no_grad()
    def _set_masters(self, parameters: dict[str, Tensor]) -> None:
        """Gives the masters the precision of the weights that were read: DeepSpeed makes them from the bf16 ones."""
        for fragment in self.fragments():
            values = parameters[fragment.name].flatten().narrow(0, fragment.start, fragment.length)
            self.masters[fragment.shard].flatten().narrow(0, fragment.offset, fragment.length).copy_(values)

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
            optimizer, attribute = self._engine.optimizer, self._masters_attribute
            masters = getattr(optimizer, attribute)
            setattr(optimizer, attribute, shards)
            optimizer.update_lp_params()
            setattr(optimizer, attribute, masters)
            try:
                yield
            finally:
                optimizer.update_lp_params()
            return
        kept = [master.clone() for master in self.masters]
        torch._foreach_copy_(self.masters, shards)
        try:
            yield
        finally:
            torch._foreach_copy_(self.masters, kept)

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
                piece = shards[fragment.shard].narrow(0, fragment.offset, fragment.length)
                values.narrow(0, fragment.start, fragment.length).copy_(piece)
            dist.reduce(values, dst=0)
            yield name, values.reshape(parameter.shape)

    # ---------------------------------------------------------------------------------------------- files

    def files_to_save(self, folder: Path) -> dict[Path, Any]:
        """Trainable weights and optimizer state as DeepSpeed would write them under `folder`. Collective.

        Returns:
            This rank's files and what belongs into them: the engine's own tensors, valid until the next step.
        """
        writer = self._engine.checkpoint_engine
        self._engine.checkpoint_engine = collected = _FilesToSave()
        try:
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self._engine.checkpoint_engine = writer
        return collected.files

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote on the same number of ranks. Collective; unpickles no code.

        Raises:
            CheckpointError: the checkpoint holds other trainable parameters than this run.
        """
        with _weights_only_loading():
            path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, custom_load_fn=_load_weights)
        if path is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._restore_hyperparameters()

    def read_optimizer(self, folder: Path, rank: int) -> SavedOptimizer:
        """Reads what any rank, of however many, saved under ZeRO; unpickles no code."""
        path = self._engine._get_rank_zero_ckpt_name(str(folder), _TAG, 0, rank, self._engine.bfloat16_enabled())
        with _weights_only_loading():
            saved = torch.load(path, map_location="cpu", mmap=True)["optimizer_state_dict"]
        states = list(saved["base_optimizer_state"]["state"].values())
        moments = [[state[name] for state in states] for name in self.MOMENTS] if states else []
        step = float(states[0]["step"]) if states else 0.0
        return SavedOptimizer(list(saved["single_partition_of_fp32_groups"]), moments, step)

    def set_optimizer(self, moments: list[list[Tensor]], *, step: float) -> None:
        """Sets AdamW's state and makes the weights anew from the masters, which were set before. Collective."""
        adamw = self._engine.optimizer.optimizer
        if step:
            for master, *values in zip(self.masters, *moments, strict=True):
                adamw.state[master] = {"step": torch.tensor(step), **dict(zip(self.MOMENTS, values, strict=True))}
        self._place_step_counts()
        self._engine.optimizer.update_lp_params()

    def _restore_hyperparameters(self) -> None:
        """DeepSpeed puts back the saved clipping, betas and decay; a recipe that was allowed to change them wins.

        So it does with the way in which AdamW computes, which is this device's own.
        """
        optimizer, section = self._engine.optimizer, self.optimizer_section
        if self.sharded:
            optimizer.clip_grad = section.gradient_clipping
        for group in optimizer.param_groups:
            group.update(betas=tuple(section.betas), eps=section.eps, weight_decay=section.weight_decay)
            group.update(fused=self._fused, foreach=None)
        self._place_step_counts()

    def _place_step_counts(self) -> None:
        """Fused, AdamW counts its steps on the device of the weights, else on the CPU, whoever saved them."""
        optimizer = self._engine.optimizer
        adamw = optimizer.optimizer if self.sharded else optimizer
        for weight, state in adamw.state.items():
            if "step" in state:
                state["step"] = state["step"].to(weight.device if self._fused else "cpu", torch.float32)


def _load_weights(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Loads the trained parameters of a checkpoint; the frozen ones are not in it. DeepSpeed names the arguments.

    In checkpoints of earlier versions each name begins with `objective.`, because a module held the objective.
    """
    weights = {name.removeprefix("objective."): value for name, value in src.items()}
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    unexpected = dst.load_state_dict(weights, strict=False).unexpected_keys
    if different := sorted((trained - weights.keys()) | set(unexpected)):
        raise CheckpointError(
            f"the checkpoint and this run train other parameters: {len(different)} are in one of them alone, "
            f"such as {different[0]}. Give `model` and `train` the values that they had when it was saved"
        )


@contextmanager
def _weights_only_loading() -> Iterator[None]:
    """DeepSpeed asks torch to unpickle anything; within, torch refuses all but tensors, containers and our list."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_DEEPSPEED_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
