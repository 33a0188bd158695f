"""The learning rate as a pure function of the optimizer step: a checkpoint need not hold it."""

import math

from dreamdance.recipe.schema import Optimizer


def learning_rate(section: Optimizer, step: int, *, max_steps: int) -> float:
    """Linear warm-up to `lr`, then constant, then the recipe's decay to 0 over the last `decay_fraction` of all steps.

    Args:
        section: the recipe's `optimizer`.
        step: number of finished optimizer steps.
        max_steps: the recipe's `max_steps`; a higher value moves the decay.
    """
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    decay_steps = section.decay_fraction * max_steps
    if section.decay == "constant" or decay_steps == 0:
        return section.lr * warmup
    progress = min(1.0, max(0.0, (step - (max_steps - decay_steps)) / decay_steps))
    remaining = 1.0 - progress if section.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.lr * warmup * remaining
