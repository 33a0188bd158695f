"""The learning rate as a pure function of the optimizer step: nothing to save, nothing to resume wrongly."""

import math

from dreamdance.recipe.schema import Optimizer


def learning_rate(section: Optimizer, step: int, *, max_steps: int) -> float:
    """Linear warm-up to `lr`, then constant, then the recipe's decay to 0 over the last `decay_fraction` of all steps.

    Args:
        section: the recipe's `optimizer`.
        step: how many optimizer steps are finished, from 0.
        max_steps: of the run; a raised one moves the decay.
    """
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    decay_steps = section.decay_fraction * max_steps
    if section.decay == "constant" or decay_steps == 0:
        return section.lr * warmup
    progress = min(1.0, max(0.0, (step - (max_steps - decay_steps)) / decay_steps))
    remaining = 1.0 - progress if section.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * warmup * remaining
