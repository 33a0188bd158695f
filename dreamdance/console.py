"""The command `dreamdance`, which `launchers/slurm.py` calls too: the launcher, and the plan that training knows."""

import sys

from dreamdance.launch.command import main as launch
from dreamdance.recipe import TrainingRecipe


def main() -> int:
    """Runs the words of the command line and returns the exit code."""
    return launch(sys.argv[1:], _plan)


def _plan(recipe: TrainingRecipe, gpu_memory_gib: float | None) -> str:
    """Parameters and memory, from the one place that knows networks; torch is loaded only here."""
    from dreamdance.training.planning.plan import describe

    return describe(recipe, gpu_memory_gib=gpu_memory_gib)
