"""Grids of pictures contain every pixel of every picture, enlarged by a whole factor, in its row and column."""

import numpy as np
import pytest

from dreamdance.media.grids import SMALLEST_SIDE, GridRow, draw_grid

BACKGROUND = (250, 250, 250)


def picture(seed: int, height: int = 6, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def find(grid: np.ndarray, wanted: np.ndarray, factor: int) -> tuple[int, int]:
    """Row and column at which a picture, enlarged, lies in the grid."""
    enlarged = wanted.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = enlarged.shape[:2]
    for row, column in zip(*np.nonzero((grid == enlarged[0, 0]).all(axis=-1)), strict=True):
        if np.array_equal(grid[row : row + height, column : column + width], enlarged):
            return int(row), int(column)
    raise AssertionError("the picture is not in the grid")


@pytest.mark.parametrize(("smallest", "factor"), [(1, 1), (4, 1), (5, 2), (13, 4)])
def test_narrow_pictures_grow_by_the_smallest_whole_factor_that_suffices(smallest: int, factor: int) -> None:
    grid = draw_grid([GridRow("", [picture(0)])], smallest_width=smallest)
    find(grid, picture(0), factor)
    assert grid.dtype == np.uint8


def test_pictures_stand_in_rows_and_columns() -> None:
    pictures = [[picture(10 * row + column) for column in range(3)] for row in range(2)]
    grid = draw_grid([GridRow(str(row), line) for row, line in enumerate(pictures)], smallest_width=8)
    places = np.array([[find(grid, entry, 2) for entry in line] for line in pictures])
    assert (np.diff(places[:, :, 0], axis=1) == 0).all()
    assert (np.diff(places[:, :, 1], axis=0) == 0).all()
    assert (np.diff(places[:, :, 1], axis=1) == 8 + 4).all()  # the width and a margin
    assert (np.diff(places[:, :, 0], axis=0) == 12 + 4).all()


def test_a_gap_stays_empty_and_short_rows_are_allowed() -> None:
    grid = draw_grid([GridRow("", [None, picture(1), None]), GridRow("", [picture(2)])], smallest_width=4)
    row, column = find(grid, picture(1), 1)
    assert (grid[row : row + 6, column - 8 : column - 4] == BACKGROUND).all()
    assert (grid[row : row + 6, column + 8 : column + 12] == BACKGROUND).all()
    below, left = find(grid, picture(2), 1)
    assert (below, left) == (row + 10, column - 8)


def test_labels_take_the_room_that_the_longest_needs_and_never_cover_a_picture() -> None:
    def left_edge(*labels: str) -> int:
        grid = draw_grid([GridRow(label, [picture(0)]) for label in labels])
        return find(grid, picture(0), 28)[1]

    assert left_edge("a much longer label") > left_edge("short") > left_edge("")
    assert left_edge("short", "a much longer label") == left_edge("a much longer label")
    assert left_edge("x\na much longer label") == left_edge("a much longer label")
    assert SMALLEST_SIDE == 28 * 4


def test_titles_stand_above_their_columns_and_rules_between_clips() -> None:
    pictures = [picture(0, 40, 120), picture(1, 40, 120)]
    plain, titled = (draw_grid([GridRow("", pictures)], titles=titles) for titles in ((), ("one", "two")))
    top, second = find(titled, pictures[0], 1), find(titled, pictures[1], 1)
    assert titled.shape[0] - plain.shape[0] == top[0] - find(plain, pictures[0], 1)[0] > 12
    for column in (top[1], second[1]):
        assert (titled[: top[0], column : column + 120] < 100).any(), "a title is dark on the background"
    lines = [GridRow("", [picture(0, 40, 120)]), GridRow("", [picture(1, 40, 120)], rule_above=True)]
    ruled, unruled = draw_grid(lines), draw_grid([GridRow("", row.pictures) for row in lines])
    different = np.nonzero((ruled != unruled).any(axis=(1, 2)))[0]
    first, next_row = find(ruled, picture(0, 40, 120), 1)[0] + 40, find(ruled, picture(1, 40, 120), 1)[0]
    assert first <= different.min() <= different.max() < next_row
