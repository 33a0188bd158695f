"""Exports: the averaged weights as a pipeline in the diffusers layout; the folder appears only when it is complete."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from dreamdance.runs.files import follow_umask, replace_atomically
from dreamdance.runs.layout import export_folder
from dreamdance.runtime.process_group import on_main
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.objectives.output import Objective

logger = logging.getLogger(__name__)


def export_average(
    run: Path, step: int, engine: Engine, ema: ShardedEma, ranks: Ranks, *, height: int, width: int
) -> Path:
    """Writes `exports/step_...` as safetensors: trained networks in fp32, frozen ones as they are. Collective.

    `from_pretrained(..., torch_dtype=torch.bfloat16)` repeats the samples of a bf16 run, the default those of an fp32
    run. An existing export is kept: it can only be the same.

    Args:
        run: the run folder.
        step: the run's step.
        engine: holds the objective.
        ema: the moving average of the weights.
        ranks: this process among all processes.
        height, width: size of the training pictures in pixels; the pipeline's default size.

    Returns:
        The export's folder.
    """
    folder = export_folder(run, step)
    if on_main(folder.is_dir):
        return folder
    weights = {}
    for name, parameter in engine.gather_parameters(ema.shards):
        if ranks.is_main:
            weights[name] = parameter.cpu()
    # Also protects other ranks from ending the job while the main process is still writing.
    on_main(
        partial(write_pipeline, folder, engine.objective, weights, {"default_height": height, "default_width": width})
    )
    return folder


def write_pipeline(folder: Path, objective: Objective, weights: Mapping[str, Tensor], size: Mapping[str, int]) -> None:
    """Writes a folder in the diffusers layout with `weights`; the folder appears only when it is complete.

    Args:
        folder: the folder to write; it does not exist yet.
        objective: has the networks; it is unchanged afterwards.
        weights: name within the objective -> value, in place of the objective's own weights.
        size: `default_height` and `default_width`, in pixels.
    """
    with replace_atomically(folder, is_only_writer=True) as temporary:
        with _replaced(objective, weights):
            pipeline = objective.make_pipeline()
            pipeline.register_to_config(**size)
            pipeline.save_pretrained(temporary, safe_serialization=True)
        follow_umask(temporary)
    logger.info("exported the weights to %s", folder)


@contextmanager
def _replaced(objective: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block, the trained parameters hold `weights`, with the type and device of `weights`."""
    parameters = dict(objective.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value
