"""Launches any recipe on Slurm, on this machine, or in this process: python launchers/slurm.py --help."""

import sys

# This folder is no place to import from; `dreamdance` is installed, and a recipe may be launched from anywhere.
sys.path.pop(0)

try:
    from dreamdance.launch.command import main
    from dreamdance.recipe import TrainingRecipe
except ModuleNotFoundError as error:
    sys.exit(f"{error}: this Python ({sys.executable}) lacks the project; run tools/setup.sh and use .venv/bin/python")


def plan(recipe: TrainingRecipe, gpu_memory_gib: float | None) -> str:
    """Parameters and memory, from the one place that knows networks; torch is loaded only here."""
    from dreamdance.training.plan import describe

    return describe(recipe, gpu_memory_gib=gpu_memory_gib)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], plan))
