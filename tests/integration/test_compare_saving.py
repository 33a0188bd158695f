"""The measurement of the time that training waits for a checkpoint, in its smallest form."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "compare_saving.py"
COMMITTED = TOOL.with_suffix(".csv")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_both_ways_of_saving_are_measured_in_one_run_and_recorded(tmp_path):
    table = tmp_path / "table.csv"
    words = ["--parameters", "0.01", "--ranks", "2", "--rounds", "1", "--csv", table]
    done = subprocess.run(
        [sys.executable, TOOL, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(encoding="utf-8", newline="") as file:
        theirs, ours = csv.DictReader(file)
    assert (theirs["method"], ours["method"]) == ("DeepSpeed", "DreamDance")
    with COMMITTED.open(encoding="utf-8", newline="") as file:
        assert list(next(csv.DictReader(file))) == list(theirs), "the committed table has other columns"
    for row in (theirs, ours):
        assert (row["ranks"], row["rounds"], row["million_parameters"]) == ("2", "1", "0.01")
        assert 0.0 < float(row["wait_seconds"]) <= float(row["total_seconds"])
        # In fp32: weights and masters, or master and average, and two moments are four times 4 bytes.
        assert float(row["megabytes"]) >= 16 * 0.01
    assert theirs["wait_seconds"] == theirs["total_seconds"], "it returns after all files are written"
    assert [line.split()[0] for line in done.stdout.splitlines()[-2:]] == ["DeepSpeed", "DreamDance"]
