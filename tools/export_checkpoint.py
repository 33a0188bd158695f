"""Writes plain weights from any checkpoint of a run, in one process; any number of ranks may have saved it.

    python tools/export_checkpoint.py runs/stage1_domains trained.safetensors
    python tools/export_checkpoint.py runs/stage1_domains pipeline --step 5000 --weights current

If OUT ends in .safetensors, it becomes one file with all weights that the run trains, in fp32, by their names in the
objective. Any other OUT becomes a folder in the diffusers layout, like those in the run's `exports/`: trained networks
come from the checkpoint, frozen ones from the paths in the recipe. Exit codes: 0 done, 1 error.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from dreamdance.errors import CheckpointError, RecipeError, UserError
from dreamdance.recipe import load_stored_recipe
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runs.layout import RECIPE_FILE, checkpoint_folder, complete_steps
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.export import write_pipeline
from dreamdance.training.networks.initial_weights import load_initial_weights
from dreamdance.training.stages.training_stage import stage_of

KINDS = {"average": "average", "current": "master"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("out", type=Path, help="the output: NAME.safetensors, or a folder")
    parser.add_argument("--step", type=int, help="the checkpoint's step; by default the newest")
    parser.add_argument(
        "--weights",
        choices=KINDS,
        default="average",
        help="the moving average, or the weights with which training continues",
    )
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.out, step=options.step, kind=KINDS[options.weights])
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def export(run: Path, out: Path, *, step: int | None, kind: str) -> None:
    """Writes the weights of one checkpoint.

    Raises:
        CheckpointError: the checkpoint does not exist or is damaged, or `out` exists.
    """
    steps = complete_steps(run)
    if not steps or step not in (None, *steps):
        found = ", ".join(map(str, steps)) or "none"
        wanted = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise CheckpointError(f"{run / 'checkpoints'} holds {wanted}; complete steps: {found}")
    if out.exists():
        raise CheckpointError(f"{out} exists; give another name, or remove it")
    folder = checkpoint_folder(run, steps[-1] if step is None else step)
    weights = read_checkpoint_weights(folder, kind)
    if out.suffix == ".safetensors":
        save_file(weights, out, metadata={"format": "pt"})
    else:
        recipe = load_stored_recipe(run / RECIPE_FILE)
        if not isinstance(recipe, TrainingRecipe):
            raise RecipeError(f"{run / RECIPE_FILE} is not a recipe of a training (key: task)")
        objective = stage_of(recipe).build()
        load_initial_weights(objective, run.parent, init_from=recipe.init_from, init_step=recipe.init_step)
        size = {"default_height": recipe.data.height, "default_width": recipe.data.width}
        write_pipeline(out, objective, weights, size)
    print(f"wrote {len(weights)} parameters of {folder} to {out}")


if __name__ == "__main__":
    sys.exit(main())
