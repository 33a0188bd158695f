"""What differs between the trainings of the two stages. It is chosen once from the recipe; everything else asks it.

Knows nothing of ranks, optimizers or checkpoints.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.pipelines.sampling import StepCallback
from dreamdance.recipe.model_sections import AutoencoderSource, ImageEncoderSource, NetworkSource
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe, TrainingRecipe
from dreamdance.training.objectives.output import Objective
from dreamdance.training.sample_pictures import Samples
from dreamdance.training.stages.animation import AnimationStage
from dreamdance.training.stages.geometry import GeometryStage

AnyObjective = TypeVar("AnyObjective", bound=Objective)


class TrainingStage(Protocol[AnyObjective]):
    """One training: its recipe, and what only its stage knows how to do. `AnyObjective` is the objective it builds."""

    @property
    def recipe(self) -> TrainingRecipe:
        """The run's own."""

    @property
    def sources(self) -> Sequence[NetworkSource | AutoencoderSource | ImageEncoderSource]:
        """Where the base networks come from."""

    @property
    def maps(self) -> Sequence[str]:
        """The maps that the objective reads of every clip, beside its pictures and pose."""

    def build(self, *, device: str = "cpu") -> AnyObjective:
        """Builds all networks and the objective that holds them.

        What the recipe gives as a path is read; the rest is random, seeded by the recipe alone, the same on every rank.

        Args:
            device: where the networks come to lie; `"meta"` builds shapes only, from the published configurations where
                weights are absent.

        Raises:
            MissingInputError: a folder or its weights are not there.
            RecipeError: the networks that the recipe names do not fit together.
        """

    def set_trainable(self, objective: AnyObjective) -> list[str]:
        """Sets `requires_grad` of every parameter and the networks' modes; returns the sorted names that train."""

    def sample(self, objective: AnyObjective, batch: ClipBatch, on_step: StepCallback | None = None) -> Samples:
        """Runs the pipeline with the recipe's `sampling` section; the same noise for a clip every time.

        Args:
            objective: its networks are shared with the pipeline, and keep their modes.
            batch: held-out clips.
            on_step: called after each denoising step, as diffusers calls `callback_on_step_end`.
        """


def stage_of(recipe: TrainingRecipe) -> TrainingStage[Any]:
    """The stage that a recipe trains.

    Raises:
        TypeError: the recipe is of neither stage.
    """
    if isinstance(recipe, Stage1Recipe):
        return GeometryStage(recipe)
    if isinstance(recipe, Stage2Recipe):
        return AnimationStage(recipe)
    raise TypeError(f"no stage is trained by a {type(recipe).__name__}")
