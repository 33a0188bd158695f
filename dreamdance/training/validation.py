"""Validation with the averaged weights: the loss on fixed held-out clips, and pictures made by the real pipeline."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.modalities import DOMAINS
from dreamdance.runtime.process_group import sum_over_ranks
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.metrics import Losses, Metrics
from dreamdance.training.networks.trainability import set_modes
from dreamdance.training.sample_pictures import Samples
from dreamdance.training.shard_check import verify_at_opening
from dreamdance.training.stages.training_stage import TrainingStage

_NUM_SUMS = 2 + 2 * len(DOMAINS)


class Validator:
    """Measures the averaged weights on clips that are never trained on."""

    def __init__(
        self,
        stage: TrainingStage[Any],
        engine: Engine,
        ema: ShardedEma,
        ranks: Ranks,
        metrics: Metrics,
        *,
        stop: StopRequest,
    ) -> None:
        """Reads the clips: the same ones, windows, noise and timesteps each time and on any number of ranks.

        Each rank holds its share of the clips for the loss; the main process also holds the clips to sample.

        Raises:
            ShardError: the validation shards are missing or damaged, or their clips too short.
        """
        self.stage, self.engine, self.ema, self.ranks, self.metrics = stage, engine, ema, ranks, metrics
        self.stop = stop
        data, section = stage.recipe.data, stage.recipe.validation
        verify = verify_at_opening(data.verify)
        held_out = partial(fixed_clips, data.validation, width=data.width, height=data.height, verify=verify)
        self.loss_clips = held_out(num_frames=data.num_frames, count=section.num_loss_clips, share_of=ranks)
        self.sample_clips: ClipBatch | None = None
        if metrics.recording:
            samples = held_out(num_frames=section.num_frames, count=section.num_sample_clips)
            self.sample_clips = collate_clips(samples)

    def after_step(self, step: int) -> bool:
        """Measures and samples when the recipe says so; ends early if a rank is asked to stop. Collective.

        Returns:
            whether it was completed, the same on all ranks; if not, no result is recorded.
        """
        section = self.stage.recipe.validation
        last = step == self.stage.recipe.max_steps
        wants_loss = last or step % section.loss_every_steps == 0
        wants_samples = last or step % section.sample_every_steps == 0
        if not (wants_loss or wants_samples):
            return True
        sums, samples = torch.zeros(_NUM_SUMS, dtype=torch.float64), None
        with self.averaged_weights():
            if wants_loss:
                sums = self._loss_sums()
            if wants_samples:  # only the main process samples; the others wait when the weights are restored
                samples = self._samples()
        asked = sums.new_tensor([bool(self.stop)])
        stopped, *totals = sum_over_ranks(torch.cat([asked, sums]).to(self.ranks.device)).tolist()
        if stopped:
            return False
        if wants_loss:
            self.metrics.validation(Losses.unpack(totals), step=step)
        if samples is not None:
            self.metrics.samples(samples.grid, samples.predictions, step=step)
        return True

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """In the block, the objective holds the averaged weights and is in evaluation mode. Collective."""
        with self.engine.weights(self.ema.shards):
            self.engine.objective.eval()
            try:
                yield
            finally:
                set_modes(self.engine.objective)

    @torch.no_grad()
    def _loss_sums(self) -> Tensor:
        """Sums over this rank's share of the clips: losses, number of clips, and both by domain (keyed draws, C8)."""
        objective, size = self.engine.objective, self.stage.recipe.micro_batch_size
        sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)
        for start in range(0, len(self.loss_clips), size):
            if self.stop:
                break
            batch = collate_clips(self.loss_clips[start : start + size])
            sums += objective(batch).sums().cpu()
        return sums

    def _samples(self) -> Samples | None:
        if self.sample_clips is None:
            return None
        with contextlib.suppress(_StoppedError):
            self._break_off()
            return self.stage.sample(self.engine.objective, self.sample_clips, self._break_off)
        return None

    def _break_off(self, *step: object) -> None:
        if self.stop:
            raise _StoppedError


class _StoppedError(Exception):
    """Raised in a pipeline's callback to end sampling early."""
