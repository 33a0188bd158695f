"""DeepSpeed's configuration for a recipe. Does not import DeepSpeed."""

from typing import Any

from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.schema import TrainingRecipe


def deepspeed_config(
    recipe: TrainingRecipe, *, world_size: int, num_trainable: int, deterministic: bool
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a recipe; users never write a second file (C6).

    Args:
        recipe: a stage 1 or stage 2 recipe.
        world_size: the number of ranks.
        num_trainable: the number of trainable elements; no bucket is larger.
        deterministic: whether results must repeat bit for bit; then communication does not overlap computation.
    """
    bucket = min(recipe.sharding.reduce_bucket_elements, num_trainable)
    bucket += bucket % 2  # DeepSpeed accepts only even numbers
    bf16 = recipe.precision == "bf16"
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe.batch_size, recipe.micro_batch_size, world_size),
        # Written even if it is 0: DeepSpeed's default is 1.0 since 2026. `Engine` itself clips unsharded gradients.
        "gradient_clipping": recipe.optimizer.gradient_clipping if recipe.sharding.zero_stage > 0 else 0.0,
        "bf16": {"enabled": bf16},
        # In bf16, sums over many micro batches lose small gradients; plain data parallelism accepts only fp32.
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
        # DeepSpeed's timer waits for the device twice per micro batch; the trainer measures time itself.
        "timers": {"throughput": {"enabled": False}},
    }
