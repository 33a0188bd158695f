"""The records of a run: lines in the log, TensorBoard, and the progress log that `--follow` reads.

The main process records; on other ranks every call returns at once. This module does not know how training works.
"""

import io
import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dreamdance.modalities import DOMAINS
from dreamdance.runs.durations import duration
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import ProgressLog, step_name
from dreamdance.runtime.gpus import TERA
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.stragglers import NOT_TIMED, RankSeconds, StragglerReport

logger = logging.getLogger(__name__)

_GIB = 1024**3
_VIDEO_FRAME_MILLISECONDS = 125


@dataclass(frozen=True)
class Losses:
    """Sums over samples, so that micro batches, ranks and steps add up to true means."""

    loss_sum: float
    num_samples: float
    domain_sums: Sequence[float]
    domain_counts: Sequence[float]

    @property
    def mean(self) -> float:
        return self.loss_sum / self.num_samples if self.num_samples else math.nan

    @property
    def domain_means(self) -> dict[str, float]:
        """The mean loss of each domain that has samples."""
        sums = zip(DOMAINS, self.domain_sums, self.domain_counts, strict=True)
        return {domain: total / count for domain, total, count in sums if count}

    @classmethod
    def unpack(cls, sums: Sequence[float]) -> "Losses":
        """Reads numbers in the order of `ObjectiveOutput.sums`."""
        loss_sum, num_samples, *domains = sums
        return cls(loss_sum, num_samples, domains[: len(DOMAINS)], domains[len(DOMAINS) :])

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.loss_sum + other.loss_sum,
            self.num_samples + other.num_samples,
            [a + b for a, b in zip(self.domain_sums, other.domain_sums, strict=True)],
            [a + b for a, b in zip(self.domain_counts, other.domain_counts, strict=True)],
        )


NO_LOSSES = Losses(0.0, 0.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, over all ranks; `step` counts from 1.

    Attributes:
        host_seconds: how long the main process was busy with starting the forward and backward passes; on a CPU, with
            computing them.
        flops: operations of the main process's micro batches (`StepFlops`); None if they were not counted.
    """

    step: int
    losses: Losses
    learning_rate: float
    gradient_norm: float
    seconds: float
    data_wait_seconds: float
    rank_seconds: RankSeconds = NOT_TIMED
    scaled_rates: Mapping[str, float] = field(default_factory=dict)
    host_seconds: float = 0.0
    flops: int | None = None


@dataclass
class _Interval:
    """The steps since the last line."""

    losses: Losses = NO_LOSSES
    seconds: float = 0.0
    waited: float = 0.0
    host: float = 0.0
    flops: int = 0
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, report: StepReport) -> None:
        if all(map(math.isfinite, (report.losses.mean, *report.losses.domain_means.values()))):
            self.losses = self.losses + report.losses
        self.seconds += report.seconds
        self.waited += report.data_wait_seconds
        self.host += report.host_seconds
        self.flops += report.flops or 0
        self.steps += 1

    @property
    def tflops(self) -> float | None:
        """Counted operations per second of the main process, in units of 1e12; None if they were not counted."""
        return self.flops / self.seconds / TERA if self.flops else None


class Metrics:
    """Records one run; at a resume, TensorBoard drops the steps that will be trained again."""

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        *,
        first_step: int,
        max_steps: int,
        every_steps: int,
        recipe_text: str,
        peak_flops: float | None = None,
    ) -> None:
        """Opens TensorBoard's file and the progress log.

        Args:
            run: the run folder.
            ranks: this process among all.
            first_step: the step from which the run continues; later ones in TensorBoard are purged.
            max_steps: the last step of the run.
            every_steps: number of steps from one printed line, and from one set of scalars, to the next.
            recipe_text: the resolved recipe as YAML.
            peak_flops: operations per second that the device could do at the recipe's precision (`runtime.gpus`); None
                if it is not known.
        """
        self.run, self.max_steps, self.every_steps = run, max_steps, every_steps
        self.recording, self._peak_flops = ranks.is_main, peak_flops
        self._interval, self._stragglers = _Interval(), StragglerReport()
        if not self.recording:
            return
        self._validated_file = run / "logs" / "pending_validation_done.txt"
        if not self.is_pending_validation_done(first_step):
            self._validated_file.unlink(missing_ok=True)  # it is about another step, whose record is purged now
        self._progress = ProgressLog(run)
        folder = run / "tensorboard"
        num_starts = len(list(folder.glob("events.*")))
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=10)
        # TensorBoard never purges texts. They are numbered by the starts of the run, so no text appears twice.
        self._board.add_text("recipe", f"```yaml\n{recipe_text}\n```", global_step=num_starts)

    def message(self, text: str, *, step: int, level: int = logging.INFO) -> None:
        """Writes one message to the log and to the progress log."""
        if self.recording:
            logger.log(level, text)
            self._progress.write(done=step, total=self.max_steps, unit="steps", message=text)

    def step(self, report: StepReport) -> None:
        """Adds a step; every `every_steps`, prints and writes the means since the last line."""
        if not self.recording:
            return
        self._interval.add(report)
        self._stragglers.add(report.rank_seconds, report.seconds)
        if report.step % self.every_steps and report.step != self.max_steps:
            return
        interval, self._interval = self._interval, _Interval()
        elapsed = time.perf_counter() - interval.started
        samples_per_second = report.losses.num_samples * interval.steps / elapsed
        eta = (self.max_steps - report.step) * elapsed / interval.steps
        logger.info(self._line(report, interval, samples_per_second, eta))
        self._progress.write(
            done=report.step,
            total=self.max_steps,
            unit="steps",
            loss=interval.losses.mean if interval.losses.num_samples else None,
            samples_per_second=samples_per_second,
            data_wait_ms=1000 * interval.waited / interval.steps,
            host_ms=1000 * interval.host / interval.steps,
            tflops=interval.tflops,
            mfu=self._mfu(interval),
        )
        if (straggler := self._stragglers.take()) is not None:
            self.message(straggler, step=report.step, level=logging.WARNING)
        self._scalar("train/loss", interval.losses.mean, report.step)
        for domain, loss in interval.losses.domain_means.items():
            self._scalar(f"train/loss_{domain}", loss, report.step)
        self._scalar("optim/lr", report.learning_rate, report.step)
        for name, rate in report.scaled_rates.items():
            self._scalar(f"optim/lr_{name}", rate, report.step)
        self._scalar("optim/grad_norm", report.gradient_norm, report.step)
        self._scalar("perf/samples_per_second", samples_per_second, report.step)
        self._scalar("perf/step_seconds", interval.seconds / interval.steps, report.step)
        self._scalar("perf/data_wait_share", interval.waited / interval.seconds, report.step)
        self._scalar("perf/data_wait_milliseconds", 1000 * interval.waited / interval.steps, report.step)
        self._scalar("perf/host_milliseconds", 1000 * interval.host / interval.steps, report.step)
        for tag, value in (("perf/tflops", interval.tflops), ("perf/mfu", self._mfu(interval))):
            if value is not None:
                self._scalar(tag, value, report.step)
        self._scalar("perf/memory_gib", used_memory_gib(), report.step)
        if torch.cuda.is_available():
            self._scalar("perf/memory_reserved_gib", torch.cuda.max_memory_reserved() / _GIB, report.step)

    def saved(self, step: int, *, seconds: float, waited_seconds: float) -> None:
        """Reports a complete checkpoint: how long it took, and how long training waited for it."""
        name = step_name(step)
        self.message(f"saved {name} in {seconds:.1f} s; training waited {waited_seconds:.2f} s", step=step)
        if self.recording:
            self._scalar("perf/checkpoint_seconds", seconds, step)
            self._scalar("perf/checkpoint_wait_seconds", waited_seconds, step)

    def validation(self, losses: Losses, by_noise: Mapping[str, float], *, step: int) -> None:
        """Writes the loss on the held-out clips, over all noise levels and at each of them."""
        if not self.recording:
            return
        self._scalar("val/loss", losses.mean, step)
        for domain, loss in losses.domain_means.items():
            self._scalar(f"val/loss_{domain}", loss, step)
        for level, loss in by_noise.items():
            self._scalar(f"val_by_noise/{level}", loss, step)
        logger.info("step %s  held-out loss %.4f%s", _of(step, self.max_steps), losses.mean, _domains(losses))

    def samples(
        self,
        grid: NDArray[np.uint8],
        predictions: dict[str, Tensor],
        scores: Mapping[str, float],
        *,
        step: int,
        suffix: str = "",
    ) -> None:
        """Writes the pipeline's samples of held-out clips to TensorBoard and to files in `samples/`.

        Args:
            grid: `H W 3` uint8.
            predictions: by name, `b f c H W` in [0,1]; more than one frame also becomes an animated picture.
            scores: numbers about them, by name.
            step: finished steps.
            suffix: follows the names of files and pictures.
        """
        if not self.recording:
            return
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(grid).save(folder / f"{step_name(step)}{suffix}.png")
        self._board.add_image(f"samples/grid{suffix}", grid, step, dataformats="HWC")
        for name, score in scores.items():
            self._scalar(f"samples/{name}{suffix}", score, step)
        for name, frames in predictions.items():
            if frames.shape[1] > 1:
                encoded = animated_picture(frames)
                (folder / f"{step_name(step)}_{name}{suffix}.gif").write_bytes(encoded)
                height, width = frames.shape[-2], frames.shape[-1] * frames.shape[0]
                picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
                summary = Summary(value=[Summary.Value(tag=f"samples/{name}{suffix}", image=picture)])
                self._board._get_file_writer().add_summary(summary, step)

    def flush(self) -> None:
        """Writes all records to disk: steps before a checkpoint are never trained, nor recorded, again."""
        if self.recording:
            self._board.flush()

    def note_pending_validation_done(self, step: int) -> None:
        """Writes a note that the interrupted validation has been repeated, so that it is recorded only once."""
        if self.recording:
            self.flush()  # before the note: the step from which a start continues is never purged
            write_atomically(self._validated_file, f"{step}\n")

    def is_pending_validation_done(self, step: int) -> bool:
        """Whether an earlier start from `step` has repeated its interrupted validation. For the main process."""
        return self._validated_file.is_file() and self._validated_file.read_text(encoding="utf-8") == f"{step}\n"

    def close(self) -> None:
        """Flushes and closes the files."""
        if self.recording:
            self._board.close()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._board.add_scalar(tag, value, step)

    def _mfu(self, interval: _Interval) -> float | None:
        """The share of the peak rate that an interval reached; None if either is not known."""
        if interval.tflops is None or self._peak_flops is None:
            return None
        return interval.tflops * TERA / self._peak_flops

    def _line(self, report: StepReport, interval: _Interval, samples_per_second: float, eta_seconds: float) -> str:
        steps = interval.steps
        mfu = self._mfu(interval)
        rate = "" if interval.tflops is None else f"{interval.tflops:.3g} TFLOP/s  "
        rate += "" if mfu is None else f"MFU {mfu:.1%}  "
        return (
            f"step {_of(report.step, self.max_steps)}  loss {interval.losses.mean:.4f}{_domains(interval.losses)}  "
            f"gnorm {report.gradient_norm:.3g}  lr {report.learning_rate:.1e}  {samples_per_second:.1f} samples/s  "
            f"step {interval.seconds / steps:.2f}s (data {interval.waited / steps:.2f}, host "
            f"{interval.host / steps:.2f})  {rate}"
            f"mem {_memory()}  eta {duration(eta_seconds)}"
        )


def used_memory_gib() -> float:
    """The largest memory of this process so far: on its GPU, or in main memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def animated_picture(frames: Tensor) -> bytes:
    """A GIF of clips side by side.

    Args:
        frames: `b f c H W` in [0,1], c = 1 or 3.
    """
    wide = rearrange(frames.expand(-1, -1, 3, -1, -1), "b f c h w -> f h (b w) c")
    pictures = [Image.fromarray(frame) for frame in wide.clamp(0, 1).mul(255).round().byte().cpu().numpy()]
    target = io.BytesIO()
    pictures[0].save(
        target,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=_VIDEO_FRAME_MILLISECONDS,
        loop=0,
    )
    return target.getvalue()


def _memory() -> str:
    """`33.1 GiB`, on a GPU `33.1 (reserved 36.0) of 140 GiB`: memory of tensors, and what the allocator reserved."""
    used = f"{used_memory_gib():.1f}"
    if not torch.cuda.is_available():
        return f"{used} GiB"
    reserved = torch.cuda.max_memory_reserved() / _GIB
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / _GIB
    return f"{used} (reserved {reserved:.1f}) of {total:.0f} GiB"


def _domains(losses: Losses) -> str:
    means = [f"{domain} {loss:.4f}" for domain, loss in losses.domain_means.items()]
    return f" ({' '.join(means)})" if means else ""


def _of(step: int, max_steps: int) -> str:
    return f"{step}/{max_steps}"
