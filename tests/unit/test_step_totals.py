"""Totals of a step: sums over micro batches, flags that any rank may set, named samples."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.recipes import select_clips, tiny_clip_batch
from torch import distributed as dist

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.runtime.process_group import from_main, gather_from_ranks, process_group, sum_over_ranks
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.objectives.output import ObjectiveOutput
from dreamdance.training.step_totals import RankReport, StepTotals, name_nonfinite


@pytest.fixture
def group() -> Iterator[None]:
    """The process group of a single process; it stays open, because DeepSpeed keeps the first one that it gets."""
    with process_group(Ranks(), timeout_seconds=60):
        yield


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    clips = tiny_clip_batch(num_clips=2, num_frames=1)
    return replace(clips, keys=torch.tensor([[7, 3, 11], [7, 4, 12]]))  # seed, epoch, sample


def output(losses: list[float], sums: tuple[float, float, float] = (0.0, 0.0, 0.0),
           counts: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> ObjectiveOutput:  # fmt: skip
    values = torch.tensor(losses)
    return ObjectiveOutput(values.mean(), values, torch.tensor(sums), torch.tensor(counts))


@pytest.mark.usefixtures("group")
def test_the_loss_of_a_step_is_the_mean_over_its_samples_not_over_its_micro_batches(batch: ClipBatch) -> None:
    totals = StepTotals()
    totals.add(batch, output([1.0, 3.0], (4.0, 0.0, 2.0), (2.0, 0.0, 1.0)))
    totals.add(select_clips(batch, 0), output([8.0], (8.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    totals.reduce(applied=True)
    assert totals.losses.num_samples == 3
    assert totals.losses.mean == pytest.approx(4.0)
    assert totals.losses.domain_means == {"rgb": 4.0, "depth": 2.0}
    assert not totals.should_stop
    assert not totals.is_skipped


def test_pictures_of_a_micro_batch_are_freed_before_the_next_one_is_computed() -> None:
    """On a GPU those of a whole step would take gigabytes, which no plan counts."""
    clips, totals = tiny_clip_batch(num_clips=2, num_frames=1), StepTotals()
    pictures = [weakref.ref(tensor) for name, tensor in clips.tensors.items() if name not in ("keys", "fps")]
    totals.add(clips, output([math.inf, 0.5]))
    name = clips.clip_ids[0]
    del clips
    assert len(pictures) > 3
    assert [reference() for reference in pictures] == [None] * len(pictures)
    assert name in totals.nonfinite_samples[0]


@pytest.mark.usefixtures("group")
def test_sums_over_micro_batches_are_exact_where_float32_would_round(batch: ClipBatch) -> None:
    totals = StepTotals()
    for loss in (2.0**24, 1.0, 1.0, 1.0):
        totals.add(select_clips(batch, 0), output([loss]))
    totals.reduce(applied=True)
    assert totals.losses.loss_sum == 2.0**24 + 3


@pytest.mark.usefixtures("group")
def test_a_stop_of_any_rank_is_seen_by_all(batch: ClipBatch) -> None:
    totals = StepTotals()
    totals.add(batch, output([1.0, 1.0]))
    totals.reduce(applied=True, should_stop=True)
    assert totals.should_stop
    assert not totals.is_skipped


@pytest.mark.usefixtures("group")
def test_a_step_that_was_not_applied_is_skipped_even_where_every_loss_is_finite(batch: ClipBatch) -> None:
    totals = StepTotals()
    totals.add(batch, output([1.0, 1.0]))
    totals.reduce(applied=False)
    assert totals.is_skipped
    assert totals.nonfinite_samples == []


@pytest.mark.usefixtures("group")
def test_samples_whose_loss_is_not_finite_are_recorded_over_micro_batches(batch: ClipBatch) -> None:
    totals = StepTotals()
    totals.add(batch, output([math.nan, 1.0]))
    totals.add(batch, output([1.0, math.inf]))
    totals.reduce(applied=True)
    assert totals.is_skipped
    assert [name.split(" (")[0] for name in totals.nonfinite_samples] == [
        "sample 11 of epoch 3",
        "sample 12 of epoch 4",
    ]


def test_a_rank_report_is_unpacked_as_it_was_packed() -> None:
    report = RankReport(1.0, 0.0, 2.0, data_seconds=[0.1, 0.2, 0.3], forward_seconds=[0.4, 0.5, 0.6])
    assert RankReport.unpack(report.pack()) == report


def test_a_bad_sample_is_named_by_its_number_epoch_and_clip(batch: ClipBatch) -> None:
    first, second = batch.clip_ids
    assert name_nonfinite(batch, [math.inf, 0.5]) == [f"sample 11 of epoch 3 (clip {first}): inf"]
    assert name_nonfinite(batch, [0.5, -math.inf]) == [f"sample 12 of epoch 4 (clip {second}): -inf"]
    assert name_nonfinite(batch, [0.5, 0.25]) == []
    with pytest.raises(ValueError, match="zip"):
        name_nonfinite(batch, [math.nan])


def test_a_single_processs_group_stays_open_for_the_next_recipe() -> None:
    with process_group(Ranks(), timeout_seconds=60):
        pass
    assert dist.is_initialized()
    with process_group(Ranks(), timeout_seconds=60):
        assert sum_over_ranks(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
        assert sum_over_ranks(torch.ones(1)).dtype == torch.float64
        assert gather_from_ranks({"rank": 0}) == [{"rank": 0}]
        assert from_main(("any", 1)) == ("any", 1)
