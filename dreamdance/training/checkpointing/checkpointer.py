"""Saves and resumes a run (C8): all ranks save, then the checkpoint counts; a run resumes the newest that verifies.

Training waits only while each rank copies its state in memory; a thread writes, hashes and reads back the files while
training continues. With `checkpoint.copy_in_memory: false` nothing is copied, and training waits for the files. This
module decides when a checkpoint counts and what it contains; `rank_file` has the file format.
"""

import errno
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamdance.errors import CheckpointError, is_transient
from dreamdance.recipe.schema import Checkpoint
from dreamdance.runs.layout import COMPLETE_FILE, checkpoint_folder
from dreamdance.runtime.process_group import gather_from_ranks, on_main
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing import complete_file
from dreamdance.training.checkpointing.complete_file import FileRecord, HashedFile, Manifest
from dreamdance.training.checkpointing.folders import CheckpointFolders
from dreamdance.training.checkpointing.host_copy import HostCopy
from dreamdance.training.checkpointing.rank_file import (
    Piece,
    RankFile,
    generator_states,
    rank_path,
    read_pieces,
    read_rank_file,
    restore_generators,
)
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.same_start import WeightsDigests

logger = logging.getLogger(__name__)

_STATE_FILE = "state.json"
_STATE_KEYS = ("step", "loader", "guard", "trainable", "frozen_digest", "initial_digest")


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, and how long its save took.

    Attributes:
        folder: the checkpoint's folder.
        step: number of finished optimizer steps.
        waited_seconds: how long training on this rank waited for the save.
        seconds: time from the start of the save until the checkpoint counted.
    """

    folder: Path
    step: int
    waited_seconds: float
    seconds: float


@dataclass
class _Save:
    """A save that has begun on this rank and does not count yet."""

    folder: Path
    step: int
    written: Future[list[FileRecord]]
    started: float
    waited_seconds: float = 0.0


@dataclass(frozen=True)
class Resumed:
    """The checkpoint from which a run continues, and the state that was saved with the weights."""

    folder: Path
    manifest: Manifest
    state: dict[str, Any]


class Checkpointer:
    """Saves, finds and restores the checkpoints of one run. All methods but the constructor are collective."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        ema: ShardedEma,
        ranks: Ranks,
        section: Checkpoint,
        *,
        recipe_digest: str,
        weights: WeightsDigests,
    ) -> None:
        """Checks that checkpoints can be written.

        Args:
            run: the run folder.
            engine: the trained weights and the optimizer's state.
            ema: the moving average of this rank's share of the weights.
            ranks: this process among all processes.
            section: the recipe's `checkpoint` section.
            recipe_digest: hash of the resolved recipe.
            weights: hashes of the networks' weights before any checkpoint; frozen weights are never saved.

        Raises:
            CheckpointError: the folder of checkpoints cannot be written.
        """
        self.run, self.engine, self.ema, self.ranks = run, engine, ema, ranks
        self.recipe_digest, self._weights = recipe_digest, weights
        self._folders = CheckpointFolders(run, section)
        on_main(self._folders.check_writable)
        self._memory = HostCopy() if section.copy_in_memory else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._reserved: Future[None] | None = None
        self._save: _Save | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun and `finish` was not called yet; the same on all ranks."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether the files of this rank are still being written."""
        return self._save is not None and not self._save.written.done()

    def reserve(self) -> None:
        """Allocates the memory for saves in the background, so that the first save does not wait for it."""
        if self._memory is not None:
            self._reserved = self._thread.submit(self._memory.reserve, self._content().tensors)

    def begin(self, step: int, state: Mapping[str, Any]) -> None:
        """Copies the state of `step` and starts to write it in the background; `finish` makes it count.

        If the run is killed at any instant, either this checkpoint or the one before it counts.

        Args:
            step: number of finished optimizer steps.
            state: further state to restore, of the loader and the guard, as JSON values.
        """
        if self.is_saving:
            raise RuntimeError("call finish for the previous save first")
        started = time.perf_counter()
        folder = checkpoint_folder(self.run, step)
        # Waits until the main process has emptied the folder: otherwise it could delete the first files.
        on_main(partial(self._folders.make, step))
        if self._reserved is not None:
            self._reserved.result()
        content = self._content()
        if self._memory is not None:
            content = replace(content, tensors=self._memory.copy(content.tensors))
        files: dict[str, Callable[[HashedFile], None]] = {rank_path(folder, self.ranks.rank).name: content.write}
        if self.ranks.is_main:
            text = self._state_text({**state, "step": step})
            files[_STATE_FILE] = lambda file: file.write(text.encode())
        written = self._thread.submit(complete_file.write_files, folder, files)
        if self._memory is None:
            wait([written])  # the next step would change what is being written
        self._save = _Save(folder, step, written, started, time.perf_counter() - started)

    def finish(self) -> Saved:
        """Waits until the files of all ranks are on disk, and makes the checkpoint count. Collective.

        Raises:
            CheckpointError: a rank could not write its files in several attempts; raised on all ranks.
        """
        if self._save is None:
            raise RuntimeError("no save has begun")
        save, self._save = self._save, None
        waiting = time.perf_counter()
        if error := save.written.exception():
            logger.error("saving %s failed", save.folder.name, exc_info=error)
        # Waits for the slowest rank: COMPLETE may be written only after all files are on disk.
        parts = gather_from_ranks(_sendable(error) if error else save.written.result())
        failures = {rank: part for rank, part in enumerate(parts) if isinstance(part, OSError)}
        if failures:
            reasons = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
            # All ranks raise from the same error; from a transient one if there is one, because it may be the cause.
            reason = next(filter(is_transient, failures.values()), next(iter(failures.values())))
            raise CheckpointError(
                f"{save.folder.name} could not be saved: {reasons}. The run stops, because it cannot save "
                f"its progress; started again, it continues from {self._folders.newest()}. Make room on that disk, or "
                "lower checkpoint.keep_last"
            ) from reason
        records = [record for part in parts for record in part]
        on_main(partial(self._complete, save, records))
        now = time.perf_counter()
        return Saved(save.folder, save.step, save.waited_seconds + now - waiting, now - save.started)

    def close(self) -> None:
        """Waits until old checkpoints are deleted; no save can begin afterwards."""
        self._thread.shutdown()

    def _pieces(self, *, with_average: bool = True) -> dict[str, Piece]:
        """This rank's share of all parameters: the live tensors themselves."""
        shares = {"master": self.engine.masters, **self.engine.moments()}
        if with_average:
            shares["average"] = self.ema.shards
        counts = self.engine.step_counts()
        return {
            part.name: Piece(part.start, {kind: part.of(share) for kind, share in shares.items()}, counts[part.shard])
            for part in self.engine.fragments()
        }

    def _content(self) -> RankFile:
        """The content of this rank's file, as live tensors; rank 0 saves everything if nothing is sharded."""
        pieces = self._pieces() if self.engine.sharded or self.ranks.is_main else {}
        return RankFile.of(pieces, average_updates=self.ema.num_updates, generators=generator_states())

    def _state_text(self, state: Mapping[str, Any]) -> str:
        shapes = {name: list(parameter.shape) for name, parameter in self.engine.trainable.items()}
        digests = {"frozen_digest": self._weights.frozen, "initial_digest": self._weights.trainable}
        return json.dumps({**state, **digests, "trainable": shapes})

    def _complete(self, save: _Save, records: list[FileRecord]) -> None:
        """Makes the folder count, and deletes older ones; on the main process, when all ranks' files are on disk."""
        files = tuple(sorted(records, key=lambda record: record.path))
        try:
            complete_file.complete(save.folder, Manifest(save.step, self.ranks.world_size, self.recipe_digest, files))
        except OSError as error:
            raise CheckpointError(f"{save.folder.name} could not be completed: {error}") from error
        self._thread.submit(self._folders.delete_old)

    def resume(self) -> Resumed | None:
        """Restores the newest checkpoint that verifies, the same on all ranks; returns None if the run has none.

        Raises:
            CheckpointError: checkpoints exist but all are damaged, or the newest sound one has the format of another
                version of this software, other trainable parameters or other frozen weights.
        """
        damaged = []
        for folder in on_main(self._folders.candidates):
            manifest, problem = on_main(partial(_read, folder))
            if manifest is not None:
                share = manifest.files[self.ranks.rank :: self.ranks.world_size]
                found = [text for part in gather_from_ranks(complete_file.find_damage(folder, share)) for text in part]
                if not found:
                    return self._restore(folder, manifest)
                problem = "; ".join(found)
            self._folders.damaged.add(folder.name)
            damaged.append(f"{folder.name}: {problem}")
            on_main(partial(logger.warning, "skipping checkpoint %s", damaged[-1]))
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.run / 'checkpoints'} is damaged: {'; '.join(damaged)}. Restore one from "
                "a backup, or delete that folder to start over from step 0"
            )
        return None

    def _restore(self, folder: Path, manifest: Manifest) -> Resumed:
        state = _read_state(folder, _STATE_KEYS)
        self._check_same_networks(folder, state)
        # An average that is the masters themselves must not be read over them: its decay may have been another one.
        pieces = self._pieces(with_average=not self.ema.is_masters)
        with torch.no_grad():
            self.engine.apply_restored(read_pieces(folder, manifest.world_size, pieces))
        own = read_rank_file(folder, min(self.ranks.rank, manifest.world_size - 1))
        self.ema.num_updates = own.average_updates
        restore_generators(own.generators)
        self._folders.resumed = folder.name
        if manifest.recipe_digest != self.recipe_digest:
            logger.info("the recipe has changed since %s was saved", folder.name)
        return Resumed(folder, manifest, state)

    def _check_same_networks(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Refuses a checkpoint with other trainable parameters, or other frozen weights, than this run."""
        own = {name: list(parameter.shape) for name, parameter in self.engine.trainable.items()}
        if own != state["trainable"]:
            names = sorted(
                name for name in own.keys() | state["trainable"].keys() if own.get(name) != state["trainable"].get(name)
            )
            raise CheckpointError(
                f"{folder} contains other parameters than this recipe trains; {len(names)} differ, the first is "
                f"{names[0]}. Set `model` and `train` to their old values, or start a new run with init_from"
            )
        if self._weights.frozen != state["frozen_digest"]:
            raise CheckpointError(
                f"the frozen weights are not those with which {folder} was trained: the files under model.*.path, or "
                "the export of the run in init_from, have changed. Restore the old files, or start a new run"
            )
        if self._weights.trainable != state["initial_digest"] and self.ranks.is_main:
            logger.warning(
                "the weights with which this run began have changed (the files under model.*.path, or the export of "
                "the run in init_from); the run continues with its own weights, from %s",
                folder.name,
            )


def read_checkpoint_weights(folder: Path, kind: str = "average") -> dict[str, Tensor]:
    """Reads the trainable weights of a complete checkpoint in one process; any number of ranks may have saved it.

    Args:
        folder: the checkpoint.
        kind: "average", or "master" for the weights with which training continues.

    Returns:
        name within the objective -> parameter, fp32 on the CPU.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    manifest, problem = _read(folder)
    problems = [problem] if manifest is None else complete_file.find_damage(folder, manifest.files)
    if manifest is None or problems:
        raise CheckpointError("; ".join(problems))
    shapes = _read_state(folder, ["trainable"])["trainable"]
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    read_pieces(folder, manifest.world_size, {name: Piece(0, {kind: value}) for name, value in weights.items()})
    return weights


def _read(folder: Path) -> tuple[Manifest | None, str]:
    """Returns the manifest, or None and the damage. Raises if it is sound but of another version: never skip that."""
    try:
        manifest = complete_file.read_manifest(folder)
    except complete_file.FormatError:
        raise
    except CheckpointError as error:
        return None, str(error)
    listed = {record.path for record in manifest.files}
    wanted = (_STATE_FILE, *(rank_path(folder, rank).name for rank in range(min(manifest.world_size, len(listed)))))
    if lacking := [name for name in wanted if name not in listed]:
        return None, f"{folder.name}/{COMPLETE_FILE} does not list {', '.join(lacking)}"
    return manifest, ""


def _read_state(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Reads the state that was saved with the tensors, and checks that it has all `keys`."""
    try:
        state: dict[str, Any] = dict(json.loads((folder / _STATE_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}/{_STATE_FILE} is not in our format, although its hash agrees with the manifest: {error}"
        ) from error
    if lacking := [key for key in keys if key not in state]:
        raise complete_file.FormatError(folder, f"its {_STATE_FILE} has no {', '.join(lacking)}")
    return state


def _sendable(error: BaseException) -> OSError:
    """Returns an error that can be sent to other ranks; its errno shows whether it is transient."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(error.filename) if error.filename else None)
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")  # counts as transient
