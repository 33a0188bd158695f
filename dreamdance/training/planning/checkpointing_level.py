"""Chooses the level of `sharding.gradient_checkpointing: auto` for the memory of the GPUs, from the plan."""

from dataclasses import dataclass

from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.gpus import DEFAULT_GPU, GPUS, Gpu
from dreamdance.training.planning.plan import GIB, GPU_RESERVE_GIB, TrainingPlan, describe, make_plan
from dreamdance.training.stages.training_stage import stage_of

# The levels that `auto` chooses from, the fastest first. keep_attention is not among them: it needs about as much
# memory as blocks, and each of its operations passes through Python twice.
AUTO_LEVELS = ("none", "blocks", "transformers")
# The plan is an estimate: a level is chosen only if this much more than its plan would fit as well.
MARGIN = 1.15


@dataclass(frozen=True)
class ChosenLevel:
    """A recipe with a level instead of `auto`.

    Attributes:
        recipe: has the level.
        reason: a line for the log and the dry run.
        plan: the level's plan, if it was made to choose it.
    """

    recipe: TrainingRecipe
    reason: str
    plan: TrainingPlan | None = None


def choose_level(recipe: TrainingRecipe, gpu_memory_gib: float | None) -> ChosenLevel:
    """Replaces `auto` by the first of `AUTO_LEVELS` whose plan fits, or by the last one; other levels stay.

    Args:
        recipe: the recipe of a run.
        gpu_memory_gib: memory of the smallest GPU; None where it is not known, as without a GPU.
    """
    given = recipe.sharding.gradient_checkpointing
    if given != "auto":
        return ChosenLevel(recipe, f"gradient checkpointing: {recipe.sharding.checkpointing_level}, from the recipe")
    if gpu_memory_gib is None or not recipe.cluster.gpus_per_node:
        level = recipe.sharding.checkpointing_level
        return ChosenLevel(_with_level(recipe, level), f"gradient checkpointing: auto takes {level} without a GPU")
    for name in AUTO_LEVELS:
        chosen = _with_level(recipe, name)
        plan = make_plan(stage_of(chosen))
        if fits(plan.total_bytes, gpu_memory_gib):
            break
    reason = f"gradient checkpointing: auto takes {name} on GPUs of {gpu_memory_gib:.0f} GiB, by the plan of --dry-run"
    return ChosenLevel(chosen, reason, plan)


def fits(num_bytes: int, gpu_memory_gib: float) -> bool:
    """Whether a plan of that size fits in a GPU with the margin and what CUDA, NCCL and fragmentation take."""
    return num_bytes / GIB * MARGIN + GPU_RESERVE_GIB <= gpu_memory_gib


def describe_with_level(
    recipe: TrainingRecipe, *, gpu_memory_gib: float | None = None, gpu: Gpu = GPUS[DEFAULT_GPU]
) -> str:
    """The plan as text, with the level of gradient checkpointing; see `plan.describe`."""
    if recipe.sharding.gradient_checkpointing == "auto" and recipe.cluster.gpus_per_node and gpu_memory_gib is None:
        chosen = ChosenLevel(
            _with_level(recipe, AUTO_LEVELS[0]),
            f"gradient checkpointing: auto takes {AUTO_LEVELS[0]}, which is planned here, on GPUs that have "
            f"{MARGIN - 1:.0%} more memory than this plan needs, and {' or '.join(AUTO_LEVELS[1:])} on smaller ones",
        )
    else:
        chosen = choose_level(recipe, gpu_memory_gib)
    return f"{chosen.reason}\n{describe(chosen.recipe, gpu_memory_gib=gpu_memory_gib, gpu=gpu, plan=chosen.plan)}"


def _with_level(recipe: TrainingRecipe, level: str) -> TrainingRecipe:
    sharding = recipe.sharding.model_copy(update={"gradient_checkpointing": level})
    return recipe.model_copy(update={"sharding": sharding})
