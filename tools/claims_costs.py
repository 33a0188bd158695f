"""The sizes of tools/claims.py's work: steps of the demo's recipes, and how many seconds each part should take."""

from functools import cache

from claims_animate import RECIPE, Job
from claims_tasks import DEMO

from dreamdance.recipe import AnimateRecipe, PrepareRecipe, TrainingRecipe, load_recipe

# Seconds on two idle cores: of a step of each training, of a start, of a row of a table.
STEP_SECONDS = {"stage1_domains": 0.27, "stage1_geometry": 0.24, "stage1_temporal": 0.42, "stage2": 0.58}
START_SECONDS, ROW_SECONDS = 20.0, 3.0
# Of one clip of stage 1; of one clip of stage 2 beside denoising, and of each denoising step.
GEOMETRY_SECONDS, ANIMATION_SECONDS, DENOISING_SECONDS = 0.6, 0.3, 0.16
# Denoising steps of stage 2 that the demo's aims name.
DENOISING_STEPS = (3, 10, 25)
# Begins the word that sets them.
DENOISING_WORD = "animation.num_inference_steps="


@cache
def training_recipe(name: str) -> TrainingRecipe:
    """A training of the demo as its file describes it."""
    recipe = load_recipe(DEMO / f"{name}.yaml")
    assert isinstance(recipe, TrainingRecipe)
    return recipe


@cache
def demo_animation() -> AnimateRecipe:
    """How the demo animates, as its file describes it."""
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, AnimateRecipe)
    return recipe


def demo_steps() -> int:
    """Denoising steps of stage 2 in the demo."""
    return demo_animation().animation.num_inference_steps


@cache
def demo_people() -> int:
    """Held-out dancers of the demo, on whom its settings were chosen."""
    recipe = load_recipe(DEMO / "prepare.yaml")
    assert isinstance(recipe, PrepareRecipe)
    assert recipe.dancers is not None
    return recipe.dancers.num_validation_clips


def denoising_steps() -> list[int]:
    """The numbers of denoising steps at which the demo is measured, its own one among them."""
    return sorted({*DENOISING_STEPS, demo_steps()})


def clip_seconds(job: Job) -> float:
    """Estimate for one clip of a job."""
    if job.stage == "geometry":  # with guidance, each step takes a second, unconditional pass
        guided = any("guidance_scales" in word or word.endswith("_own_scales") for word in job.overrides)
        return GEOMETRY_SECONDS * (1 + guided)
    given = [int(word.removeprefix(DENOISING_WORD)) for word in job.overrides if word.startswith(DENOISING_WORD)]
    return ANIMATION_SECONDS + DENOISING_SECONDS * (given or [demo_steps()])[0]
