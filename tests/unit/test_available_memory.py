"""Free memory: of the machine, and no more than the limit of the process's control group; freed memory goes back."""

import os
import subprocess
import sys
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


# Of 1,000 pieces of 256 KiB each second one is freed: the C library keeps them all.
FREES_EVERY_SECOND_PIECE = """
import re, sys, torch
from dreamdance.runtime.available_memory import return_freed_memory

def own_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

first = torch.ones(8 << 18); del first  # raises the size from which the C library asks the system for each piece
before = own_mib()
pieces = [torch.ones(1 << 16) for _ in range(1000)]
pieces = pieces[::2]
kept = own_mib() - before
return_freed_memory()
print(kept, own_mib() - before, sum(piece.sum().item() for piece in pieces) / (500 << 16))
"""


def test_pages_between_what_stays_go_back_to_the_system() -> None:
    program = [sys.executable, "-c", FREES_EVERY_SECOND_PIECE]
    kept, left, mean = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert int(kept) > 240, "otherwise nothing was to be given back"
    assert int(left) < 150
    assert float(mean) == 1, "what stays is untouched"
