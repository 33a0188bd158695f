"""Durations are written with at most two units."""

import pytest

from dreamdance.runs.durations import duration

DAY = 24 * 3600


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (65, "1m 05s"),
        (3599.6, "1h 00m"),
        (7500, "2h 05m"),
        (DAY - 1, "23h 59m"),
        (DAY, "1d 00h"),
        (33 * 3600, "1d 09h"),
    ],
)
def test_two_units_at_most_are_shown_the_second_with_both_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
