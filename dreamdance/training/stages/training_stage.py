"""The differences between the two stages in training. The recipe chooses the stage once; all other code uses it.

This module does not know ranks, optimizers or checkpoints.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.models.equal_rewrites import EQUAL_REWRITES
from dreamdance.pipelines.sampling import StepCallback
from dreamdance.recipe.model_sections import AutoencoderSource, ImageEncoderSource, NetworkSource
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe, TrainingRecipe
from dreamdance.training.objectives.output import Objective
from dreamdance.training.sample_pictures import Predictions, Samples
from dreamdance.training.stages.animation import AnimationStage
from dreamdance.training.stages.geometry import GeometryStage

AnyObjective = TypeVar("AnyObjective", bound=Objective)


class TrainingStage(Protocol[AnyObjective]):
    """A recipe and the functions that depend on its stage. `AnyObjective` is the class of the stage's objective."""

    @property
    def recipe(self) -> TrainingRecipe:
        """The run's recipe."""

    @property
    def sources(self) -> Sequence[NetworkSource | AutoencoderSource | ImageEncoderSource]:
        """The sources of the base networks."""

    @property
    def maps(self) -> Sequence[str]:
        """The maps of every clip that the objective reads, beside pictures and pose."""

    @property
    def map_sizes(self) -> Mapping[str, tuple[int, int]]:
        """The size (width, height) of the maps that the loader may deliver smaller than the pictures."""

    @property
    def latent_names(self) -> Sequence[str]:
        """What the objective takes from stored latents (`data.latents`), see `latent_windows.read_latents`."""

    @property
    def reference_first(self) -> bool:
        """Whether the reference, with its own maps, is the first frame of every window."""

    @property
    def domain_weights(self) -> Tensor | None:
        """The weights by which the loader draws one domain of each sample; None if the objective reads all maps."""

    def build(self, *, device: str = "cpu", rewrites: Collection[str] = EQUAL_REWRITES) -> AnyObjective:
        """Builds all networks and the objective that holds them.

        Networks that the recipe names by a path are read. All other weights are random; they depend only on the
        recipe's seed and are equal on every rank.

        Args:
            device: device of the networks; `"meta"` builds shapes only, from the published configurations if weights
                are absent.
            rewrites: see `apply_equal_rewrites`; fewer than all serve measurements.

        Raises:
            MissingInputError: a folder or its weights are missing.
            RecipeError: the networks that the recipe names do not fit together.
        """

    def set_trainable(self, objective: AnyObjective) -> list[str]:
        """Sets `requires_grad` of every parameter and the networks' modes; returns the sorted names that train."""

    def predict(self, objective: AnyObjective, batch: ClipBatch, on_step: StepCallback | None = None) -> Predictions:
        """Runs the pipeline with the recipe's `sampling` section; a clip has the same noise every time.

        Args:
            objective: holds the networks, which the pipeline uses without changing their modes.
            batch: held-out clips.
            on_step: called after each denoising step, as diffusers calls `callback_on_step_end`.
        """

    def show(self, batch: ClipBatch, predictions: Predictions) -> Samples:
        """Draws predictions beside the inputs and the truth, and measures them."""

    def sample(self, objective: AnyObjective, batch: ClipBatch, on_step: StepCallback | None = None) -> Samples:
        """Predicts all clips at once, and shows them."""


def stage_of(recipe: TrainingRecipe) -> TrainingStage[Any]:
    """The stage that a recipe trains.

    Raises:
        TypeError: the recipe trains neither stage.
    """
    if isinstance(recipe, Stage1Recipe):
        return GeometryStage(recipe)
    if isinstance(recipe, Stage2Recipe):
        return AnimationStage(recipe)
    raise TypeError(f"a {type(recipe).__name__} trains no stage")
