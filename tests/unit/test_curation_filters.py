"""Filters choose clips by their scores, and histograms show what they would drop."""

import pytest
from pydantic import ValidationError

from dreamdance.data.curation.filters import Limits, choose_clips, failed_filters, filter_limits
from dreamdance.data.curation.histograms import draw_histograms
from dreamdance.data.curation.scores import SCORE_KINDS, Scores
from dreamdance.recipe.filter_section import ScoreFilters

GOOD = {"cut": 0.1, "motion": 0.05, "sharpness": 90.0, "visible_joints": 0.9, "people": 1, "jitter": 0.1,
        "geometry_angle": 12.0}  # fmt: skip


def test_there_is_a_filter_for_every_score():
    assert list(ScoreFilters.model_fields) == list(SCORE_KINDS)


@pytest.mark.parametrize(
    ("filters", "passing", "failing"),
    [
        ({"cut": 0.4}, 0.4, 0.41),
        ({"motion": (0.01, 0.2)}, 0.01, 0.009),
        ({"motion": (0.01, 0.2)}, 0.2, 0.21),
        ({"sharpness": 50.0}, 50.0, 49.0),
        ({"visible_joints": 0.8}, 0.8, 0.79),
        ({"people": 1}, 1, 2),
        ({"people": 1}, 1, 0),
        ({"jitter": 0.3}, 0.3, 0.31),
        ({"geometry_angle": 30.0}, 30.0, 30.1),
    ],
)
def test_each_limit_includes_its_ends(filters, passing, failing):
    limits = filter_limits(ScoreFilters(**filters))
    (name,) = filters
    assert failed_filters(Scores(**{**GOOD, name: passing}), limits) == []
    assert failed_filters(Scores(**{**GOOD, name: failing}), limits) == [name]
    assert failed_filters(Scores(**{**GOOD, name: None}), limits) == [name]


def test_without_filters_every_clip_passes():
    choice = choose_clips([Scores(), Scores(**GOOD)], ScoreFilters())
    assert choice.passed == (True, True)
    assert choice.report() == "2 of 2 clips remain"


def test_the_report_counts_the_clips_of_each_filter():
    clips = [Scores(**GOOD), Scores(**{**GOOD, "people": 2, "motion": 0.5}), Scores(**{**GOOD, "people": 3}), Scores()]
    choice = choose_clips(clips, ScoreFilters(motion=(0.01, 0.2), visible_joints=0.5, people=1))
    assert choice.passed == (True, False, False, False)
    assert choice.dropped_by == {"motion": 2, "visible_joints": 1, "people": 3}
    assert choice.report() == (
        "1 of 4 clips remain; dropped by motion: 2 (1 without this score), visible_joints: 1 (1 without this score), "
        "people: 3 (1 without this score)"
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"motion": 0.1},
        {"motion": (0.1,)},
        {"motion": (-0.1, 0.2)},
        {"visible_joints": 1.5},
        {"people": 0},
        {"people": 1.5},
        {"geometry_angle": 200.0},
        {"beauty": 1.0},
    ],
)
def test_filters_are_typed(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ScoreFilters(**wrong)


@pytest.mark.parametrize(
    ("limits", "text"),
    [(Limits(1, 1), "1"), (Limits(0.1, 0.5), "0.1 to 0.5"), (Limits(low=0.1), "at least 0.1"),
     (Limits(high=3), "at most 3")],
)  # fmt: skip
def test_limits_read_as_words(limits, text):
    assert str(limits) == text


def test_a_histogram_counts_every_clip_and_states_what_a_limit_drops():
    """Values 0.00 to 0.99 in ten bins; a limit of 0.3 drops 30 of them: two bins, and a third one but for the 0.30."""
    clips = [Scores(visible_joints=number / 100, people=1 + number % 3) for number in range(100)]
    text = draw_histograms(clips, {"visible_joints": Limits(low=0.3), "people": Limits(1, 1)})
    blocks = {block.split(":")[0]: block.splitlines() for block in text.split("\n\n")}
    assert list(blocks) == list(SCORE_KINDS)
    joints = blocks["visible_joints"]
    assert joints[1] == "  smallest 0, median 0.495, largest 0.99"
    bars = [line for line in joints if "#" in line]
    counts = [int(line.split("#")[0].split()[-1]) for line in bars]
    assert (len(bars), sum(counts)) == (10, 100)
    assert [line.endswith("dropped") for line in bars] == [True] * 2 + [False] * 8
    assert joints[-1] == "  data.filters.visible_joints (at least 0.3) drops 30 of 100 clips (30.0 %)"
    people = [line.split() for line in blocks["people"] if "#" in line]
    assert [(line[0], line[1]) for line in people] == [("1", "34"), ("2", "33"), ("3", "33")]
    assert blocks["people"][-1] == "  data.filters.people (1) drops 66 of 100 clips (66.0 %)"
    assert blocks["jitter"][-1] == "  100 of 100 clips without a value"


def test_one_odd_clip_does_not_hide_the_others():
    clips = [Scores(motion=0.01 + 0.0001 * number) for number in range(200)] + [Scores(motion=1e6)]
    bars = [line for line in draw_histograms(clips, {}).splitlines() if "#" in line]
    assert len(bars) == 10
    assert "and more" in bars[-1]


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [0.5, 0.5, 0.5]])
def test_equal_values_are_drawn(values):
    text = draw_histograms([Scores(cut=value) for value in values], {"cut": Limits(high=0.6)})
    assert f"drops 0 of {len(values)} clips" in text
