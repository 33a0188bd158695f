"""Estimates, before a run starts, the size of its checkpoints and how long a save takes.

A checkpoint contains the fp32 masters of the trainable weights, AdamW's two moments and the moving average, each
element once over all processes. Frozen weights are never saved. Names add less than one per cent in large checkpoints.
"""

from dataclasses import dataclass

from dreamdance.recipe.schema import TrainingRecipe

# Master, two moments and average, in fp32.
BYTES_PER_ELEMENT = 4 * 4
# Fraction of `cluster.stop_seconds` in which the ranks save; the rest is for ending and requeueing the job.
SAVING_SHARE = 0.8


@dataclass(frozen=True)
class CheckpointPlan:
    """One checkpoint of all processes together.

    Attributes:
        num_bytes: size on the disk.
        seconds: time to write it and to read it back for its hash, at the recipe's `cluster.storage_mb_per_second`.
        save_limit_seconds: how long the ranks may take to save before the job ends.
    """

    num_bytes: int
    seconds: float
    save_limit_seconds: float

    @property
    def fits(self) -> bool:
        return self.seconds <= self.save_limit_seconds


def plan_checkpoint(recipe: TrainingRecipe, num_trainable: int) -> CheckpointPlan:
    """Estimates the checkpoints of a recipe with `num_trainable` trainable elements."""
    num_bytes = BYTES_PER_ELEMENT * num_trainable
    cluster = recipe.cluster
    return CheckpointPlan(
        num_bytes=num_bytes,
        seconds=2 * num_bytes / (cluster.storage_mb_per_second * 1e6),
        save_limit_seconds=SAVING_SHARE * cluster.stop_seconds,
    )


def describe_checkpoint(recipe: TrainingRecipe, num_trainable: int) -> list[str]:
    """The estimate as lines of text, with a warning if a save would not be complete before the job ends."""
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
            f"  WARNING: this is more than the {plan.save_limit_seconds:,.0f} s ({SAVING_SHARE:.0%} of "
            f"cluster.stop_seconds {cluster.stop_seconds}) in which ranks must save at the job's time limit: such a "
            "save would not count, and the job would continue from the previous one. Set "
            f"cluster.stop_seconds={wanted} or more, or set cluster.storage_mb_per_second to the speed of your storage"
        )
    return lines
