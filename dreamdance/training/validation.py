"""Validation with the averaged weights: the loss on fixed held-out clips, and pictures made by the real pipeline."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.diffusion.noise import level_quantiles
from dreamdance.modalities import DOMAINS
from dreamdance.runtime.process_group import gather_on_main, sum_over_ranks
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.stop_request import StopRequest
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.metrics import NO_LOSSES, Losses, Metrics
from dreamdance.training.networks.trainability import set_modes
from dreamdance.training.sample_pictures import Predictions, Samples
from dreamdance.training.sample_scores import other_references
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
        """Reads the clips: the same ones, windows, noise and noise levels each time and on any number of ranks.

        Each rank holds its share of the clips, which it measures and samples one by one, so that a clip gives the same
        bits on any number of ranks. The main process also holds all clips that are sampled, to draw them.

        Raises:
            ShardError: the validation shards are missing or damaged, or their clips too short.
        """
        self.stage, self.engine, self.ema, self.ranks, self.metrics = stage, engine, ema, ranks, metrics
        self.stop = stop
        data, section = stage.recipe.data, stage.recipe.validation
        verify = verify_at_opening(data.verify)
        held_out = partial(
            fixed_clips,
            data.validation,
            width=data.width,
            height=data.height,
            verify=verify,
            reference_first=stage.reference_first,
        )
        self.quantiles = level_quantiles(section.noise_levels)
        self.loss_clips = held_out(num_frames=data.num_frames, count=section.num_loss_clips, share_of=ranks)
        num_frames = section.num_frames + stage.reference_first
        samples = collate_clips(held_out(num_frames=num_frames, count=section.num_sample_clips))
        crossed = other_references(samples, section.num_cross_clips, reference_first=stage.reference_first)
        sampled = {"": samples} if crossed is None else {"": samples, "_other_reference": crossed}
        self.own_samples = {
            suffix: [clips.select([index]) for index in range(ranks.rank, len(clips), ranks.world_size)]
            for suffix, clips in sampled.items()
        }
        self.shown_samples = sampled if metrics.recording else {}

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
        rows, samples = self._no_losses(), dict[str, Samples]()
        with self.averaged_weights():
            if wants_loss:
                rows = self._losses()
            if wants_samples:
                samples = self._samples()
        asked = rows.new_tensor([bool(self.stop)])
        totals = sum_over_ranks(torch.cat([asked, rows.flatten()]).to(self.ranks.device)).cpu()
        if totals[0]:
            return False
        if wants_loss:
            # in the order of the clips: the sum's last bits do not depend on the number of ranks
            self._report(totals[1:].reshape(rows.shape).sum(dim=0).tolist(), step=step)
        for suffix, drawn in samples.items():
            # truth of another person's reference does not exist
            scores = {} if suffix else drawn.scores
            self.metrics.samples(drawn.grid, drawn.predictions, scores, step=step, suffix=suffix)
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

    def _no_losses(self) -> Tensor:
        """Zeros, `clips levels 8`: see `ObjectiveOutput.sums`."""
        count = self.stage.recipe.validation.num_loss_clips
        return torch.zeros(count, len(self.quantiles), _NUM_SUMS, dtype=torch.float64)

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """The losses of this rank's share of the clips (keyed draws, C8), as `_no_losses`; zero for all other clips."""
        rows = self._no_losses()
        for number, clip in enumerate(self.loss_clips):
            objective = self.engine.objective
            for level, prepared in enumerate(objective.prepare_levels(collate_clips([clip]), self.quantiles)):
                if self.stop:
                    return rows
                sums = objective(prepared).sums()
                rows[self.ranks.rank + number * self.ranks.world_size, level] = sums.cpu()
        return rows

    def _report(self, totals: Sequence[Sequence[float]], *, step: int) -> None:
        """Records the mean over all levels, and each level's mean."""
        levels = [Losses.unpack(level) for level in totals]
        by_noise = {
            self.engine.objective.describe_noise(quantile): level.mean
            for quantile, level in zip(self.quantiles, levels, strict=True)
        }
        self.metrics.validation(sum(levels, NO_LOSSES), by_noise, step=step)

    def _samples(self) -> dict[str, Samples]:
        """The samples by the suffix of their names: with the clips' own references, and with those of others.

        Collective: each rank samples its share, and the main process draws them; the others get nothing.
        """
        found = {}
        for suffix, clips in self.own_samples.items():
            own: list[Predictions] | None = None
            with contextlib.suppress(_StoppedError):
                own = [self._predict(clip) for clip in clips]
            shares = gather_on_main(own)
            if shares is None or any(share is None for share in shares):
                continue
            shown = self.shown_samples[suffix]
            by_clip = [shares[index % len(shares)][index // len(shares)] for index in range(len(shown))]
            predictions = {name: torch.cat([clip[name] for clip in by_clip]) for name in by_clip[0]}
            found[suffix] = self.stage.show(shown, predictions)
        return found

    def _predict(self, clip: ClipBatch) -> Predictions:
        self._break_off()
        predictions = self.stage.predict(self.engine.objective, clip, self._break_off)
        return {name: values.cpu() for name, values in predictions.items()}

    def _break_off(self, *step: object) -> None:
        if self.stop:
            raise _StoppedError


class _StoppedError(Exception):
    """Raised in a pipeline's callback to end sampling early."""
