"""Counts what one micro batch costs: floating-point operations, bytes moved, operators, and memory at its peak.

The objective's own forward and backward pass run on fake tensors, which have shapes but no content; every operator that
torch calls is counted, and every storage that is allocated or freed. So the count includes the true effect of
checkpointing, frozen parts and `no_grad`. This module does not know GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.training.objectives.output import Objective
from dreamdance.training.planning.activation_memory import LiveBytes
from dreamdance.training.planning.operator_count import NO_WORK, OperatorCount, Phase, Work, count_model_flops
from dreamdance.training.planning.simulated_batch import simulated_batch
from dreamdance.training.stages.training_stage import TrainingStage, stage_of


@dataclass(frozen=True)
class StepCost:
    """The cost of one micro batch, forward and backward, on one device; the optimizer's update is not part of it.

    Attributes:
        work: by phase.
        peak_bytes: largest memory at once beside weights and their gradients.
    """

    work: Mapping[Phase, Work]
    peak_bytes: int

    @property
    def total(self) -> Work:
        return sum(self.work.values(), NO_WORK)

    @property
    def model_flops(self) -> int:
        """See `count_model_flops`."""
        return count_model_flops(self.work)


def count_step(objective: Objective, stage: TrainingStage[Any]) -> StepCost:
    """Counts one micro batch of a recipe on fake tensors.

    Networks in evaluation mode drop no conditions, which adds a few small operators to a real step. Weights are not
    part of the peak; neither are their gradients, because sharding removes each gradient when it is ready.

    Args:
        objective: built on the meta device, with `requires_grad` set; it cannot be used afterwards.
        stage: gives the shapes of a micro batch and the precision. If the recipe names latents, the batch has latents.
    """
    objective.to(torch.bfloat16 if stage.recipe.precision == "bf16" else torch.float32)
    # Only the objective, not its networks: dropout decisions read random values, which fake tensors lack.
    objective.training = False
    batch = simulated_batch(stage, objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        live, counter = LiveBytes(beside=(*objective.parameters(), *objective.buffers())), OperatorCount()
        with live, counter, counter.of_encoders(objective.vae, objective.image_encoder):
            loss = objective(batch).loss
            counter.phase = "backward"
            loss.backward()
    return StepCost(counter.work, live.peak)


def count_recipe(recipe: TrainingRecipe) -> StepCost:
    """Builds a recipe's networks as shapes and counts one micro batch of it."""
    stage = stage_of(countable(recipe))
    objective = stage.build(device="meta")
    stage.set_trainable(objective)
    return count_step(objective, stage)


def countable(recipe: TrainingRecipe) -> TrainingRecipe:
    """The recipe with an attention backend that takes fake tensors.

    Backends that need a GPU become torch's own fused attention: the same products, and the same tensors are kept.
    """
    if recipe.model.attention_backend in (None, "sdpa", "reference"):
        return recipe
    model = recipe.model.model_copy(update={"attention_backend": None})
    return recipe.model_copy(update={"model": model})


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
