"""How large a run's checkpoints will be and how long one takes, before there is any.

What is saved is the trainable weights, their fp32 masters and AdamW's two moments, and the moving average; frozen
weights never are. Every number is exact but for names and padding, well below one per cent at the sizes that matter.
"""

from dataclasses import dataclass

from dreamdance.recipe.schema import TrainingRecipe

FP32_BYTES, BF16_BYTES = 4, 2
SAVING_SHARE = 0.8
"""Of `cluster.stop_seconds`, what the ranks have to save; the rest is for ending the job and putting it back."""


@dataclass(frozen=True)
class CheckpointPlan:
    """One checkpoint of all processes together.

    Attributes:
        num_bytes: on the disk.
        seconds: to write it and to read it back for its hash, at the recipe's `cluster.storage_mb_per_second`.
        patience_seconds: how long the ranks may take to save when the job is about to end.
    """

    num_bytes: int
    seconds: float
    patience_seconds: float

    @property
    def fits(self) -> bool:
        return self.seconds <= self.patience_seconds


def plan_checkpoint(recipe: TrainingRecipe, num_trainable: int) -> CheckpointPlan:
    """The checkpoints of a recipe that trains so many elements."""
    weights = BF16_BYTES if recipe.precision == "bf16" else FP32_BYTES
    moments = 2 * FP32_BYTES
    if recipe.sharding.zero_stage > 0:  # each process saves its share
        each = weights + FP32_BYTES + moments + FP32_BYTES
    else:  # the weights are their own masters, and every process saves the whole average
        each = weights + moments + FP32_BYTES * recipe.cluster.world_size
    num_bytes = each * num_trainable
    cluster = recipe.cluster
    return CheckpointPlan(
        num_bytes=num_bytes,
        seconds=2 * num_bytes / (cluster.storage_mb_per_second * 1e6),
        patience_seconds=SAVING_SHARE * cluster.stop_seconds,
    )


def describe_checkpoint(recipe: TrainingRecipe, num_trainable: int) -> list[str]:
    """The same for a person, with a warning where a save would not be through before the job ends."""
    plan, cluster, kept = plan_checkpoint(recipe, num_trainable), recipe.cluster, recipe.checkpoint.keep_last
    lines = [
        "checkpoints (estimate):",
        f"  {plan.num_bytes / 1e9:,.2f} GB each, {kept * plan.num_bytes / 1e9:,.2f} GB for the last {kept}",
        f"  written and read back in {plan.seconds:,.0f} s at {cluster.storage_mb_per_second:,} MB/s "
        "(cluster.storage_mb_per_second)",
    ]
    if not plan.fits:
        wanted = -(-int(plan.seconds / SAVING_SHARE + 1) // 60) * 60
        lines.append(
            f"  WARNING: that is more than the {plan.patience_seconds:,.0f} s ({SAVING_SHARE:.0%} of "
            f"cluster.stop_seconds {cluster.stop_seconds}) which ranks have to save at the job's time limit: such a "
            f"save never counts, and the job goes on from the one before. Set cluster.stop_seconds={wanted} or "
            "more, or cluster.storage_mb_per_second to what your storage does"
        )
    return lines
