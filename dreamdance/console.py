"""The command `dreamdance`, which `launchers/slurm.py` calls too: the launcher, and the plan that training knows."""

import sys

from dreamdance.launch.command import main as launch
from dreamdance.launch.requirements import missing_packages
from dreamdance.recipe import PrepareRecipe, Recipe, TrainingRecipe
from dreamdance.runtime.gpus import Gpu


def main() -> int:
    """Runs the words of the command line and returns the exit code."""
    return launch(sys.argv[1:], _plan)


def _plan(recipe: Recipe, gpu_memory_gib: float | None, gpu: Gpu) -> str:
    """Parameters, memory, time, videos and scores, from the places that know networks and shards.

    Torch is loaded only here. A machine that only submits jobs may lack the packages that read videos and shards; it
    shows neither.
    """
    parts = []
    if not missing_packages(recipe):
        from dreamdance.data.score_report import describe_scores

        parts.append(describe_scores(recipe))
        if isinstance(recipe, PrepareRecipe):
            from dreamdance.data.source_report import describe_videos

            parts.insert(0, describe_videos(recipe))
    if isinstance(recipe, TrainingRecipe):
        from dreamdance.training.planning.checkpointing_level import describe_with_level

        parts.insert(0, describe_with_level(recipe, gpu_memory_gib=gpu_memory_gib, gpu=gpu))
    return "\n\n".join(part for part in parts if part)
