"""Exports: the averaged weights as a pipeline in the diffusers layout, which appears complete or not at all."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from dreamdance.atomic_files import sync_folder
from dreamdance.ranks import Ranks
from dreamdance.run_layout import export_folder
from dreamdance.training.distributed import from_main
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine

logger = logging.getLogger(__name__)


def export_average(run: Path, step: int, engine: Engine, ema: ShardedEma, ranks: Ranks) -> Path:
    """Writes `exports/step_...` as safetensors: trained networks in fp32, frozen ones as they are. Collective.

    A bf16 run's own samples come from `from_pretrained(..., torch_dtype=torch.bfloat16)`, an fp32 run's from the
    default. An export that is there already is kept: it can only be this one.

    Returns:
        The export's folder.
    """
    folder = export_folder(run, step)
    if from_main(folder.is_dir()):
        return folder
    weights = {}
    for name, parameter in engine.gathered(ema.shards):
        if ranks.is_main:
            weights[name] = parameter.cpu()
    if ranks.is_main:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with _replaced(engine.objective, weights):
            engine.objective.make_pipeline().save_pretrained(partial, safe_serialization=True)
        _sync_tree(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
        logger.info("exported the averaged weights to %s", folder)
    from_main(None)  # protects other ranks from ending the job while the main process is still writing
    return folder


@contextmanager
def _replaced(objective: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the parameters that train hold `weights`, of whatever type and device these are."""
    parameters = dict(objective.named_parameters())
    kept = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def _sync_tree(folder: Path) -> None:
    """Brings every file below a folder, and its name, to disk."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)
