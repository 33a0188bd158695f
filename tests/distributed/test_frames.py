"""The number of own stack frames between the job and the network, so that a traceback fits on a screen."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import dreamdance
from dreamdance.launch.job import Job
from dreamdance.launch.run_folder import create_or_check
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runtime.ranks import Ranks

pytestmark = pytest.mark.distributed

PACKAGE = str(Path(dreamdance.__path__[0]))
TO_THE_OBJECTIVE = ["Job.__call__", "train", "Trainer.train", "Trainer._take_step", "Engine.forward"]


def own_frames_at(ranks: Ranks, *, network: str, recipe: TrainingRecipe, run: Path) -> list[str]:
    """Our own functions on the stack, outermost first, when the network is called in the first training step."""
    found: list[list[str]] = []

    def walk(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == network and module.training and not found:
            frames = [frame.frame.f_code for frame in inspect.stack(context=0)]
            found.append([code.co_qualname for code in reversed(frames) if code.co_filename.startswith(PACKAGE)])

    register_module_forward_pre_hook(walk)
    create_or_check(recipe, run, [])
    Job(run)()
    return found[0]


@pytest.mark.parametrize(
    ("make_recipe", "network", "objective"),
    [
        (tiny_stage1_recipe, "GeometryUNetModel", "GeometryObjective.forward"),
        (tiny_stage2_recipe, "SpatioTemporalControlNetModel", "AnimationObjective.forward"),
    ],
)
def test_six_own_frames_lie_between_a_job_and_its_network(
    make_recipe: Callable[..., TrainingRecipe], network: str, objective: str, shards: Path, tmp_path: Path
) -> None:
    changes = {
        "data.train.local": str(shards / "train"),
        "data.validation.local": str(shards / "validation"),
        "data.num_workers": 0,
        "max_steps": 1,
        "batch_size": 1,
        "micro_batch_size": 1,
        "validation.num_sample_clips": 1,
        "sampling.num_inference_steps": 1,
    }
    recipe, run = make_recipe(changes=changes), tmp_path / "runs" / "frames"
    (frames,) = run_ranks(own_frames_at, 1, tmp_path / "output", network=network, recipe=recipe, run=run)
    assert frames == [*TO_THE_OBJECTIVE, objective]
