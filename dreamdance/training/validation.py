"""Now and then, with the averaged weights: the loss on fixed held-out clips, and pictures made by the real pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from dreamdance.data.clips import fixed_clips
from dreamdance.data.collate import ClipBatch, collate_clips
from dreamdance.ranks import Ranks
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from dreamdance.training.distributed import sum_over_ranks
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine
from dreamdance.training.metrics import Losses, Metrics
from dreamdance.training.objectives.output import NUM_DOMAINS
from dreamdance.training.sampling import draw_samples
from dreamdance.training.trainability import set_modes


class Validator:
    """Watches the average of the weights on clips that are never trained on."""

    def __init__(
        self, recipe: Stage1Recipe | Stage2Recipe, engine: Engine, ema: ShardedEma, ranks: Ranks, metrics: Metrics
    ) -> None:
        """Reads the clips: the same ones, windows, noise and timesteps each time and on any number of ranks.

        A rank holds no more than its share of those for the loss; the main process, those that samples are drawn of.

        Raises:
            ShardError: the validation shards are missing or damaged, or their clips too short.
        """
        self.recipe, self.engine, self.ema, self.ranks, self.metrics = recipe, engine, ema, ranks, metrics
        data, section = recipe.data, recipe.validation
        held_out = partial(fixed_clips, data.validation, width=data.width, height=data.height, verify=data.verify)
        self.loss_clips = held_out(num_frames=data.num_frames, count=section.num_loss_clips, share_of=ranks)
        self.sample_clips: ClipBatch | None = None
        if metrics.recording:
            samples = held_out(num_frames=section.num_frames, count=section.num_sample_clips)
            self.sample_clips = collate_clips(samples)

    def after_step(self, step: int) -> None:
        """Does what the recipe wants after this step. Collective."""
        section = self.recipe.validation
        last = step == self.recipe.max_steps
        wants_loss = last or step % section.loss_every_steps == 0
        wants_samples = last or step % section.sample_every_steps == 0
        if not (wants_loss or wants_samples):
            return
        with self.averaged_weights():
            if wants_loss:
                self.metrics.validation(self._losses(), step=step)
            if wants_samples and self.sample_clips is not None:  # the others wait where the weights are put back
                samples = draw_samples(self.engine.objective, self.sample_clips, self.recipe)
                self.metrics.samples(samples.grid, samples.predictions, step=step)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the objective holds the average and is in evaluation mode. Collective."""
        with self.engine.weights(self.ema.shards):
            self.engine.objective.eval()
            try:
                yield
            finally:
                set_modes(self.engine.objective)

    @torch.no_grad()
    def _losses(self) -> Losses:
        """The mean over all clips, each rank taking its share of them; every number is keyed by the clip."""
        objective, size = self.engine.objective, self.recipe.micro_batch_size
        totals = torch.zeros(2 + 2 * NUM_DOMAINS, dtype=torch.float64)
        for start in range(0, len(self.loss_clips), size):
            batch = collate_clips(self.loss_clips[start : start + size])
            output = objective(batch)
            totals[0] += output.sample_losses.sum().cpu()
            totals[1] += len(batch)
            totals[2:] += torch.cat([output.domain_sums, output.domain_counts]).cpu()
        loss_sum, num_samples, *domains = sum_over_ranks(totals.to(self.ranks.device)).tolist()
        return Losses(loss_sum, num_samples, domains[:NUM_DOMAINS], domains[NUM_DOMAINS:])
