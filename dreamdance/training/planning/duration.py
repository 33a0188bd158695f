"""Estimates how long a training takes, from the counted work of a step and the rates of a GPU (a roofline).

Nobody measured these times. An estimate leaves out what is named in `describe_duration`; a real training is slower.
"""

from dataclasses import dataclass

import torch

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.gpus import TERA, Gpu
from dreamdance.training.planning.step_cost import StepCost

# Shares of the peak rates that are assumed: of the operations per second in products, convolutions and attention, and
# of the bandwidth in all other operators. Others measured 80 % for large products and 90 % for copies on an H200; the
# networks here have many smaller ones.
PRODUCT_EFFICIENCY, MEMORY_EFFICIENCY = 0.5, 0.7
# Bytes that training reads for each pixel of a stored picture or map. tools/measure_loading.csv has .15 (stage 2) to
# .27 (stage1_geometry) for rendered dancers, whose backgrounds are plain; real footage needs more.
STORED_BYTES_PER_PIXEL = 0.25
_STORED_DTYPES = (torch.uint8, torch.uint16)


@dataclass(frozen=True)
class StepSeconds:
    """The estimated time of one optimizer step on a GPU.

    Attributes:
        products: seconds in products, convolutions and attention.
        memory: seconds in all other operators, which the bandwidth of the memory limits.
        num_operators: operators that the host starts in this time.
    """

    products: float
    memory: float
    num_operators: int

    @property
    def total(self) -> float:
        return self.products + self.memory


def step_seconds(recipe: TrainingRecipe, cost: StepCost, gpu: Gpu) -> StepSeconds:
    """The estimate for all micro batches of one step of one process; the two parts are added up, as eager mode does."""
    total, repeats = cost.total, recipe.accumulation_steps
    float32 = gpu.tf32_flops if recipe.tf32 else gpu.fp32_flops
    rates = {torch.bfloat16: gpu.bf16_flops, torch.float16: gpu.bf16_flops}
    products = sum(count / rates.get(dtype, float32) for dtype, count in total.flops.items())
    memory = (total.num_bytes - total.product_bytes) / gpu.bytes_per_second
    return StepSeconds(
        repeats * products / PRODUCT_EFFICIENCY, repeats * memory / MEMORY_EFFICIENCY, repeats * total.num_operators
    )


def sample_bytes(batch: ClipBatch) -> float:
    """Bytes that training reads from storage for each sample of a batch: latents as float32, pictures by an average."""
    pictures = [tensor for tensor in (*batch.maps.values(), batch.reference) if tensor.dtype in _STORED_DTYPES]
    pixels = sum(tensor.numel() // tensor.shape[-3] for tensor in pictures if tensor.numel())
    latents = sum(tensor.nbytes for tensor in batch.latents.values())
    return (pixels * STORED_BYTES_PER_PIXEL + latents) / len(batch)


def describe_duration(recipe: TrainingRecipe, cost: StepCost, gpu: Gpu, bytes_per_sample: float) -> list[str]:
    """The estimate as lines of text.

    Args:
        recipe: gives the batch, the steps and the nodes.
        cost: of one micro batch.
        gpu: the GPU of all processes.
        bytes_per_sample: see `sample_bytes`.
    """
    step, total, repeats = step_seconds(recipe, cost, gpu), cost.total, recipe.accumulation_steps
    nodes, micro = recipe.cluster.nodes, f"{repeats} x " if repeats > 1 else ""
    arithmetic = f"{micro}{total.total_flops / TERA:,.1f} TFLOP"
    if repeated := cost.work["recomputation"].total_flops:
        arithmetic += f", {repeated / TERA:,.1f} of them repeated by gradient checkpointing"
    if recipe.precision == "bf16" and (float32 := total.flops.get(torch.float32, 0)):
        arithmetic += f", {float32 / TERA:,.1f} in float32 (tf32: {str(recipe.tf32).lower()})"
    moved = (total.num_bytes - total.product_bytes) / 1e9
    per_node = recipe.batch_size * bytes_per_sample / nodes / step.total / 1e9
    place = f"{recipe.cluster.world_size} x {gpu.name} in {nodes} node{'s' * (nodes > 1)}"
    hours = recipe.max_steps * step.total / 3600
    return [
        f"time on {place} (estimate, not measured):",
        f"  {hours:,.1f} hours: {recipe.max_steps:,} steps of {step.total * 1000:,.0f} ms, without validation, "
        "checkpoints, the",
        "  optimizer, the exchange of gradients, and waiting for data or for the processor",
        f"  {step.products * 1000:,.0f} ms in products: {arithmetic}; at {PRODUCT_EFFICIENCY:.0%} of the peak rate",
        f"  {step.memory * 1000:,.0f} ms in other operators: {micro}{moved:,.0f} GB read and written; at "
        f"{MEMORY_EFFICIENCY:.0%} of the bandwidth",
        f"  processor: it starts {step.num_operators:,} operators in a step; if it needs more than "
        f"{step.total / step.num_operators * 1e6:,.0f} us for each, the GPU waits for it",
        f"  storage: {per_node:,.3g} GB/s for each node, {bytes_per_sample / 1e6:,.2f} MB for each sample "
        f"({STORED_BYTES_PER_PIXEL:g} bytes per pixel, latents in float32)",
    ]
