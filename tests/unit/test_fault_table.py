"""The table of faults: one row for each fault with its worst numbers, and a non-zero exit code after a failure."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_log import FAULT_LOG, record_fault
from support.tool_modules import load_tool

ROOT = Path(__file__).parents[2]
PASSED = '<testcase classname="tests.unit.test_a" name="test_whole" time="90.0"/>'
FAILED = '<testcase classname="tests.unit.test_a" name="test_broken" time="1.5"><failure message="no"/></testcase>'
INTERRUPTED = '<testcase classname="tests.unit.test_a" name="test_setup" time="0"><error message="no"/></testcase>'
SKIPPED = '<testcase classname="tests.slurm" name="test_b" time="0"><skipped message="Slurm is not here"/></testcase>'
RULER = "|---|---|---|---|--:|--:|--:|"


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(FAULT_LOG, str(tmp_path / "faults.jsonl"))
    return tmp_path / "faults.jsonl"


@pytest.fixture
def make_table(tmp_path, log, monkeypatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Runs the tool over the fault log and results with the given cases; returns its exit code and its lines."""
    tool = load_tool("fault_table")
    monkeypatch.chdir(ROOT)  # it asks git for the commit

    def make_table(*parts: str, missing: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        files = [tmp_path / f"part_{number}.xml" for number in range(len(parts))]
        for file, cases in zip(files, parts, strict=True):
            file.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        files += [tmp_path / f"{name}.xml" for name in missing]
        monkeypatch.setattr(sys, "argv", ["fault_table.py", str(log), *map(str, files)])
        code = tool.main()
        return code, capsys.readouterr().out.splitlines()

    return make_table


def rows(lines: list[str]) -> list[list[str]]:
    table = lines[lines.index(RULER) + 1 :]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def record(fault: str, **numbers: float | int | None) -> None:
    record_fault(fault, how="SIGKILL", promised="it resumes", happened="it resumed", **numbers)


def test_a_fault_has_one_row_with_the_worst_of_its_numbers(make_table):
    record("rank killed", detected_seconds=0.25, resumed_seconds=9.0, steps_lost=0)
    record("disk full")
    record("rank killed", detected_seconds=3.14, resumed_seconds=7.0, steps_lost=2)
    record("rank killed", detected_seconds=None, steps_lost=1)
    code, lines = make_table(PASSED, PASSED)
    assert code == 0
    killed, full = rows(lines)
    assert killed == ["rank killed (x3)", "SIGKILL", "it resumes", "it resumed", "3.1", "9.0", "2"]
    assert full == ["disk full", "SIGKILL", "it resumes", "it resumed", "-", "-", "-"]
    (summary,) = [line for line in lines if line.startswith("2 faults")]
    assert summary.startswith("2 faults, injected 4 times; 2 tests passed, none failed; 3 minutes.")


def test_texts_occur_once_without_temporary_folders_and_fit_into_a_cell(make_table):
    for name in ("pytest-7/test_one0/", "pytest-8/test_two0/"):
        record_fault("torn | file", how=f"cut /tmp/{name}run/a.bin", promised="a " * 200, happened=f"after <{name}>")
    _, lines = make_table(PASSED)
    ((fault, how, promised, happened, *_),) = rows(lines)
    assert fault == r"torn \| file (x2)"
    assert how.startswith("cut .../")
    assert "/tmp" not in lines[-1]
    assert promised.endswith(" ...")
    assert len(promised) <= 160
    assert happened.startswith("after &lt;")
    assert happened.endswith("(and 1 other)")


@pytest.mark.parametrize(
    ("cases", "name"),
    [(FAILED, "tests.unit.test_a::test_broken"), (INTERRUPTED, "tests.unit.test_a::test_setup")],
    ids=["failure", "error"],
)
def test_a_failed_test_is_named_and_fails_the_tool(make_table, cases, name):
    record("rank killed")
    code, lines = make_table(PASSED, PASSED + cases)
    assert code == 1
    assert f"* FAILED: {name}" in lines
    assert any("2 tests passed, 1 FAILED" in line for line in lines)
    assert len(rows(lines)) == 1


def test_a_part_without_results_has_failed(make_table):
    record("rank killed")
    code, lines = make_table(PASSED, missing=("slurm",))
    assert code == 1
    assert "* FAILED: slurm (no results)" in lines


def test_a_skipped_test_is_listed_once_with_its_reason(make_table):
    record("rank killed")
    code, lines = make_table(SKIPPED, SKIPPED + PASSED)
    assert code == 0
    assert lines.count("* left out: Slurm is not here") == 1


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_fault_log_fails_the_tool(make_table, log, content):
    if content is not None:
        log.write_text(content)
    code, lines = make_table(PASSED)
    assert code == 1
    assert rows(lines) == []


def test_without_a_log_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.delenv(FAULT_LOG, raising=False)
    monkeypatch.chdir(tmp_path)
    record("rank killed")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_ran_at_other_commits_name_them(make_table, tmp_path):
    record("rank killed")
    for number, commit in enumerate(("aaaa", "bbbb")):
        (tmp_path / f"part_{number}.commit").write_text(f"{commit}\n")
    _, lines = make_table(PASSED, PASSED)
    assert "commits aaaa (part_0), bbbb (part_1)" in lines[2]
    (tmp_path / "part_1.commit").write_text("aaaa\n")
    _, lines = make_table(PASSED, PASSED)
    assert "commit aaaa" in lines[2]
