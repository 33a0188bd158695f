"""The command `dreamdance`, which `launchers/slurm.py` calls too: the launcher, and the plan that training knows."""

import sys

from dreamdance.launch.command import main as launch
from dreamdance.launch.requirements import missing_packages
from dreamdance.recipe import Recipe, TrainingRecipe


def main() -> int:
    """Runs the words of the command line and returns the exit code."""
    return launch(sys.argv[1:], _plan)


def _plan(recipe: Recipe, gpu_memory_gib: float | None) -> str:
    """Parameters, memory and scores, from the places that know networks and shards; torch is loaded only here.

    A machine that only submits jobs may lack the packages that read shards; it shows no scores.
    """
    parts = []
    if not missing_packages(recipe):
        from dreamdance.data.score_report import describe_scores

        parts.append(describe_scores(recipe))
    if isinstance(recipe, TrainingRecipe):
        from dreamdance.training.planning.plan import describe

        parts.insert(0, describe(recipe, gpu_memory_gib=gpu_memory_gib))
    return "\n\n".join(part for part in parts if part)
