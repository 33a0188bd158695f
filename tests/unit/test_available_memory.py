"""Free memory: of the machine, and no more than the limit of the process's control group."""

import os
from pathlib import Path

import pytest

from dreamdance.runtime import available_memory as module
from dreamdance.runtime.available_memory import available_memory


def test_it_is_less_than_the_machine_has_and_more_than_this_process_needs() -> None:
    found = available_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found is not None
    assert 1 << 20 < found < total


@pytest.mark.parametrize(("inner", "outer", "expected"), [("max", "1048576", 1 << 20), ("4096", "max", 4096)])
def test_the_smallest_limit_of_the_groups_around_the_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, outer: str, expected: int
) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text(f"{inner}\n")
    (tmp_path / "job" / "memory.max").write_text(f"{outer}\n")
    (tmp_path / "own").write_text("4:memory:/other\n0::/job/step\n")
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    monkeypatch.setattr(module, "_OWN_GROUP", tmp_path / "own")
    assert available_memory() == expected
    for name in ("_OWN_GROUP", "_MEMINFO"):
        monkeypatch.setattr(module, name, tmp_path / "nothing")
    assert available_memory() is None
