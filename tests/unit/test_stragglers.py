"""The rank that all others wait for is named with what it is slow in; chance and company are no straggling."""

import time

import torch

from dreamdance.training.stragglers import LEAST_STEPS, RankSeconds, Stopwatch, StragglerReport

EVEN = [0.1, 0.1, 0.1, 0.1]


def said(
    report: StragglerReport, rank_seconds: RankSeconds, *, steps: int = LEAST_STEPS, step_seconds: float = 1.0
) -> str | None:
    for _ in range(steps):
        report.add(rank_seconds, step_seconds)
    return report.take()


def test_the_slow_rank_and_its_phase_are_named():
    text = said(StragglerReport(), RankSeconds(EVEN, [0.1, 0.1, 0.6, 0.1]))
    assert text is not None
    assert text.startswith("rank 2 holds the others up: 0.6 s of each step in the forward pass")
    assert "at most 0.1 s (a step takes 1 s)" in text
    text = said(StragglerReport(), RankSeconds([0.0, 0.0, 0.0, 0.4], EVEN))
    assert text is not None
    assert text.startswith("rank 3 holds the others up: 0.4 s of each step waiting for its data")


def test_of_two_the_worse_is_said():
    text = said(StragglerReport(), RankSeconds([0.1, 0.1, 0.1, 0.9], [0.1, 0.6, 0.1, 0.1]))
    assert text is not None
    assert text.startswith("rank 3")


def test_nothing_is_said_of_equal_ranks_of_trifles_or_of_too_few_steps():
    assert said(StragglerReport(), RankSeconds([0.4] * 4, [0.4] * 4)) is None
    assert said(StragglerReport(), RankSeconds(EVEN, [0.10, 0.11, 0.19, 0.1])) is None, "less than twice"
    assert said(StragglerReport(), RankSeconds([0.001, 0.001, 0.001, 0.05], EVEN)) is None, "a twentieth of the step"
    assert said(StragglerReport(), RankSeconds(EVEN, [0.1, 0.1, 0.9, 0.1]), steps=LEAST_STEPS - 1) is None
    assert said(StragglerReport(), RankSeconds([0.5], [0.5])) is None, "a single rank"


def test_it_is_said_again_only_when_it_changes():
    report = StragglerReport()
    slow = RankSeconds(EVEN, [0.1, 0.1, 0.6, 0.1])
    assert said(report, slow) is not None
    assert said(report, slow) is None
    assert said(report, RankSeconds(EVEN, [0.6, 0.1, 0.1, 0.1])) is not None
    assert said(report, RankSeconds(EVEN, EVEN)) is None
    assert said(report, slow) is not None, "it had been well in between"


def test_a_stopwatch_adds_up_what_ran_and_not_what_lay_between():
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with stopwatch.running():
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= stopwatch.seconds() < 0.09
