"""Converts a run's checkpoints from DeepSpeed's format, which older versions of this software wrote, to our own.

    python tools/convert_checkpoint.py runs/stage1_domains

All values stay bit-identical. Each folder is converted in place: the command writes the new files beside the old ones
and reads them back, replaces COMPLETE in one step, then deletes the old files. It may be killed at any instant; the
next call continues. Only tensors and plain containers are unpickled. Exit codes: 0 done, 1 error.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that there is no GPU
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from dreamdance.errors import CheckpointError, UserError
from dreamdance.runs.layout import checkpoint_folder, complete_steps
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.rank_file import Piece, RankFile, rank_path

MOMENTS = ("exp_avg", "exp_avg_sq")
# Classes of the objects in DeepSpeed's files; everything else in these files is tensors and plain containers.
DEEPSPEED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    run = parser.parse_args(arguments).run
    try:
        steps = complete_steps(run)
        if not steps:
            raise CheckpointError(f"{run / 'checkpoints'} holds no complete checkpoint")
        for step in steps:
            print(f"{checkpoint_folder(run, step)}: {convert(checkpoint_folder(run, step))}")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def convert(folder: Path) -> str:
    """Converts one checkpoint; returns a text that describes the result.

    Raises:
        CheckpointError: the checkpoint is damaged, or not in the old format.
    """
    try:
        complete_file.read_manifest(folder)
    except complete_file.FormatError:
        _write_in_own_format(folder)
        done = "converted"
    else:
        done = "already in the current format"
    shutil.rmtree(folder / "deepspeed", ignore_errors=True)
    for path in folder.glob("rank_*.pt"):
        path.unlink()
    return done


def _write_in_own_format(folder: Path) -> None:
    manifest = complete_file.read_manifest(folder, expected=complete_file.DEEPSPEED_FORMAT)
    if problems := complete_file.find_damage(folder, manifest.files):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}. Restore these files, or delete the folder")
    records = [record for record in manifest.files if record.path == "state.json"]
    for rank in range(manifest.world_size):
        with _as_checkpoint_error(folder):
            content = _read(folder, [record.path for record in manifest.files], rank)
        records += complete_file.write_files(folder, {rank_path(folder, rank).name: content.write})
    complete_file.complete(folder, replace(manifest, files=tuple(sorted(records, key=lambda record: record.path))))


def _read(folder: Path, files: list[str], rank: int) -> RankFile:
    """Reads the files of one rank in the old format."""
    own = _load(folder / f"rank_{rank:05d}.pt")
    share = next((name for name in files if re.search(rf"zero_pp_rank_{rank}_mp_rank_00_", name)), None)
    if share is not None:
        saved = _load(folder / share)["optimizer_state_dict"]
        masters, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
    else:  # nothing was sharded: the weights are the masters, in one file for all ranks
        saved = _load(folder / "deepspeed" / "mp_rank_00_model_states.pt")
        module = {name.removeprefix("objective."): value for name, value in saved["module"].items()}
        masters = [module[name] for name, *_ in own["fragments"]]
        states = saved["optimizer"]["state"]
    pieces = {}
    for name, shard, offset, start, length in own["fragments"] if share is not None or rank == 0 else []:
        state = states.get(shard, {})  # empty if no step was applied yet
        values = {
            "master": masters[shard],
            **{kind: state.get(kind) for kind in MOMENTS},
            "average": own["ema"]["shards"][shard],
        }
        flat = {kind: _part(value, offset, length) for kind, value in values.items()}
        pieces[name] = Piece(start, flat, float(state.get("step", 0.0)))
    generators = {key: _plain(value) for key, value in own["generators"].items()}
    return RankFile.of(pieces, average_updates=int(own["ema"]["num_updates"]), generators=generators)


def _part(value: Tensor | None, offset: int, length: int) -> Tensor:
    return torch.zeros(length) if value is None else value.flatten().narrow(0, offset, length).to(torch.float32)


def _plain(value: Any) -> Any:
    """Turns the tensors in a random number generator's state into lists."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) else value


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return content


@contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Turns any error about the files' content into a CheckpointError that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of the old format: {type(error).__name__}: {error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
