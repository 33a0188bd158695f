"""Functions that the ranks of the distributed tests run: real trainings, recorded, with a fault at a chosen instant."""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.loading.domain_draw import TARGET
from dreamdance.errors import UserError, is_transient
from dreamdance.modalities import DOMAINS
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from dreamdance.runtime.process_group import process_group, repeatable_arithmetic
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.inputs import PreparedInputs
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance.training.objectives.output import ObjectiveOutput
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import build_trainer, train
from dreamdance.training.trainer import Trainer
from support.recipes import record_inputs

Recipe = Stage1Recipe | Stage2Recipe


@dataclass(frozen=True)
class Fault:
    """A fault of one rank in its n-th forward pass, or at the first matching file operation.

    Attributes:
        rank: the rank that has the fault.
        number: a signal that the rank sends to itself; None makes it hang for ever instead.
        forward: n, counted from 1.
        in_validation: counts forward passes on held-out clips instead of those of training.
        operation: name of an audit event.
        path_contains: strings that must all occur in the arguments of the event.
    """

    rank: int
    number: signal.Signals | None = signal.SIGKILL
    forward: int | None = None
    in_validation: bool = False
    operation: str = ""
    path_contains: tuple[str, ...] = ()

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        if self.forward is not None:
            count = 0

            def fail_in_forward(module: nn.Module, inputs: Any) -> None:
                nonlocal count
                if _is_validating(module) if self.in_validation else _is_training(module):
                    count += 1
                    if count == self.forward:
                        self._fail()

            register_module_forward_pre_hook(fail_in_forward)
        else:

            def fail_at_file(event: str, arguments: tuple[Any, ...]) -> None:
                if event == self.operation and all(part in str(arguments) for part in self.path_contains):
                    self._fail()

            sys.addaudithook(fail_at_file)

    def _fail(self) -> None:
        if self.number is None:
            threading.Event().wait()
        else:
            os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class SlowRank:
    """A rank whose training forward passes take longer."""

    rank: int
    seconds: float

    def prepare(self, ranks: Ranks) -> None:
        def wait(module: nn.Module, inputs: Any) -> None:
            if ranks.rank == self.rank and _is_training(module):
                time.sleep(self.seconds)

        register_module_forward_pre_hook(wait)


@dataclass(frozen=True)
class SmallDisk:
    """A rank whose files may not grow any more, from the first time on that it opens a certain file for writing.

    Attributes:
        rank: the rank that has the fault.
        path_contains: strings that must all occur in the path of the file.
        times: number of attempts that meet the limit before there is room again.
    """

    rank: int
    path_contains: tuple[str, ...]
    times: int
    LARGEST_BYTES = 4096

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        opened = 0
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit_at_open(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal opened
            if event == "open" and arguments[1] == "w" and all(part in str(arguments) for part in self.path_contains):
                opened += 1
                limit = self.LARGEST_BYTES if opened <= self.times else before[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

        sys.addaudithook(limit_at_open)


@dataclass(frozen=True)
class FailingDisk:
    """A rank that cannot open a certain file because of an error of the storage: EIO, ESTALE, ...

    Attributes:
        rank: the rank that has the fault.
        path_contains: strings that must all occur in the path of the file.
        number: errno of the error.
        times: number of attempts that fail.
    """

    rank: int
    path_contains: tuple[str, ...]
    number: int
    times: int = 1_000_000

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank != self.rank:
            return
        failed = 0

        def fail_at_open(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal failed
            if event == "open" and failed < self.times and all(part in str(arguments) for part in self.path_contains):
                failed += 1
                sys.stderr.write(f"failing to open {arguments[0]}\n")
                raise OSError(self.number, os.strerror(self.number), str(arguments[0]))

        sys.addaudithook(fail_at_open)


@dataclass(frozen=True)
class SlowDisk:
    """A file that rank 0 can open for writing only after the n-th training forward pass has begun, within a minute."""

    path_contains: tuple[str, ...]
    forward: int

    def prepare(self, ranks: Ranks) -> None:
        if ranks.rank:
            return
        count, begun = 0, threading.Event()

        def count_forwards(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            count += _is_training(module)
            if count == self.forward:
                begun.set()

        def wait_at_open(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and arguments[1] == "w" and all(part in str(arguments) for part in self.path_contains):
                assert begun.wait(60), "training waits for the disk"

        register_module_forward_pre_hook(count_forwards)
        sys.addaudithook(wait_at_open)


@dataclass(frozen=True)
class ReadOnlyFolder:
    """A folder that no rank may write into from the n-th training forward pass on; 0 means from the beginning."""

    folder: Path
    forward: int

    def prepare(self, ranks: Ranks) -> None:
        _drop_all_rights()
        count = 0

        def forbid(module: nn.Module, inputs: Any) -> None:
            nonlocal count
            if _is_training(module):
                count += 1
                if count == self.forward:
                    self.folder.chmod(0o555)

        if self.forward:
            register_module_forward_pre_hook(forbid)
        else:
            self.folder.chmod(0o555)


def _drop_all_rights() -> None:
    """Drops all capabilities, because file permissions do not stop root: `capset` with empty sets."""
    version_3, this_process = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_process)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


@dataclass(frozen=True)
class ScaledSamples:
    """Samples, by (epoch, sample id), whose pictures are multiplied by a factor: a large one makes the loss jump."""

    keys: frozenset[tuple[int, int]]
    factor: float


def run_recorded(
    ranks: Ranks,
    *,
    recipe: Recipe,
    run: Path,
    fault: Fault | SlowRank | SmallDisk | FailingDisk | SlowDisk | ReadOnlyFolder | None = None,
    poisoned: tuple[int, ...] = (),
    scaled: ScaledSamples | None = None,
    umask: int | None = None,
) -> None:
    """Calls `train` and records the loss of every training sample as it is computed.

    Args:
        ranks: this process.
        recipe: the training.
        run: the run folder; `run`/record_<rank>.jsonl grows over restarts.
        fault: the fault in this start.
        poisoned: ids of samples whose pose drawings are NaN.
        scaled: samples whose pictures are multiplied by a factor.
        umask: umask of this process; None keeps the inherited one.
    """
    if umask is not None:
        os.umask(umask)
    run.mkdir(parents=True, exist_ok=True)
    record = (run / f"record_{ranks.rank}.jsonl").open("a", encoding="utf-8")

    def record_losses(module: nn.Module, inputs: Any, output: Any) -> None:
        if _is_training(module):
            assert isinstance(output, ObjectiveOutput)
            for key, loss in zip(inputs[0].clips.keys.tolist(), output.sample_losses.tolist(), strict=True):
                record.write(json.dumps({"epoch": key[1], "sample": key[2], "loss": loss}) + "\n")
            record.flush()

    def poison(module: nn.Module, inputs: Any) -> Any:
        if not _is_training(module):
            return None
        batch: ClipBatch = inputs[0].clips
        hit = torch.tensor([sample in poisoned for sample in batch.keys[:, 2].tolist()])
        pose = batch.pose.clone()
        pose[hit] = torch.nan
        return (replace(inputs[0], clips=replace(batch, maps={**batch.maps, "pose": pose})),)

    def scale(module: nn.Module, inputs: Any) -> Any:
        if not _is_training(module):
            return None
        batch: ClipBatch = inputs[0].clips
        assert scaled is not None
        hit = torch.tensor([(epoch, sample) in scaled.keys for _, epoch, sample in batch.keys.tolist()])
        factors = torch.where(hit, scaled.factor, 1.0).reshape(-1, 1, 1, 1, 1)
        changed = {name: batch.maps[name] * factors for name in (*DOMAINS, TARGET) if name in batch.maps}
        return (replace(inputs[0], clips=replace(batch, maps={**batch.maps, **changed})),)

    register_module_forward_hook(record_losses)
    if scaled is not None:
        register_module_forward_pre_hook(scale)
    if poisoned:
        register_module_forward_pre_hook(poison)
    if fault is not None:
        fault.prepare(ranks)
    train(recipe, run)


def classify_error(ranks: Ranks, *, recipe: Recipe, run: Path, fault: FailingDisk) -> dict[str, Any]:
    """Makes a start fail; returns the text of its error and whether the error is one that the user must fix."""
    try:
        run_recorded(ranks, recipe=recipe, run=run, fault=fault)
    except Exception as error:  # noqa: BLE001 - classified as in the outermost frame of a job
        return {"is_users": isinstance(error, UserError) and not is_transient(error), "text": str(error)}
    return {"is_users": False, "text": ""}


def prepare_and_inspect(ranks: Ranks, *, recipe: Recipe, run: Path, steps: int) -> dict[str, Any]:
    """Takes a few steps and returns values of the engine; every value belongs to this rank."""
    with StopRequest() as stop, process_group(ranks, timeout_seconds=60), repeatable_arithmetic(enabled=True):
        trainer = build_trainer(
            stage_of(recipe), run, ranks, stop, Watchdog.from_limits(recipe.cluster), deterministic=True
        )
        objective = trainer.engine.objective
        trainer.inputs = PreparedInputs(iter(trainer.loader), objective, ranks.device)
        first = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
        for _ in range(steps):
            trainer._take_step()
        found = _inspect(trainer, first)
        with trainer.validation.averaged_weights():
            found["weights_in_average"] = _trainable(objective)
            found["is_training_in_average"] = objective.training
            found["clips"] = [sample.clip_id for sample in trainer.validation.loss_clips]
            found["samples"] = {
                clip.clip_ids[0]: stage_of(recipe).predict(objective, clip)
                for clip in trainer.validation.own_samples[""]
            }
            embedded = record_inputs(objective.image_encoder)
            found["losses"] = trainer.validation._losses()
            found["encodings"] = len(embedded)
            found["average_gathered"] = {
                name: value.clone() for name, value in trainer.engine.gather_parameters(trainer.ema.shards)
            }
        found["weights_after"] = _trainable(objective)
        found["is_training_after"] = objective.unet.training
        trainer._take_step()
        found["weights_one_step_later"] = _trainable(objective)
        trainer.metrics.close()
    return found


def _inspect(trainer: Trainer, first: dict[str, torch.Tensor]) -> dict[str, Any]:
    engine = trainer.engine
    state = engine._engine.optimizer.state
    return {
        "trainable": sorted(engine.trainable),
        "frozen_with_gradient": [
            name
            for name, value in engine.objective.named_parameters()
            if not value.requires_grad and value.grad is not None
        ],
        "changed": sorted(
            name
            for name, value in engine.objective.named_parameters()
            if not torch.equal(value, first[name].to(value.dtype))
        ),
        "num_moments": sum(values["exp_avg"].numel() for values in state.values()),
        "num_masters": sum(master.numel() for master in engine.masters),
        "master_dtypes": sorted({str(master.dtype) for master in engine.masters}),
        "num_average": sum(shard.numel() for shard in trainer.ema.shards),
        "weights_before": _trainable(engine.objective),
        "masters_gathered": {name: value.clone() for name, value in engine.gather_parameters(engine.masters)},
        "moments_gathered": _moments(trainer),
    }


def _moments(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """The moments of the optimizer as whole parameters; empty before the first applied step."""
    engine = trainer.engine
    states = list(engine._engine.optimizer.state.values())
    return {
        moment: {name: value.clone() for name, value in engine.gather_parameters([state[moment] for state in states])}
        for moment in engine.MOMENTS
        if states
    }


def _trainable(objective: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in objective.named_parameters() if value.requires_grad}


def _is_training(module: nn.Module) -> bool:
    return isinstance(module, GeometryObjective | AnimationObjective) and module.training


def _is_validating(module: nn.Module) -> bool:
    return isinstance(module, GeometryObjective | AnimationObjective) and not module.training
