"""The entry of both stages' training: builds the parts, resumes, trains, exports."""

import contextlib
import hashlib
import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dreamdance.data.loading.clip_choice import choose_training_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.models.compiled_blocks import compile_blocks
from dreamdance.recipe.same_run import result_json
from dreamdance.recipe.schema import TrainingRecipe
from dreamdance.runs.layout import note_signal
from dreamdance.runtime.available_memory import return_freed_memory
from dreamdance.runtime.gpus import known_gpu
from dreamdance.runtime.process_group import (
    common_store,
    gather_from_ranks,
    is_deterministic,
    on_main,
    process_group,
    repeatable_arithmetic,
)
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.checkpointing.checkpointer import Checkpointer, Resumed
from dreamdance.training.checkpointing.saving_plan import SAVING_SHARE
from dreamdance.training.ema import ShardedEma
from dreamdance.training.encoding.fit import require_fitting_latents, require_fitting_maps
from dreamdance.training.engine import Engine
from dreamdance.training.export import export_average
from dreamdance.training.guard import StepGuard
from dreamdance.training.metrics import Metrics
from dreamdance.training.networks.build import exportable
from dreamdance.training.networks.initial_weights import load_initial_weights
from dreamdance.training.planning.checkpointing_level import choose_level
from dreamdance.training.planning.step_cost import count_recipe
from dreamdance.training.same_start import require_same, require_same_start, weights_digests
from dreamdance.training.shard_check import verify_at_opening, verify_by_hash
from dreamdance.training.stages.training_stage import TrainingStage, stage_of
from dreamdance.training.step_flops import StepFlops
from dreamdance.training.trainer import Trainer
from dreamdance.training.validation import Validator

logger = logging.getLogger(__name__)


def train(recipe: TrainingRecipe, run_folder: Path) -> None:
    """Trains a run from its newest checkpoint to `max_steps`, and exports its averaged weights.

    Killed at any instant and called again, the run ends as if it had not been interrupted (C8). A stop signal makes it
    save and return early, without an export.

    Args:
        recipe: stage 1 or stage 2.
        run_folder: holds everything of this run; the other runs lie beside it.
    """
    ranks = Ranks.from_environment()
    deterministic = is_deterministic(recipe.deterministic, ranks)
    timeout = recipe.cluster.collective_timeout_seconds
    stopping = StopRequest(
        save_limit_seconds=SAVING_SHARE * recipe.cluster.stop_seconds, on_signal=partial(note_signal, run_folder)
    )
    with contextlib.ExitStack() as held:
        stop, watchdog = held.enter_context(stopping), held.enter_context(Watchdog.from_limits(recipe.cluster))
        # The watchdog is entered first, so that it covers the exit of the process group, which waits for all ranks.
        watchdog.enter("starting", f"rank {ranks.rank}")
        held.enter_context(process_group(ranks, timeout_seconds=timeout))
        held.enter_context(repeatable_arithmetic(deterministic))
        trainer = build_trainer(stage_of(recipe), run_folder, ranks, stop, watchdog, deterministic=deterministic)
        finished = trainer.train()
        if finished:
            watchdog.enter("exporting", f"step {trainer.step}")
            size = {"height": recipe.data.height, "width": recipe.data.width}
            export = export_average(run_folder, trainer.step, trainer.engine, trainer.ema, ranks, **size)
            trainer.metrics.message(f"finished at step {trainer.step:,}; exported to {export}", step=trainer.step)
        watchdog.enter("closing", f"step {trainer.step}")
        trainer.checkpointer.close()
        trainer.metrics.close()


def build_trainer(
    stage: TrainingStage[Any],
    run_folder: Path,
    ranks: Ranks,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    deterministic: bool,
) -> Trainer:
    """Builds all parts of a run and loads its newest checkpoint. Collective, within `process_group`."""
    recipe = stage.recipe
    require_same_start(recipe)
    _seed_global_generators(recipe.seed)
    on_shard = partial(watchdog.enter, "checking a shard")
    if recipe.data.verify == "hash":
        data = recipe.data
        folders = [folder for folder in (data.train, data.validation, data.latents, data.maps) if folder is not None]
        verify_by_hash(folders, ranks, common_store(), on_progress=on_shard)
    watchdog.enter("planning memory", f"rank {ranks.rank}")
    chosen = choose_level(recipe, _gpu_memory_gib(ranks))
    stage = stage_of(chosen.recipe)
    watchdog.enter("loading weights", f"rank {ranks.rank}")
    objective = stage.build()
    load_initial_weights(objective, run_folder.parent, init_from=recipe.init_from, init_step=recipe.init_step)
    require_fitting_latents(recipe, objective)
    require_fitting_maps(recipe)
    stage.set_trainable(objective)
    if recipe.model.compile == "blocks":
        for network in exportable(objective).values():
            compile_blocks(network)
    weights = weights_digests(objective)
    require_same({"frozen weights": weights.frozen, "weights to train": weights.trainable})
    watchdog.enter("starting DeepSpeed", f"rank {ranks.rank}")
    engine = Engine(objective, recipe, ranks, deterministic=deterministic)
    ema = ShardedEma(engine.masters, decay=recipe.optimizer.ema_decay)
    loader = make_loader(stage, ranks, before_shard=on_shard)
    watchdog.enter("resuming", f"rank {ranks.rank}")
    checkpointer = Checkpointer(
        run_folder, engine, ema, ranks, recipe.checkpoint, recipe_digest=recipe_digest(recipe), weights=weights
    )
    resumed = checkpointer.resume()
    return_freed_memory()
    guard = StepGuard(recipe.recovery, max_nonfinite_steps=recipe.max_nonfinite_steps)
    step, validation_pending = _restore(resumed, loader, guard)
    metrics = Metrics(
        run_folder,
        ranks,
        first_step=step,
        max_steps=recipe.max_steps,
        every_steps=recipe.logging.every_steps,
        recipe_text=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        peak_flops=_peak_flops(recipe, ranks),
    )
    if recipe.sharding.gradient_checkpointing == "auto":
        metrics.message(chosen.reason, step=step)
    metrics.message(describe_start(run_folder, resumed, loader, world_size=ranks.world_size), step=step)
    watchdog.enter("reading the held-out clips", f"rank {ranks.rank}")
    validator = Validator(stage, engine, ema, ranks, metrics, stop=stop)
    if validation_pending:
        validation_pending = not on_main(partial(metrics.is_pending_validation_done, step))
    return Trainer(
        recipe=recipe,
        engine=engine,
        ema=ema,
        loader=loader,
        checkpointer=checkpointer,
        metrics=metrics,
        validation=validator,
        stop=stop,
        guard=guard,
        watchdog=watchdog,
        flops=_prepare_flops(recipe, ranks),
        step=step,
        validation_pending=validation_pending,
    )


def _gpu_memory_gib(ranks: Ranks) -> float | None:
    """The memory of the smallest of all ranks' GPUs; None without GPUs. Collective."""
    if ranks.device.type != "cuda":
        return None
    sizes: list[float] = gather_from_ranks(torch.cuda.get_device_properties(ranks.device).total_memory / 2**30)
    return min(sizes)


def _prepare_flops(recipe: TrainingRecipe, ranks: Ranks) -> StepFlops:
    """The count of a step's operations, for the main process; of compiled networks it is made on fake tensors."""
    if not (ranks.is_main and recipe.model.compile == "blocks"):
        return StepFlops(enabled=ranks.is_main)
    return StepFlops(enabled=True, per_micro_batch=count_recipe(recipe).model_flops)


def _peak_flops(recipe: TrainingRecipe, ranks: Ranks) -> float | None:
    """The peak rate of this process's device at the recipe's precision; None on a CPU or an unknown GPU."""
    gpu = known_gpu(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    if gpu is None:
        return None
    return gpu.bf16_flops if recipe.precision == "bf16" else gpu.tf32_flops if recipe.tf32 else gpu.fp32_flops


def _restore(resumed: Resumed | None, loader: ClipLoader, guard: StepGuard) -> tuple[int, bool]:
    """Restores the state of loader and guard; returns the step, and whether its validation must still run.

    Checkpoints of commit 5194bb1 and earlier name that flag `owes_validation`.
    """
    if resumed is None:
        return 0, False
    state = resumed.state
    loader.load_state_dict(state["loader"])
    guard.load_state_dict(state["guard"])
    return resumed.manifest.step, bool(state.get("validation_pending", state.get("owes_validation")))


def make_loader(
    stage: TrainingStage[Any], ranks: Ranks, *, before_shard: Callable[[str], None] | None = None
) -> ClipLoader:
    """The loader of a recipe's training clips, in the recipe's order, with the maps that the stage reads.

    The shards are checked when they are opened; for `data.verify: hash`, `shard_check` has hashed them before.
    """
    recipe = stage.recipe
    data = recipe.data
    verify = verify_at_opening(data.verify)
    latents = None
    if data.latents is not None:
        latents = StoredClips(data.latents, verify=verify, ranks=ranks, before_shard=before_shard)
    generated = None
    if data.maps is not None:
        generated = StoredClips(data.maps, verify=verify, ranks=ranks, before_shard=before_shard)
    dataset = ClipDataset(
        data.train,
        width=data.width,
        height=data.height,
        num_frames=data.num_frames,
        stride=data.stride,
        flip_probability=data.flip_probability,
        reference_margin=data.reference_margin,
        crop_scale=data.crop_scale,
        reference_first=stage.reference_first,
        seed=recipe.seed,
        maps=stage.maps,
        map_sizes=stage.map_sizes,
        verify=verify,
        ranks=ranks,
        before_shard=before_shard,
        latents=latents,
        latent_names=stage.latent_names,
        generated=generated,
        domain_weights=stage.domain_weights,
        with_regions=recipe.objective.region_weights.is_active,
    )
    choice = choose_training_clips(dataset, data.filters, data.mixed_backgrounds)
    if choice.dropped_by and ranks.is_main:
        logger.info("data.filters: %s", choice.report())
    order = ClipOrder(
        dataset.index.samples_per_shard, batch_size=recipe.batch_size, seed=recipe.seed, chosen=choice.passed
    )
    return ClipLoader(
        dataset,
        order,
        micro_batch_size=recipe.micro_batch_size,
        ranks=ranks,
        num_workers=data.num_workers,
        timeout_seconds=data.batch_timeout_seconds,
    )


def describe_start(run_folder: Path, resumed: Resumed | None, loader: ClipLoader, *, world_size: int) -> str:
    """One line about the checkpoint and the step that the run continues from."""
    if resumed is None:
        return f"no checkpoint in {run_folder / 'checkpoints'}; starting at step 0"
    manifest, order = resumed.manifest, loader.order
    epoch, batch = order.position(manifest.step)
    moved = f", saved by {manifest.world_size} ranks and redistributed over {world_size}"
    return (
        f"resuming {run_folder} from step {manifest.step:,} (epoch {epoch}, sample {batch * order.batch_size:,} of "
        f"{order.num_samples:,}; verified {len(manifest.files)} files, {_size(manifest.total_bytes)}"
        f"{moved if manifest.world_size != world_size else ''})"
    )


def recipe_digest(recipe: TrainingRecipe) -> str:
    """A hash of everything in a recipe that changes the result."""
    return hashlib.sha256(result_json(recipe).encode()).hexdigest()


def _seed_global_generators(seed: int) -> None:
    """Seeds the global generators for libraries that use them; our own draws are keyed by the sample."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
