"""The rank that all others wait for is named with its slow phase; chance and equally slow ranks are not reported."""

import time

import torch

from dreamdance.runtime.stopwatch import Stopwatch
from dreamdance.training.stragglers import LEAST_STEPS, RankSeconds, StragglerReport

EVEN = [0.1, 0.1, 0.1, 0.1]


def report_of(
    report: StragglerReport, rank_seconds: RankSeconds, *, steps: int = LEAST_STEPS, step_seconds: float = 1.0
) -> str | None:
    for _ in range(steps):
        report.add(rank_seconds, step_seconds)
    return report.take()


def test_the_slow_rank_and_its_phase_are_named():
    text = report_of(StragglerReport(), RankSeconds(EVEN, [0.1, 0.1, 0.6, 0.1]))
    assert text is not None
    assert text.startswith("rank 2 delays the other ranks: 0.6 s of each step in the forward pass")
    assert "at most 0.1 s (a step takes 1 s)" in text
    text = report_of(StragglerReport(), RankSeconds([0.0, 0.0, 0.0, 0.4], EVEN))
    assert text is not None
    assert text.startswith("rank 3 delays the other ranks: 0.4 s of each step waiting for its data")


def test_the_slower_of_two_slow_ranks_is_reported():
    text = report_of(StragglerReport(), RankSeconds([0.1, 0.1, 0.1, 0.9], [0.1, 0.6, 0.1, 0.1]))
    assert text is not None
    assert text.startswith("rank 3")


def test_equal_ranks_small_differences_and_too_few_steps_are_not_reported():
    assert report_of(StragglerReport(), RankSeconds([0.4] * 4, [0.4] * 4)) is None
    assert report_of(StragglerReport(), RankSeconds(EVEN, [0.10, 0.11, 0.19, 0.1])) is None, "less than twice"
    assert report_of(StragglerReport(), RankSeconds([0.001, 0.001, 0.001, 0.05], EVEN)) is None, (
        "a twentieth of the step"
    )
    assert report_of(StragglerReport(), RankSeconds(EVEN, [0.1, 0.1, 0.9, 0.1]), steps=LEAST_STEPS - 1) is None
    assert report_of(StragglerReport(), RankSeconds([0.5], [0.5])) is None, "a single rank"


def test_a_straggler_is_reported_again_only_when_it_changes():
    report = StragglerReport()
    slow = RankSeconds(EVEN, [0.1, 0.1, 0.6, 0.1])
    assert report_of(report, slow) is not None
    assert report_of(report, slow) is None
    assert report_of(report, RankSeconds(EVEN, [0.6, 0.1, 0.1, 0.1])) is not None
    assert report_of(report, RankSeconds(EVEN, EVEN)) is None
    assert report_of(report, slow) is not None, "it was not slow in between"


def test_a_stopwatch_adds_up_running_times_and_not_the_pauses():
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.running():
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= stopwatch.seconds() < 0.09
