"""Side files keep the result of a stage under a key of everything that determines it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamdance.data.annotation.side_files import Arrays, SideFiles, StageKey

KEY = StageKey("pose", {"threshold": 0.5, "person": [0.1, 0.2, 0.3, 0.4]}, ["a" * 64, "b" * 64])


class Doubling:
    """A stage that counts how often it ran, and gives two heartbeats."""

    def __init__(self, value: int) -> None:
        self.value, self.runs = value, 0

    def __call__(self) -> Iterator[Arrays | None]:
        self.runs += 1
        yield None
        yield None
        yield {"double": np.array([2 * self.value], dtype=np.int16), "note": np.array("a text")}


def last(results: Iterator[Arrays | None]) -> Arrays:
    *heartbeats, result = results
    assert all(beat is None for beat in heartbeats)
    assert result is not None
    return result


def test_a_kept_result_is_read_and_its_stage_does_not_run_again(tmp_path: Path) -> None:
    stage = Doubling(21)
    made = last(SideFiles(tmp_path / "video").make(KEY, stage))
    kept = last(SideFiles(tmp_path / "video").make(KEY, stage))
    assert stage.runs == 1
    assert made["double"].tolist() == kept["double"].tolist() == [42]
    assert kept["double"].dtype == np.int16
    assert str(kept["note"]) == "a text"
    assert "key" not in kept


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, stage="mask"),
        replace(KEY, settings={**KEY.settings, "threshold": 0.4}),
        replace(KEY, inputs=["a" * 64, "c" * 64]),
        replace(KEY, inputs=["a" * 64]),
    ],
)
def test_any_part_of_the_key_makes_another_file_beside_the_first(tmp_path: Path, other: StageKey) -> None:
    files = SideFiles(tmp_path)
    files.keep(KEY, {"x": np.zeros(1)})
    assert files.find(other) is None
    files.keep(other, {"x": np.ones(1)})
    first, second = files.find(KEY), files.find(other)
    assert first is not None
    assert second is not None
    assert (first["x"].item(), second["x"].item()) == (0.0, 1.0)


def test_the_order_of_settings_does_not_change_the_key() -> None:
    assert replace(KEY, settings=dict(reversed(list(KEY.settings.items())))).digest == KEY.digest


def test_a_stage_that_is_interrupted_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Arrays | None]:
        yield None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(SideFiles(tmp_path / "video").make(KEY, interrupted))
    assert not (tmp_path / "video").exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
def test_a_truncated_file_is_made_again_with_a_warning(
    tmp_path: Path, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    files, stage = SideFiles(tmp_path), Doubling(1)
    last(files.make(KEY, stage))
    content = files.path(KEY).read_bytes()
    files.path(KEY).write_bytes(content[: int(kept * len(content))])
    with caplog.at_level(logging.WARNING):
        assert last(files.make(KEY, stage))["double"].tolist() == [2]
    assert stage.runs == 2
    assert "is damaged and is made again" in caplog.text


def test_no_flipped_bit_changes_a_result(tmp_path: Path) -> None:
    """The file is found whole, or not at all; only bits that mean nothing, such as a date, go unnoticed."""
    files, numbers = SideFiles(tmp_path), np.arange(40, dtype=np.int16)
    files.keep(KEY, {"numbers": numbers})
    content, found = files.path(KEY).read_bytes(), []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        files.path(KEY).write_bytes(damaged)
        found.append(files.find(KEY))
    assert sum(arrays is None for arrays in found) > len(found) / 2
    for arrays in found:
        if arrays is not None:
            assert list(arrays) == ["numbers"]
            np.testing.assert_array_equal(arrays["numbers"], numbers)


def test_results_are_compressed_and_the_same_to_the_byte_each_time(tmp_path: Path) -> None:
    numbers = np.arange(100_000) // 1000
    contents = []
    for name in "ab":
        files = SideFiles(tmp_path / name)
        files.keep(KEY, {"numbers": numbers})
        contents.append(files.path(KEY).read_bytes())
    assert contents[0] == contents[1]
    assert len(contents[0]) < numbers.nbytes / 50


def test_a_file_of_another_key_under_this_name_is_not_taken(tmp_path: Path) -> None:
    files, stage = SideFiles(tmp_path), Doubling(3)
    other = replace(KEY, settings={})
    files.keep(other, {"double": np.zeros(1)})
    files.path(other).rename(files.path(KEY))
    assert last(files.make(KEY, stage))["double"].tolist() == [6]
    assert stage.runs == 1


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    files, stage = SideFiles(tmp_path), Doubling(1)
    np.savez(files.path(KEY), key=np.array(KEY.digest), double=np.array([{"a": 1}], dtype=object))
    assert last(files.make(KEY, stage))["double"].tolist() == [2]
    with pytest.raises(ValueError, match="contains objects: x"):
        files.keep(KEY, {"x": np.array([object()], dtype=object)})
