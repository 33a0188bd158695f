"""Saving and resuming a run (C8): all ranks save, a step counts once complete, the newest that verifies is resumed.

Training waits only while each rank copies its state in memory; a thread writes, hashes and reads back the files while
training goes on. Knows when a checkpoint counts and what belongs to it; the weights' own format is the engine's.
"""

import errno
import json
import logging
import pickle
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamdance.errors import CheckpointError, is_transient
from dreamdance.recipe.schema import Checkpoint
from dreamdance.runs.layout import checkpoint_folder
from dreamdance.runtime.process_group import gathered, on_main
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing import complete_file as manifests
from dreamdance.training.checkpointing.complete_file import FileRecord, Manifest
from dreamdance.training.checkpointing.folders import CheckpointFolders
from dreamdance.training.checkpointing.host_copy import HostMemory
from dreamdance.training.checkpointing.rank_state import (
    RankState,
    generator_states,
    rank_content,
    rank_file,
    read_rank_state,
    restore_generators,
)
from dreamdance.training.checkpointing.resharding import load_divided_anew
from dreamdance.training.checkpointing.state_files import write_files
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.same_start import WeightsDigests

logger = logging.getLogger(__name__)

_STATE_FILE = "state.json"
_STATE_KEYS = ("step", "loader", "guard", "trainable", "frozen_digest", "initial_digest")


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, and what it cost.

    Attributes:
        folder: where it lies.
        step: finished optimizer steps.
        waited_seconds: how long training waited for it, on this rank.
        seconds: from the start of the save until it counted.
    """

    folder: Path
    step: int
    waited_seconds: float
    seconds: float


@dataclass
class _Save:
    """A save in the making, on this rank."""

    folder: Path
    step: int
    written: Future[list[FileRecord]]
    started: float
    waited_seconds: float = 0.0


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on, and what had been saved beside the weights."""

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
        """Makes sure that there is a place to save to.

        Args:
            run: the run folder.
            engine: the trained weights and the optimizer's state.
            ema: the average, saved by each rank for its own share.
            ranks: this process among all.
            section: what to keep.
            recipe_digest: of the resolved recipe.
            weights: what the networks hold before any checkpoint; frozen ones are never saved.

        Raises:
            CheckpointError: nothing can be written there.
        """
        self.run, self.engine, self.ema, self.ranks = run, engine, ema, ranks
        self.recipe_digest, self._weights = recipe_digest, weights
        self._folders = CheckpointFolders(run, section)
        on_main(self._folders.check_writable)
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._reserved: Future[None] | None = None
        self._save: _Save | None = None

    # ---------------------------------------------------------------------------------------------- save

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun that does not count yet; the same on all ranks."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files of that save are still being written."""
        return self._save is not None and not self._save.written.done()

    def reserve(self) -> None:
        """Has the memory for a save made ready in the background, so that not even the first one waits for it.

        To be called when the optimizer has its state, which is after the first step.
        """
        files = _by_name(self._content(self.run, {}))
        self._reserved = self._thread.submit(self._memory.reserve, files)

    def begin(self, step: int, state: Mapping[str, Any]) -> None:
        """Copies the state of `step`, and has it written while training goes on; `finish` makes it count.

        Killed at any instant, either this checkpoint or the one before it counts.

        Args:
            step: finished optimizer steps.
            state: what else must come back, the loader's and the guard's; plain JSON values.
        """
        if self.is_saving:
            raise RuntimeError("the save before must be finished first")
        started = time.perf_counter()
        folder = checkpoint_folder(self.run, step)
        on_main(
            partial(self._folders.make, step)
        )  # protects the first files from a main process that is still clearing
        files = self._content(folder, {**state, "step": step})
        names = dict(zip(_by_name(files), files, strict=True))
        if self._reserved is not None:
            self._reserved.result()
        copies = self._memory.copy(_by_name(files))
        written = self._thread.submit(write_files, folder, {names[name]: copy for name, copy in copies.items()})
        self._save = _Save(folder, step, written, started, time.perf_counter() - started)

    def finish(self) -> Saved:
        """Waits until every rank's files are on disk, and makes the checkpoint count. Collective.

        Raises:
            CheckpointError: some rank could not write its files, though it tried again; on all ranks.
        """
        if self._save is None:
            raise RuntimeError("no save has begun")
        save, self._save = self._save, None
        waiting = time.perf_counter()
        if error := save.written.exception():
            logger.error("saving %s failed", save.folder.name, exc_info=error)
        # Protects COMPLETE from being written before the slowest rank's files are on disk.
        parts = gathered(_plain(error) if error else save.written.result())
        failures = {rank: part for rank, part in enumerate(parts) if isinstance(part, OSError)}
        if failures:
            told = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
            # All ranks judge alike: by a disk that stumbled, if one did, since the others may only have followed.
            reason = next(filter(is_transient, failures.values()), next(iter(failures.values())))
            raise CheckpointError(
                f"{save.folder.name} could not be saved: {told}. The run ends here rather than train on "
                f"unsaved; started again, it goes on from {self._folders.newest()}. Make room on that disk, or keep "
                "fewer by checkpoint.keep_last"
            ) from reason
        records = [record for part in parts for record in part]
        on_main(partial(self._complete, save, records))
        now = time.perf_counter()
        return Saved(save.folder, save.step, save.waited_seconds + now - waiting, now - save.started)

    def close(self) -> None:
        """Waits until old checkpoints are deleted; nothing can be saved any more."""
        self._thread.shutdown()

    def _content(self, folder: Path, state: Mapping[str, Any]) -> dict[Path, Any]:
        """This rank's files under `folder`, and what belongs into them: live tensors, and JSON as text. Collective."""
        files = self.engine.files_to_save(folder)
        rank_state = RankState(self.ema.state_dict(), self.engine.fragments(), generator_states())
        files[rank_file(folder, self.ranks.rank)] = rank_content(rank_state)
        if self.ranks.is_main:
            shapes = {name: list(parameter.shape) for name, parameter in self.engine.trainable.items()}
            digests = {"frozen_digest": self._weights.frozen, "initial_digest": self._weights.trainable}
            files[folder / _STATE_FILE] = json.dumps({**state, **digests, "trainable": shapes})
        return files

    def _complete(self, save: _Save, records: list[FileRecord]) -> None:
        """On the main process, when all ranks' files are on disk: makes the folder count, and older ones go."""
        files = tuple(sorted(records, key=lambda record: record.path))
        try:
            manifests.complete(save.folder, Manifest(save.step, self.ranks.world_size, self.recipe_digest, files))
        except OSError as error:
            raise CheckpointError(f"{save.folder.name} could not be completed: {error}") from error
        self._thread.submit(self._folders.delete_old)

    # ---------------------------------------------------------------------------------------------- resume

    def resume(self) -> Resumed | None:
        """Restores the newest checkpoint that verifies, on all ranks the same; None where there is none to resume.

        Raises:
            CheckpointError: checkpoints exist but none can be used, or the one found belongs to another version of this
                software, to other trainable parameters or to other frozen weights.
        """
        damaged = []
        for folder in on_main(self._folders.candidates):
            manifest, problem = on_main(partial(_read, folder))
            if manifest is not None:
                share = manifest.files[self.ranks.rank :: self.ranks.world_size]
                found = [text for part in gathered(_problems(folder, share)) for text in part]
                if not found:
                    return self._restore(folder, manifest)
                problem = "; ".join(found)
            self._folders.damaged.add(folder.name)
            damaged.append(f"{folder.name}: {problem}")
            on_main(partial(logger.warning, "skipping checkpoint %s", damaged[-1]))
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.run / 'checkpoints'} is damaged: {'; '.join(damaged)}. Bring one back, or "
                "delete that folder to start over from step 0"
            )
        return None

    def _restore(self, folder: Path, manifest: Manifest) -> Resumed:
        state = _read_state(folder, _STATE_KEYS)
        self._check_same_networks(folder, state)
        with _refusing_code(folder):
            own = read_rank_state(folder, min(self.ranks.rank, manifest.world_size - 1))
            if manifest.world_size == self.ranks.world_size:
                self.engine.load(folder)
                self.ema.load_state_dict(own.ema)
            else:
                load_divided_anew(self.engine, self.ema, folder, saved_world_size=manifest.world_size)
        restore_generators(own.generators)
        self._folders.resumed = folder.name
        if manifest.recipe_digest != self.recipe_digest:
            logger.info("the recipe has changed since %s was saved", folder.name)
        return Resumed(folder, manifest, state)

    def _check_same_networks(self, folder: Path, state: Mapping[str, Any]) -> None:
        """DeepSpeed would load what fits and leave the rest as it is."""
        own = {name: list(parameter.shape) for name, parameter in self.engine.trainable.items()}
        if own != state["trainable"]:
            names = sorted(
                name for name in own.keys() | state["trainable"].keys() if own.get(name) != state["trainable"].get(name)
            )
            raise CheckpointError(
                f"{folder} trains other parameters than this recipe; {len(names)} differ, the first is {names[0]}. "
                "Give `model` and `train` back their values, or start a new run with init_from"
            )
        if self._weights.frozen != state["frozen_digest"]:
            raise CheckpointError(
                f"the frozen weights are not those {folder} was trained with: the files under model.*.path, or the "
                "export of the run in init_from, have changed. Bring the old ones back, or start a new run"
            )
        if self._weights.trainable != state["initial_digest"] and self.ranks.is_main:
            logger.warning(
                "the weights that this run once began with have changed (the files under model.*.path, or the export "
                "of the run in init_from); it goes on with its own, from %s",
                folder.name,
            )


def read_average(folder: Path) -> dict[str, Tensor]:
    """Reads the averaged trainable weights of a complete checkpoint of any number of ranks, in one process.

    Returns:
        name within the objective -> parameter, fp32 on the CPU.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    manifest = manifests.read_manifest(folder)
    if problems := _problems(folder, manifest.files):
        raise CheckpointError("; ".join(problems))
    shapes = _read_state(folder, ["trainable"])["trainable"]
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    for rank in range(manifest.world_size):
        with _refusing_code(folder):
            saved = read_rank_state(folder, rank)
        for part in saved.fragments:
            piece = saved.ema["shards"][part.shard].flatten().narrow(0, part.offset, part.length)
            weights[part.name].view(-1).narrow(0, part.start, part.length).copy_(piece)
    return weights


def _read(folder: Path) -> tuple[Manifest | None, str]:
    """The manifest, or in what it is damaged; a sound one of another version is an error, not passed over."""
    try:
        return manifests.read_manifest(folder), ""
    except manifests.FormatError:
        raise
    except CheckpointError as error:
        return None, str(error)


def _problems(folder: Path, records: Collection[FileRecord]) -> list[str]:
    """What is wrong with files of a checkpoint: they differ from what was saved, or could unpack to any size."""
    problems = manifests.damage(folder, records)
    for path in [] if problems else [folder / record.path for record in records if record.path.endswith(".pt")]:
        try:
            with zipfile.ZipFile(path) as archive:
                is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        except (OSError, zipfile.BadZipFile) as error:
            problems.append(f"{folder.name}/{path.relative_to(folder)} is no file of tensors: {error}")
            continue
        if is_packed:
            problems.append(f"{folder.name}/{path.relative_to(folder)} is compressed, as none of ours is")
    return problems


def _read_state(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """What was saved beside the weights, with all that is wanted of it."""
    try:
        state: dict[str, Any] = dict(json.loads((folder / _STATE_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}/{_STATE_FILE} is none of ours, though it is as it was saved: {error}"
        ) from error
    if lacking := [key for key in keys if key not in state]:
        raise manifests.FormatError(folder, f"its {_STATE_FILE} has no {', '.join(lacking)}")
    return state


@contextmanager
def _refusing_code(folder: Path) -> Iterator[None]:
    """Says in our own words what torch's loader of weights found; nothing of it has run."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a file of {folder} holds more than numbers: loading it could run foreign code, so nothing of it was "
            f"loaded. If you do not know where this checkpoint comes from, delete it. {error}"
        ) from error


def _by_name(files: Mapping[Path, Any]) -> dict[str, Any]:
    """The files by their names alone, which stay the same from save to save."""
    return {path.name: content for path, content in files.items()}


def _plain(error: BaseException) -> OSError:
    """An error as it can be told to the other ranks, who judge it by its number."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(error.filename) if error.filename else None)
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")  # nobody's mistake, as far as can be told
