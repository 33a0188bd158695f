"""Metrics of a run: true means over samples, and no step twice in TensorBoard after a resume."""

import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamdance.launch.follow import progress_line
from dreamdance.runs.layout import progress_file
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.metrics import Losses, Metrics, StepReport, animated_picture


def make_metrics(run: Path, *, first_step: int = 0, every_steps: int = 1, ranks: Ranks | None = None) -> Metrics:
    ranks = ranks or Ranks()
    return Metrics(run, ranks, first_step=first_step, max_steps=10, every_steps=every_steps, recipe_text="name: tiny")


def report(step: int, loss: float, *, rgb: float | None = None) -> StepReport:
    sums, counts = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)) if rgb is None else ((2 * rgb, 0.0, 0.0), (2.0, 0.0, 0.0))
    return StepReport(step, Losses(4 * loss, 4.0, sums, counts), 1e-3, 0.5, seconds=0.2, data_wait_seconds=0.05)


def read_board(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    return board


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_board(run).Scalars(tag)]


def test_losses_add_up_to_means_over_samples_not_over_steps():
    few, many = Losses(3.0, 1.0, (3.0, 0, 0), (1.0, 0, 0)), Losses(3.0, 3.0, (0, 1.0, 2.0), (0, 1.0, 2.0))
    total = few + many
    assert total.mean == pytest.approx(1.5)
    assert total.domain_means == {"rgb": 3.0, "normal": 1.0, "depth": 1.0}


def test_rates_are_those_of_the_interval_and_mfu_needs_a_known_peak(tmp_path, caplog):
    def record(run, **settings):
        metrics = Metrics(run, Ranks(), first_step=0, max_steps=10, every_steps=2, recipe_text="name: tiny", **settings)
        for step, seconds in ((1, 0.5), (2, 1.5)):
            metrics.step(replace(report(step, 1.0), seconds=seconds, host_seconds=0.2, flops=3 * 10**12))
        metrics.close()

    with caplog.at_level(logging.INFO):
        record(tmp_path / "known", peak_flops=12e12)
        record(tmp_path / "unknown")
    assert scalars(tmp_path / "known", "perf/tflops") == scalars(tmp_path / "unknown", "perf/tflops") == [(2, 3.0)]
    assert scalars(tmp_path / "known", "perf/mfu") == [(2, 0.25)]
    assert scalars(tmp_path / "known", "perf/host_milliseconds") == [(2, pytest.approx(200))]
    assert scalars(tmp_path / "known", "perf/data_wait_milliseconds") == [(2, pytest.approx(50))]
    assert "perf/mfu" not in read_board(tmp_path / "unknown").Tags()["scalars"]
    first, second = (record.getMessage() for record in caplog.records if "samples/s" in record.getMessage())
    assert "step 1.00s (data 0.05, host 0.20)  3 TFLOP/s  MFU 25.0%  mem" in first
    assert "3 TFLOP/s  mem" in second
    (known,), (unknown,) = (
        [json.loads(line) for line in progress_file(tmp_path / name).read_text().splitlines()]
        for name in ("known", "unknown")
    )
    assert (known["tflops"], known["mfu"], known["host_ms"]) == (3.0, 0.25, pytest.approx(200))
    assert "mfu" not in unknown
    assert "data wait ms 50  host ms 200  tflops 3  mfu 0.25" in progress_line(known)


def test_a_step_whose_operations_were_not_counted_has_no_rate(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.step(report(1, 1.0))
    metrics.close()
    assert "perf/tflops" not in read_board(tmp_path).Tags()["scalars"]


def test_a_domain_without_samples_has_no_mean():
    assert Losses(1.0, 1.0, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)).domain_means == {"rgb": 1.0}


def test_a_line_and_scalars_show_the_mean_since_the_last_line(tmp_path, caplog):
    metrics = make_metrics(tmp_path, every_steps=2)
    with caplog.at_level(logging.INFO):
        metrics.step(report(1, 1.0, rgb=4.0))
        metrics.step(report(2, 3.0))
    metrics.close()
    assert scalars(tmp_path, "train/loss") == [(2, 2.0)]
    assert scalars(tmp_path, "train/loss_rgb") == [(2, 4.0)]
    assert scalars(tmp_path, "perf/data_wait_share") == [(2, pytest.approx(0.25))]
    assert scalars(tmp_path, "optim/lr") == [(2, pytest.approx(1e-3))]
    line = caplog.messages[-1]
    assert line.startswith("step 2/10  loss 2.0000 (rgb 4.0000)  gnorm 0.5  lr 1.0e-03")
    assert "step 0.20s (data 0.05, host 0.00)" in line
    assert "eta" in line


def test_the_progress_log_contains_loss_speed_and_messages(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.message("no checkpoint; starting at step 0", step=0)
    metrics.step(report(1, 2.0))
    metrics.close()
    message, line = [json.loads(text) for text in progress_file(tmp_path).read_text().splitlines()]
    assert message["message"] == "no checkpoint; starting at step 0"
    assert (line["done"], line["total"], line["unit"], line["loss"]) == (1, 10, "steps", 2.0)
    assert line["samples_per_second"] > 0


def test_no_step_appears_twice_after_a_resume(tmp_path):
    killed = make_metrics(tmp_path)
    for step in range(1, 8):
        killed.step(report(step, float(step)))
    killed.flush()  # never closed: it was killed
    resumed = make_metrics(tmp_path, first_step=4)
    for step in range(5, 11):
        resumed.step(report(step, float(10 * step)))
    resumed.close()
    losses = scalars(tmp_path, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 11))
    assert [loss for _, loss in losses] == [1, 2, 3, 4, 50, 60, 70, 80, 90, 100]


def test_a_step_that_is_not_finite_does_not_enter_the_mean(tmp_path):
    metrics = make_metrics(tmp_path, every_steps=2)
    metrics.step(report(1, math.nan))
    metrics.step(report(2, 3.0))
    metrics.close()
    assert scalars(tmp_path, "train/loss") == [(2, 3.0)]


def test_samples_become_pictures_on_disk_and_in_tensorboard(tmp_path):
    metrics = make_metrics(tmp_path)
    grid = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    frames = torch.rand(2, 3, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    metrics.samples(grid, {"depth": frames, "rgb": frames[:, :1]}, {"psnr_rgb": 21.5}, step=5)
    metrics.samples(grid, {"depth": frames}, {}, step=5, suffix="_other_reference")
    metrics.close()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "step_00000005.png")), grid)
    assert (tmp_path / "samples" / "step_00000005_depth.gif").is_file()
    assert not (tmp_path / "samples" / "step_00000005_rgb.gif").exists(), "a single frame is no animation"
    board = read_board(tmp_path)
    assert (tmp_path / "samples" / "step_00000005_other_reference.png").is_file()
    assert (tmp_path / "samples" / "step_00000005_depth_other_reference.gif").is_file()
    both = {"samples/grid", "samples/depth"}
    assert set(board.Tags()["images"]) == both | {f"{name}_other_reference" for name in both}
    assert scalars(tmp_path, "samples/psnr_rgb") == [(5, 21.5)]
    assert board.Images("samples/depth")[0].width == 8


def test_validation_and_recipe_are_written(tmp_path):
    metrics = make_metrics(tmp_path, first_step=3)
    metrics.validation(Losses(2.0, 4.0, (0.0, 3.0, 0.0), (0.0, 2.0, 0.0)), {"sigma_0.172": 0.25}, step=5)
    metrics.close()
    assert scalars(tmp_path, "val/loss") == [(5, 0.5)]
    assert scalars(tmp_path, "val/loss_normal") == [(5, 1.5)]
    assert scalars(tmp_path, "val_by_noise/sigma_0.172") == [(5, 0.25)]
    text = read_board(tmp_path).Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "name: tiny" in text


def test_only_the_main_process_writes(tmp_path):
    metrics = make_metrics(tmp_path, ranks=Ranks(1, 2, 1))
    metrics.message("hello", step=0)
    metrics.step(report(1, 1.0))
    metrics.validation(Losses(1.0, 1.0, (0, 0, 0), (0, 0, 0)), {}, step=1)
    metrics.flush()
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_animated_picture_shows_clips_side_by_side_in_time():
    frames = torch.zeros(2, 3, 3, 6, 4)
    frames[1, 2] = 1.0
    picture = Image.open(io.BytesIO(animated_picture(frames)))
    assert picture.n_frames == 2, "equal frames are shown longer, not twice"
    assert picture.size == (8, 6)
    picture.seek(1)
    last = np.asarray(picture.convert("RGB"))
    assert last[:, :4].max() == 0
    assert last[:, 4:].min() == 255


def test_on_a_gpu_a_line_shows_allocated_and_reserved_memory(tmp_path, caplog, monkeypatch):
    gib = 1024**3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 33.1 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 36.2 * gib)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    sizes = {3: SimpleNamespace(total_memory=140 * gib)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    metrics = make_metrics(tmp_path)
    with caplog.at_level("INFO"):
        metrics.step(report(1, 2.0))
    metrics.close()
    assert "mem 33.1 (reserved 36.2) of 140 GiB" in caplog.text
    assert scalars(tmp_path, "perf/memory_reserved_gib") == [(1, pytest.approx(36.2))]
