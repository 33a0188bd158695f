"""DeepSpeed's configuration for a recipe. Does not import DeepSpeed."""

from typing import Any

from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.schema import TrainingRecipe


def deepspeed_config(
    recipe: TrainingRecipe, *, world_size: int, num_trainable: int, deterministic: bool
) -> dict[str, Any]:
    """The DeepSpeed configuration that a recipe means; there is never a second file (C6).

    Args:
        recipe: a stage 1 or stage 2 recipe.
        world_size: the number of ranks.
        num_trainable: the number of trainable elements; no bucket needs to be larger.
        deterministic: overlapping communication is switched off where bits must repeat.
    """
    bucket = min(recipe.sharding.reduce_bucket_elements, num_trainable)
    bucket += bucket % 2  # DeepSpeed takes even numbers alone
    bf16 = recipe.precision == "bf16"
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe.batch_size, recipe.micro_batch_size, world_size),
        # Written even where it is 0: unset means 1.0 since 2026. Unsharded gradients are clipped by `Engine` itself.
        "gradient_clipping": recipe.optimizer.gradient_clipping if recipe.sharding.zero_stage > 0 else 0.0,
        "bf16": {"enabled": bf16},
        # bf16 sums of many micro batches lose the small ones; plain data parallelism allows no other dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": recipe.sharding.zero_stage,
            "overlap_comm": recipe.sharding.overlap_communication and not deterministic,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": False,
        # It would wait for the device twice per micro batch; the trainer measures time itself.
        "timers": {"throughput": {"enabled": False}},
    }
