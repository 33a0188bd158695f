"""The plan of a training run, made before it starts: parameters of each network, memory on each device, and time.

No weights are read or allocated: networks are built as shapes only, from the published configurations if their folders
are absent. The counts are exact; all other numbers are estimates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.gpus import DEFAULT_GPU, GPUS, Gpu
from dreamdance.training.checkpointing.saving_plan import describe_checkpoint, plan_checkpoint
from dreamdance.training.parameter_groups import group_names
from dreamdance.training.planning.duration import describe_duration, sample_bytes
from dreamdance.training.planning.simulated_batch import simulated_batch
from dreamdance.training.planning.step_cost import StepCost, count_step, countable
from dreamdance.training.stages.training_stage import TrainingStage, stage_of

GIB = 2**30
FP32_BYTES, BF16_BYTES = 4, 2
# Memory for a CUDA context, NCCL's buffers, cuDNN's workspaces, and fragments that the allocator cannot fill.
GPU_RESERVE_GIB = 3.0
# A process on a CPU: Python, torch, DeepSpeed and their libraries, without a network.
PROGRAM_GIB = 0.5
# What a process on a CPU holds beside the tensors that torch counts, as a share of the activations: freed tensors below
# 32 MiB, which glibc keeps, and oneDNN's copies of inputs and outputs of convolutions that are not channels_last.
# Single blocks of SVD showed .23 to .57 (dreamdance/README.md); this value brings the plan within 15 % of the peaks in
# tools/full_size.csv.
UNCOUNTED_SHARE = 0.5


@dataclass(frozen=True)
class NetworkSize:
    """Parameters of one network."""

    name: str
    trainable: int
    frozen: int


@dataclass(frozen=True)
class MemoryPart:
    """One use of a device's memory, with the arithmetic behind it."""

    name: str
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class TrainingPlan:
    """Parameters, memory and work of a training recipe on one of its processes.

    Attributes:
        cost: of one micro batch.
        bytes_per_sample: what training reads from storage, an estimate.
    """

    networks: list[NetworkSize]
    memory: list[MemoryPart]
    cost: StepCost
    bytes_per_sample: float

    @property
    def num_trainable(self) -> int:
        return sum(network.trainable for network in self.networks)

    @property
    def total_bytes(self) -> int:
        return sum(part.num_bytes for part in self.memory)


def make_plan(stage: TrainingStage[Any]) -> TrainingPlan:
    """Builds the recipe's networks as shapes, counts their parameters, and simulates one training step.

    Raises:
        RecipeError: the networks that the recipe names do not fit together, or `optimizer.lr_scales` does not fit them.
    """
    stage = stage_of(countable(stage.recipe))
    objective = stage.build(device="meta")
    stage.set_trainable(objective)
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    group_names(trained, frozen, stage.recipe.optimizer.lr_scales)  # refuses names that the training would refuse
    networks = network_sizes(objective)
    trainable = sum(network.trainable for network in networks)
    total = trainable + sum(network.frozen for network in networks)
    exact = sum(parameter.numel() for parameter in objective.vae.parameters())
    memory = state_memory(stage.recipe, trainable, total, exact=exact)
    bytes_per_sample = sample_bytes(simulated_batch(stage, objective))
    cost = count_step(objective, stage)
    memory = [*memory, _activations(stage, cost), *_beside_a_gpu(stage.recipe, trainable, cost)]
    return TrainingPlan(networks, memory, cost, bytes_per_sample)


def network_sizes(objective: nn.Module) -> list[NetworkSize]:
    """Counts the trainable and the frozen parameters of each of an objective's networks."""
    return [_size(name, network) for name, network in objective.named_children()]


def describe(
    recipe: TrainingRecipe,
    *,
    gpu_memory_gib: float | None = None,
    gpu: Gpu = GPUS[DEFAULT_GPU],
    plan: TrainingPlan | None = None,
) -> str:
    """The plan as text.

    Args:
        recipe: the recipe of a run.
        gpu_memory_gib: memory of one GPU of this machine, None without a GPU.
        gpu: the GPU whose rates the time is estimated with.
        plan: its plan, if it was made before.
    """
    stage = stage_of(recipe)
    plan = plan or make_plan(stage)
    lines = ["parameters:", f"  {'':<16}{'trainable':>16}{'frozen':>16}"]
    for network in plan.networks:
        lines.append(f"  {network.name:<16}{network.trainable:>16,}{network.frozen:>16,}")
    frozen = sum(network.frozen for network in plan.networks)
    lines.append(f"  {'all':<16}{plan.num_trainable:>16,}{frozen:>16,}")
    if absent := _absent_folders(stage):
        lines.append(f"  (published configurations stand in for {', '.join(absent)}, which are not here)")
    lines.append("memory per process (estimate):")
    for part in plan.memory:
        lines.append(f"  {part.name:<24}{part.num_bytes / GIB:>9.2f} GiB  {part.reason}")
    lines.append(f"  {'together':<24}{plan.total_bytes / GIB:>9.2f} GiB")
    if recipe.cluster.gpus_per_node:
        lines.append(f"  {verdict(plan.total_bytes / GIB + GPU_RESERVE_GIB, gpu_memory_gib)}")
        lines += describe_duration(recipe, plan.cost, gpu, plan.bytes_per_sample)
    return "\n".join([*lines, *describe_checkpoint(recipe, plan.num_trainable)])


def verdict(wanted_gib: float, gpu_memory_gib: float | None) -> str:
    """One line: whether the memory of a GPU is enough, and what to change if it is not."""
    wanted = f"with {GPU_RESERVE_GIB:g} GiB for CUDA, NCCL and fragmentation: {wanted_gib:.1f} GiB of GPU memory"
    if gpu_memory_gib is None:
        return f"{wanted} (no GPU here to compare with)"
    if wanted_gib <= gpu_memory_gib:
        return f"{wanted}; fits in the {gpu_memory_gib:.0f} GiB of the GPUs here"
    advice = "lower micro_batch_size, use more processes, or set sharding.gradient_checkpointing: transformers"
    return f"{wanted}: MORE than the {gpu_memory_gib:.0f} GiB of the GPUs here; {advice}"


def _size(name: str, network: nn.Module) -> NetworkSize:
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return NetworkSize(name, trainable, sum(parameter.numel() for parameter in network.parameters()) - trainable)


def state_memory(recipe: TrainingRecipe, trainable: int, total: int, *, exact: int = 0) -> list[MemoryPart]:
    """Memory for the weights, gradients and optimizer state that ZeRO keeps on one process.

    Args:
        recipe: gives precision and sharding.
        trainable: number of parameters that train.
        total: number of all parameters.
        exact: number of parameters that are float32 at every precision: the autoencoder's.
    """
    stage, world_size = recipe.sharding.zero_stage, recipe.cluster.world_size
    weight_bytes = BF16_BYTES if recipe.precision == "bf16" else FP32_BYTES
    share = -(-trainable // world_size)
    gradients, gradient_reason = (share, f"/ {world_size} processes (ZeRO-2)") if stage == 2 else (trainable, "(whole)")
    states, state_reason = (share, f"/ {world_size} processes (ZeRO-{stage})") if stage else (trainable, "(whole)")
    buckets = min(recipe.sharding.reduce_bucket_elements, trainable) if stage else 0
    deterministic = not recipe.cluster.gpus_per_node if recipe.deterministic is None else recipe.deterministic
    # Only overlapping communication needs a second bucket; DeepSpeed's configuration has none where bits must repeat.
    copies = 2 if recipe.sharding.overlap_communication and not deterministic else 1
    millions = f"{trainable / 1e6:,.1f} M"
    # Without sharding the fp32 parameters themselves are the masters.
    masters = FP32_BYTES if stage else 0
    exact = exact if recipe.precision == "bf16" else 0
    weights_reason = f"{(total - exact) / 1e6:,.1f} M x {weight_bytes} bytes ({recipe.precision})"
    weights_reason += f", autoencoder {exact / 1e6:,.1f} M x {FP32_BYTES}" if exact else ""
    return [
        MemoryPart("weights", (total - exact) * weight_bytes + exact * FP32_BYTES, weights_reason),
        MemoryPart("gradients", gradients * FP32_BYTES, f"{millions} x {FP32_BYTES} bytes {gradient_reason}"),
        MemoryPart(
            "fp32 masters and Adam",
            states * (masters + 2 * FP32_BYTES),
            f"{millions} x {masters + 2 * FP32_BYTES} bytes {state_reason}",
        ),
        _average_memory(recipe, states, f"{millions} x {FP32_BYTES} bytes {state_reason}"),
        MemoryPart(
            "communication buckets",
            buckets * weight_bytes * copies,
            f"{buckets / 1e6:,.1f} M x {weight_bytes} bytes x {copies}",
        ),
    ]


def _average_memory(recipe: TrainingRecipe, states: int, reason: str) -> MemoryPart:
    if recipe.optimizer.ema_decay == 0:
        return MemoryPart("moving average", 0, "it is the masters themselves (optimizer.ema_decay=0)")
    return MemoryPart("moving average", states * FP32_BYTES, reason)


def _beside_a_gpu(recipe: TrainingRecipe, trainable: int, cost: StepCost) -> list[MemoryPart]:
    """What a process on a CPU also holds; with a GPU it lies in the host's memory, or in the GPU's reserve."""
    if recipe.cluster.gpus_per_node:
        return []
    parts = [
        MemoryPart("programs", int(PROGRAM_GIB * GIB), "Python, torch and their libraries"),
        MemoryPart(
            "beside these tensors",
            int(UNCOUNTED_SHARE * cost.peak_bytes),
            f"the heap, copies by convolutions: {UNCOUNTED_SHARE:g} x activations (from measured peaks)",
        ),
    ]
    if recipe.checkpoint.copy_in_memory:
        num_bytes = plan_checkpoint(recipe, trainable).num_bytes
        shares = recipe.cluster.world_size if recipe.sharding.zero_stage else 1
        reason = f"{trainable / 1e6:,.1f} M x {num_bytes // trainable} bytes / {shares} (checkpoint.copy_in_memory)"
        parts.append(MemoryPart("copy for checkpoints", -(-num_bytes // shares), reason))
    return parts


def _activations(stage: TrainingStage[Any], cost: StepCost) -> MemoryPart:
    recipe = stage.recipe
    data, clips = recipe.data, recipe.micro_batch_size
    frames = f"{clips} x {data.num_frames} frame{'s' * (data.num_frames > 1)} at {data.width}x{data.height}"
    reason = f"peak of one simulated step, {frames}, gradient_checkpointing {recipe.sharding.checkpointing_level}"
    return MemoryPart("activations", cost.peak_bytes, reason)


def _absent_folders(stage: TrainingStage[Any]) -> list[str]:
    folders = [Path(source.path) / (source.subfolder or "") for source in stage.sources if source.path is not None]
    return [str(folder) for folder in folders if not (folder / "config.json").is_file()]
